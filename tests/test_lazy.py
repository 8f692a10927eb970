"""What is imported when: commands that only read settings and results do not wait for torch and transformers."""

from __future__ import annotations

import subprocess
import sys

import pytest

import medbridge.model
import medbridge.rollout
import medbridge.train


def imported_by(statements: str) -> set[str]:
    """Which of the slow packages a fresh process has imported after `statements`."""
    code = f"{statements}\nimport sys\nprint(*({{'torch', 'transformers', 'torchvision'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("module", ["config", "ledger", "report", "evaluation", "measurement", "cli", "data"])
def test_reading_needs_neither_torch_nor_transformers(module: str) -> None:
    assert imported_by(f"import medbridge.{module}") == set()


def test_what_is_asked_for_is_imported_with_torchvision_made_ready() -> None:
    asked = "from medbridge.model import Policy\nfrom transformers import AutoProcessor\nimport torchvision"
    assert imported_by(asked) == {"torch", "transformers", "torchvision"}


@pytest.mark.parametrize("first", ["medbridge.export", "medbridge.rollout.transformers", "medbridge.train.memory"])
def test_modules_that_import_transformers_may_come_first(first: str) -> None:
    assert "transformers" in imported_by(f"import {first}\nfrom transformers import AutoProcessor")


@pytest.mark.parametrize("package", [medbridge.model, medbridge.rollout, medbridge.train])
def test_every_public_name_is_there_and_no_other(package: object) -> None:
    for name in package.__all__:  # type: ignore[attr-defined]
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'Polixy'"):
        _ = package.Polixy  # type: ignore[attr-defined]

"""Shared by the benchmarks: their figures go to bench/results, with the machine and the versions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from records import write_results


@pytest.fixture(scope="session")
def save() -> Callable[[str, str, dict[str, Any]], Path]:
    """`save(name, command, figures)` replaces bench/results/NAME.json; `command` is what measured the figures."""
    return write_results

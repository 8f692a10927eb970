"""Shared by the benchmarks: their figures go to bench/results, with the machine and the versions."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from medbridge.run_folder import environment

sys.path.insert(0, str(Path(__file__).parent))  # for measure.py and peers.py beside this file

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Processor, cores, accelerator and package versions."""
    processor = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                processor = line.partition(":")[2].strip()
                break
    return {"processor": processor, **environment()}


@pytest.fixture(scope="session")
def save() -> Callable[[str, str, dict[str, Any]], Path]:
    """`save(name, command, figures)` replaces bench/results/NAME.json; `command` is what measured the figures."""

    def write(name: str, command: str, figures: dict[str, Any]) -> Path:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{name}.json"
        record = {
            "measured": datetime.now(UTC).date().isoformat(),
            "command": command,
            "machine": machine(),
            "figures": figures,
        }
        path.write_text(json.dumps(record, indent=2) + "\n")
        return path

    return write

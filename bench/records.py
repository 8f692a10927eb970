"""Results files of the benchmarks: what was measured, by which command, on which machine with which versions."""

from __future__ import annotations

import json
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from medbridge.run_folder import environment

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


def record(command: str) -> dict[str, Any]:
    """What goes before the figures: the day, the command that measured them, the machine."""
    return {"measured": datetime.now(UTC).date().isoformat(), "command": command, "machine": machine()}


def write_results(name: str, command: str, figures: dict[str, Any]) -> Path:
    """Replace bench/results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**record(command), "figures": figures}, indent=2) + "\n")
    return path

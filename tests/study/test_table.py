"""What `medbridge study` prints."""

from __future__ import annotations

import pytest

from medbridge.cli.common import stdout
from medbridge.cli.study import table_of
from medbridge.report.view import Estimate
from medbridge.study.result import FINDINGS, Cell, Finding, ModelRow, Sight, StudyResult


def test_findings_and_intervals_are_whole_at_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    stratum, name = "Ultrasound / CLOSED", "SFT on CT / CLOSED, CT / OPEN"
    support, accuracy, gain = Estimate(-0.9, -1.0, -0.8), Estimate(0.3, 0.2, 0.4), Estimate(-0.5, -1.19, -0.13)
    cells = [
        Cell(
            f"{name} {kind}", stratum, "bridge", "", 50, 6, 8, 4, support, accuracy, (1,), (0.3,), (0.2,), None,
            Sight(40, 50, 2, 0.8, 0.6, gain), (50,), Finding(kind, ""),
        )
        for kind in FINDINGS
    ]  # fmt: skip
    models = tuple(ModelRow(cell.model, "a") for cell in cells)
    found = StudyResult("a study", 0.9, 0.5, 0.2, "test", models, (stratum,), tuple(cells), ())
    monkeypatch.setattr(stdout, "width", 80)
    with stdout.capture() as capture:
        stdout.print(table_of(found))
    said = capture.get().replace("\N{MINUS SIGN}", "-")
    assert max(map(len, said.splitlines())) <= 80
    for whole in ("[-1.19,-0.13]", "[-1.00,-0.80]", "[0.20,0.40]", "Ultrasound"):
        assert said.count(whole) == len(FINDINGS), said
    for kind in FINDINGS:
        assert kind.split("-")[0] in said
    assert said.count("limited") == sum("-limited" in kind for kind in FINDINGS)

"""An evaluation as one HTML file that needs nothing else: no network, no script, every text escaped."""

from __future__ import annotations

from pathlib import Path

from markupsafe import Markup

from medbridge.evaluation import Evaluation, StratumResult
from medbridge.files import replace_text
from medbridge.report.charts import Series, pass_at_k_chart
from medbridge.report.page import environment
from medbridge.report.view import short


def write_evaluation(evaluation: Evaluation, out: Path) -> Path:
    """Write the page, in one step; its path. Raises MedbridgeError where it can't be written."""
    replace_text(out, render(evaluation))
    return out


def render(evaluation: Evaluation) -> str:
    """The page as HTML text."""
    curves = [(row.stratum, _curves(row)) for row in (*evaluation.strata, *evaluation.datasets) if row.ks]
    return environment().get_template("evaluation.html.j2").render(evaluation=evaluation, curves=curves)


def _curves(row: StratumResult) -> Markup:
    unknown: list[float | None] = [None] * len(row.ks)
    first = row.acc_at_1 or {}
    greedy = first.get("value")
    said = None if greedy is None else (greedy, first["low"], first["high"])
    majority = dict(enumerate(row.majority, start=1))
    series = [
        Series("majority@k", "before", [majority.get(k) for k in row.ks], unknown, unknown, None),
        Series("Pass@k", "after", list(row.pass_at_k), unknown, unknown, said),
    ]
    return pass_at_k_chart(
        row.ks, series, list(row.floors), gate_k=row.k, title=f"Pass@k of {short(row.stratum, 60)}",
        description="With majority of k and guessing; Acc@1 stands left of k = 1.",
    )  # fmt: skip

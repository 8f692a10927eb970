"""The report as one HTML file that needs nothing else: no network, no script, every text escaped."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from medbridge.files import replace_text
from medbridge.metrics import METRICS
from medbridge.report import charts
from medbridge.report.charts import Reached, Series, figure
from medbridge.report.checks import Findings, findings
from medbridge.report.collect import collect
from medbridge.report.images import Embedder, Picture
from medbridge.report.page import environment, two
from medbridge.report.samples import excerpt
from medbridge.report.view import (
    CheckView,
    Estimate,
    Measurement,
    Piece,
    RunView,
    Sample,
    StageView,
    StratumView,
    short,
)

IMAGE_BYTES = 1_500_000
"""Budget of the embedded images: about half of a file of at most 3 MB, which mail and web viewers take."""

_COMPLETION_CHARACTERS = 360
"""Characters of a completion that are shown at once; the rest is folded away."""

_FOLDED_CHARACTERS = 4_000
"""Characters of one folded completion at most, and a share of `_FOLDED_IN_ALL` where there are many."""

_FOLDED_IN_ALL = 300_000

_CONFIG_CHARACTERS = 60_000

_FEW_STRATA = 12
"""Up to this many strata, the header says one sentence for each; more are counted and folded away."""

CHECKS = {
    "strict": "Strict reading",
    "lenient": "Lenient reading",
    "blank": "Grey images",
    "shuffled": "Exchanged images",
}


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """Write the report of a run, at any moment of the run's life.

    Args:
        run_dir: folder that holds `run.sqlite`; it is only read.
        out: file to write; None writes `report.html` into the run folder. It is replaced in one step, so
            that a reader never sees half a report.

    Returns:
        The path of the file.

    Raises:
        MedbridgeError: there is no run database, it can't be read, or the file can't be written.
    """
    path = run_dir / "report.html" if out is None else out
    replace_text(path, render(collect(run_dir)))
    return path


def render(view: RunView) -> str:
    """The report as HTML text."""
    templates = environment()
    templates.filters["figure"] = figure
    page = _Page(view)
    return templates.get_template("report.html.j2").render(run=view, page=page, few=_FEW_STRATA, check_names=CHECKS)


class _Page:
    """What the template asks for beyond the view: drawings, pictures, and texts put together."""

    def __init__(self, view: RunView) -> None:
        self._view = view
        self._embedder = Embedder(IMAGE_BYTES)
        measured = [m for stratum in view.strata for m in stratum.measured]
        lows = [end for m in measured if m.support for end in (m.support.low, m.support.value) if end is not None]
        # One scale for all bars. Support falls below 0 where a model does worse than guessing, but how far says
        # little: below the scale, an arrow and the number are enough.
        self._support_domain = (max(-0.5, _floor_quarter(min([0.0, *lows]))), 1.0)
        completions = sum(len(sample.completions) for stratum in view.strata for sample in stratum.samples)
        self._folded = min(_FOLDED_CHARACTERS, _FOLDED_IN_ALL // max(1, completions))

    # -- bars ------------------------------------------------------------------------------------------------

    def support_bar(self, stratum: StratumView, measurement: Measurement) -> Markup:
        value = measurement.support
        return self._bar(
            value,
            f"{stratum.name}, {measurement.label}: support above the floor",
            style="before" if measurement is stratum.base else "after",
            domain=self._support_domain,
            references=self._threshold(),
        )

    def support_scale(self) -> Markup:
        return charts.scale(self._support_domain, self._threshold())

    def accuracy_bar(self, name: str, value: Estimate | None, style: str, chance: float | None) -> Markup:
        references = [] if chance is None else [(chance, "floor", f"guessing: {two(chance)}")]
        target = self._view.accuracy_target
        if target is not None:
            references.append((target, "target", f"target: {two(target)}"))
        return self._bar(value, f"{name}: Acc@1", style=style, references=references)

    def accuracy_scale(self) -> Markup:
        target = self._view.accuracy_target
        return charts.scale((0.0, 1.0), [] if target is None else [(target, "target", "")])

    def _threshold(self) -> list[tuple[float, str, str]]:
        threshold = self._view.threshold
        return [] if threshold is None else [(threshold, "threshold", f"threshold: {two(threshold)}")]

    def _bar(self, value: Estimate | None, title: str, **how: Any) -> Markup:
        said = "not measured" if value is None else f"{two(value.value)} {interval(value)}".strip()
        return charts.interval_bar(
            value.value if value else None,
            value.low if value else None,
            value.high if value else None,
            title=f"{short(title)}: {said}",
            **how,
        )

    def interval(self, value: Estimate | None) -> str:
        return interval(value)

    # -- charts ----------------------------------------------------------------------------------------------

    def curves(self, stratum: StratumView) -> Markup:
        latest = stratum.latest
        if latest is None:
            return Markup("")
        shown = _base_and_latest(stratum)
        ks = max((m.ks for m in shown), key=len)
        series = [
            Series(
                m.label,
                "after" if index else "before",
                _padded(m.pass_at_k.value, len(ks)),
                _padded(m.pass_at_k.low, len(ks)),
                _padded(m.pass_at_k.high, len(ks)),
                (m.acc_at_1.value, m.acc_at_1.low, m.acc_at_1.high) if m.acc_at_1 else None,
            )
            for index, m in enumerate(shown)
        ]
        floor = max((m.floor for m in shown), key=len)
        said = [
            f"{m.label}: Pass@{m.n_min} {two(m.raw_pass)} where guessing reaches {two(m.raw_floor)}, "
            f"Acc@1 {two(m.acc_at_1.value if m.acc_at_1 else None)}"
            for m in shown
        ]
        reached = _reached(latest, len(ks))
        if reached is not None and latest.k in ks:
            share = two(reached.value[ks.index(latest.k)])
            said.append(f"The gate reads {share} reached at k = {latest.k} where guessing reaches {two(reached.guess)}")
        return charts.pass_at_k_chart(
            ks,
            series,
            _padded(floor, len(ks)),
            gate_k=latest.k,
            reached=reached,
            title=f"Pass@k of {short(stratum.name, 60)}",
            description=". ".join(said),
        )

    def curve_table(self) -> tuple[list[int], list[tuple[str, str, list[float | None]]]]:
        """The ks to tabulate, and rows (stratum, what, value at each k)."""
        everything = {k for s in self._view.strata for m in _base_and_latest(s) for k in m.ks}
        ks = [k for k in sorted(everything) if k & (k - 1) == 0 or k == max(everything)]
        rows = []
        for stratum in self._view.strata:
            for m in _base_and_latest(stratum):
                rows.append((stratum.name, m.label, [_at(m.ks, m.pass_at_k.value, k) for k in ks]))
            if (last := stratum.latest) is not None:
                rows.append((stratum.name, "Guessing", [_at(last.ks, last.floor, k) for k in ks]))
                if (reached := _reached(last, len(last.ks))) is not None:
                    guess = f"Reached (guessing: {two(reached.guess)})"
                    rows.append((stratum.name, guess, [_at(last.ks, reached.value, k) for k in ks]))
        return ks, rows

    def training_charts(self, stage: StageView) -> tuple[list[tuple[str, str, Markup]], list[tuple[str, str, Markup]]]:
        """Drawings of the stage's metrics as (name, meaning, drawing): those in sight, and those folded away."""
        order = [*METRICS, *sorted(stage.metrics.keys() - METRICS.keys())]
        shown: list[tuple[str, str, Markup]] = []
        folded: list[tuple[str, str, Markup]] = []
        for name in order:
            if name not in stage.metrics:
                continue
            known = METRICS.get(name)
            label, meaning = (known.label, known.meaning) if known else (short(name, 40), "")
            drawing = charts.training_chart(stage.metrics[name], title=f"{stage.title}: {label}")
            (shown if known is not None and known.shown else folded).append((label, meaning, drawing))
        return shown, folded

    def share_bar(self, sample: Sample) -> Markup:
        parts = [("correct", sample.correct), ("wrong", sample.wrong), ("abstain", sample.abstained)]
        return charts.share_bar(parts, title=self.fate(sample))

    def fate(self, sample: Sample) -> str:
        """How an item's samples came out, in words."""
        counts = [
            (sample.correct, "correct"),
            (sample.wrong, "wrong"),
            (sample.abstained, "without a readable answer"),
        ]
        said = ", ".join(f"{count} {what}" for count, what in counts if count)
        return f"{sample.n} samples: {said}" if said else "no samples"

    # -- checks ----------------------------------------------------------------------------------------------

    def statistics(self) -> set[str]:
        """What the gate reads in this run; "reached" where nothing is measured yet."""
        return {m.statistic for stratum in self._view.strata if (m := stratum.latest)} or {"reached"}

    def support_words(self) -> str:
        """What S and F are in this run's support above the floor."""
        words = {
            "reached": "the share of questions reached and F the share f that guessing reaches",
            "pass": "Pass@k and F its guessing floor, at a k where guessing still misses enough questions",
        }
        return "; or ".join(text for statistic, text in words.items() if statistic in self.statistics())

    def change_rows(self) -> int:
        return sum(len(stage.changes) for stage in self._view.stages)

    def findings(self) -> Findings:
        return findings(self._view.strata)

    def readings(self, checks: Sequence[CheckView]) -> str:
        """The readings that change not one number, as one name: "Strict and lenient reading"."""
        same = [check.name for check in checks if check.reads and check.same]
        return f"{' and '.join(same).capitalize()} reading" if same else ""

    def apart(self, checks: Sequence[CheckView]) -> list[CheckView]:
        """The checks that `readings` leaves, each a row of its own."""
        return [check for check in checks if not (check.reads and check.same)]

    # -- words -----------------------------------------------------------------------------------------------

    def rows(self, stratum: StratumView) -> list[Measurement]:
        return _base_and_latest(stratum)

    def k_range(self, measurement: Measurement) -> str:
        low, high = measurement.n_min, measurement.n_max
        return f"{low}" if low == high else f"{low} to {high}"

    @property
    def compared(self) -> bool:
        """Whether any stratum was measured again, on a model that stands."""
        return any(stratum.latest is not stratum.base for stratum in self._view.strata)

    def tally(self) -> str:
        """How many strata stand where, for a header with too many strata to name: "31 done, 12 bridge"."""
        kinds = [stratum.verdict or "not measured" for stratum in self._view.strata]
        names = ["done", "sharpen", "bridge", "undecided"]
        order = [*names, *sorted(set(kinds) - set(names))]
        return ", ".join(f"{kinds.count(kind)} {kind}" for kind in order if kind in kinds)

    def timeline(self) -> list[StageView]:
        return [stage for stage in self._view.stages if stage.kind not in ("evaluate", "control", "route")]

    def training(self) -> list[StageView]:
        return [stage for stage in self._view.stages if stage.trains]

    def pictures(self, paths: Sequence[str]) -> list[Picture]:
        return [self._embedder.embed(path) for path in paths[:4]]

    def pieces(self, text: str, span: tuple[int, int] | None) -> list[Piece]:
        return excerpt(text, span, _COMPLETION_CHARACTERS)

    def folded(self, text: str, span: tuple[int, int] | None) -> list[Piece]:
        """More of a completion of which not all is shown."""
        whole = all(piece.kind != "gap" for piece in self.pieces(text, span))
        return [] if whole else excerpt(text, span, self._folded)

    def letter(self, position: int) -> str:
        return f"{chr(ord('A') + position)})" if self._view.letters and position < 26 else ""

    def configuration(self) -> str:
        if self._view.config is None:
            return ""
        text = yaml.safe_dump(self._view.config, sort_keys=False, allow_unicode=True, width=100)
        if len(text) > _CONFIG_CHARACTERS:
            return f"{text[:_CONFIG_CHARACTERS]}\n… {len(text) - _CONFIG_CHARACTERS:,} characters left out"
        return text


def interval(value: Estimate | None) -> str:
    """The interval in words, "0.12 to 0.34"; empty where there is none."""
    if value is None or value.low is None or value.high is None:
        return ""
    return f"{two(value.low)} to {two(value.high)}"


def _base_and_latest(stratum: StratumView) -> list[Measurement]:
    base, latest = stratum.base, stratum.latest
    if base is None or latest is None:
        return []
    return [base] if latest is base else [base, latest]


def _reached(measurement: Measurement, size: int) -> Reached | None:
    """The share that the gate reads, where it isn't Pass@k itself, as it is on open questions only."""
    share, guess = measurement.reached_share, measurement.chance
    if share is None or not guess:
        return None
    return Reached(_padded(share.value, size), _padded(share.low, size), _padded(share.high, size), guess)


def _floor_quarter(value: float) -> float:
    return -((-value * 4 + 0.999999) // 1) / 4 if value < 0 else 0.0


def _padded(values: Sequence[float | None], size: int) -> list[float | None]:
    return [*values, *[None] * (size - len(values))]


def _at(ks: Sequence[int], values: Sequence[float | None], k: int) -> float | None:
    return values[ks.index(k)] if k in ks else None

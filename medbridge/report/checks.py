"""From stored verdicts and stage summaries to what the report says of their checks, changes and outlook.

The records may be of any run, so whatever isn't there is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from medbridge.report.records import dig, estimate, mapping, number, text, whole
from medbridge.report.view import ChangeView, CheckView, Estimate, More, Outlook, StratumView

_CHECKS = ("strict", "lenient", "blank", "shuffled")


@dataclass(frozen=True, slots=True)
class Findings:
    """Strata of which a check says something: whose verdict changes with the reading of the answers, or on other
    images, and those that show no visual support. The last is None where no control was run.
    """

    reading: list[str]
    images: list[str]
    unseen: list[str] | None


def findings(strata: Iterable[StratumView]) -> Findings:
    """Of the latest diagnosis of each stratum."""
    latest = [(stratum.name, m) for stratum in strata if (m := stratum.latest) is not None]
    seen = {name: m.visual_support for name, m in latest if m.visual_support is not None}
    return Findings(
        reading=[name for name, m in latest if any(check.changed and check.reads for check in m.checks)],
        images=[name for name, m in latest if any(check.changed and not check.reads for check in m.checks)],
        unseen=[name for name, shown in seen.items() if not shown] if seen else None,
    )


def checks(verdict: Mapping[str, Any], kind: str, support: Mapping[str, Any]) -> list[CheckView]:
    """How a stratum that was judged `kind` came out under other readings and on other images."""
    measured = _numbers(support)
    found = []
    for name in _CHECKS:
        record = dig(verdict, "checks", name)
        if not isinstance(record, dict):
            continue
        own, other = _numbers(record), text(record.get("kind"))
        # A check is judged at one look, which may say less than all looks did: the same numbers change nothing, and
        # neither does doubt that fewer items leave.
        doubt = other == "undecided" and own[0] < measured[0]
        found.append(
            CheckView(
                name=name,
                kind=other,
                items=own[0],
                support=own[1],
                acc_at_1=own[2],
                visual=estimate(dig(record, "visual", "support")),
                same=own == measured,
                changed=other not in (None, kind) and own != measured and not doubt,
            )
        )
    return found


def _numbers(record: Mapping[str, Any]) -> tuple[int, Estimate | None, Estimate | None]:
    return whole(record.get("items")) or 0, estimate(record.get("support")), estimate(record.get("acc_at_1"))


def more(verdict: Mapping[str, Any]) -> More | None:
    """What would decide an undecided stratum."""
    record = verdict.get("more")
    if not isinstance(record, dict):
        return None
    return More(
        items=whole(record.get("items")),
        samples=whole(record.get("samples")),
        capped=record.get("capped") is True,
        bottleneck=text(record.get("bottleneck")),
    )


def outlook(support: Mapping[str, Any]) -> Outlook | None:
    """Cover, sampling efficiency, and the forecasts."""
    record = support.get("outlook")
    if not isinstance(record, dict):
        return None
    predicted = _pairs(dig(record, "predicted", "ks"), dig(record, "predicted", "pass_at_k"))
    return Outlook(
        cover=estimate(record.get("cover")),
        efficiency=number(support.get("efficiency")),
        gap=estimate(support.get("gap")),
        k90=whole(support.get("k90")),
        reliable_k=whole(record.get("reliable_k")) or 0,
        predicted=[  # the first is at the samples drawn
            (k, share) for at, p in predicted[1:] if (k := whole(at)) is not None and (share := number(p)) is not None
        ],
        forecast=estimate(record.get("forecast")),
    )


def changes(summary: Mapping[str, Any]) -> list[ChangeView]:
    """What changed since the diagnosis before, stratum by stratum, with the forecast that was made then."""
    lost = mapping(summary.get("lost"))
    found = []
    for name, record in mapping(summary.get("changes")).items():
        if not isinstance(record, dict):
            continue
        forecast = dig(summary, "forecasts", name)
        shifts = _pairs(record.get("ks"), record.get("pass_at_k"))
        k, shift = shifts[-1] if shifts else (None, None)
        found.append(
            ChangeView(
                stratum=name,
                items=whole(record.get("items")) or 0,
                support=estimate(record.get("support")),
                pass_at_k=estimate(shift),
                k=whole(k),
                acc_at_1=estimate(record.get("acc_at_1")),
                gained=_length(record.get("gained")),
                lost=_length(record.get("lost")),
                alarm=name in lost,
                forecast=estimate(dig(forecast, "forecast")),
                came_out=estimate(dig(forecast, "acc_at_1")),
            )
        )
    return found


def losses(summary: Mapping[str, Any]) -> list[str]:
    """Which support fell so that the training before was taken back, in the diagnosis's words, by stratum."""
    return [str(words) for words in mapping(summary.get("lost")).values()]


def _pairs(first: Any, second: Any) -> list[tuple[Any, Any]]:
    return list(zip(first, second, strict=False)) if isinstance(first, list) and isinstance(second, list) else []


def _length(values: Any) -> int:
    return len(values) if isinstance(values, Sequence) and not isinstance(values, str) else 0

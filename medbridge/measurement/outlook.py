"""What a measurement lets one expect: Pass@k beyond the samples drawn, and Acc@1 after sharpening."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from medbridge.config import RunSettings
from medbridge.ledger import VerdictRow
from medbridge.support import Tally
from medbridge.support.forecast import forecast_accuracy
from medbridge.support.spectra import cover_interval, spectrum

_TOLERANCE = 0.1
"""Error of a predicted Pass@k from which on it is not shown."""


def outlook(tallies: Sequence[Tally], settings: RunSettings) -> dict[str, Any] | None:
    """Of one stratum; None without samples.

    Returns:
        "cover": share of the items above their floor by a margin, with its interval; "reliable_k": up to which k Pass@k
        can be told from these samples within 0.1, whatever the truth; "predicted": Pass@k at "ks" doubling from the
        samples to there; "forecast": of Acc@1 after sharpening, as `Forecast.to_dict`.
    """
    sampled = [tally for tally in tallies if tally.n > 0]
    if not sampled:
        return None
    n = np.array([tally.n for tally in sampled])
    c = np.array([tally.c for tally in sampled])
    floors = np.array([tally.floor for tally in sampled])
    fit = spectrum(n, c, floors)
    reliable = fit.reliable_k(tolerance=_TOLERANCE)
    ks = [int(n.min())]
    while 2 * ks[-1] <= reliable:
        ks.append(2 * ks[-1])
    cover = cover_interval(
        n, c, floors, fit, clusters=[tally.cluster for tally in sampled], alpha=settings.gate.alpha, seed=settings.seed
    )
    forecast = forecast_accuracy(sampled, alpha=settings.gate.alpha, seed=settings.seed)
    return {
        "cover": {name: float(getattr(cover, name)[0]) for name in ("value", "low", "high")},
        "reliable_k": reliable,
        "predicted": {"ks": ks, "pass_at_k": fit.pass_at_k(ks).tolist()},
        "forecast": forecast.to_dict(),
    }


def came_out(
    before: Mapping[str, VerdictRow], after: Iterable[VerdictRow], sharpened: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """By stratum, what was forecast of Acc@1 before sharpening it, what came out, and whether their intervals meet."""
    found = {}
    for row in after:
        old = before.get(row.stratum)
        forecast = old and (old.support.get("outlook") or {}).get("forecast")
        accuracy = row.support.get("acc_at_1")
        if row.stratum in sharpened and forecast and accuracy:
            inside = forecast["low"] <= accuracy["high"] and accuracy["low"] <= forecast["high"]
            found[row.stratum] = {"forecast": forecast, "acc_at_1": accuracy, "inside": inside}
    return found

"""What would decide an undecided stratum: more items, or more samples of the same items. It decides nothing itself.

The variance of support is that between items and, smaller the more samples an item has, that within items:
``(between + within n / n') / items'``. More items shrink both parts, more samples only the second.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

from medbridge.support.estimate import SupportEstimate
from medbridge.support.settings import GateSettings

_MOST = 20
"""A forecast is cut at this many times what was measured: the truth is too near then."""


def what_would_decide(estimate: SupportEstimate, settings: GateSettings, level: float) -> dict[str, Any]:
    """How many more items, or samples per item, would move the near end of the interval past the threshold.

    It assumes that the estimate stays where it is, so it is enough in about half of the cases. That the variance
    within an item falls at least as fast as 1 / n at a given k holds for every U-statistic (Hoeffding 1948).

    Args:
        estimate: of an undecided stratum, with support.
        settings: of the gate.
        level: error probability that a verdict on this stratum may have; below alpha with many strata.

    Returns:
        items: further items of the same kind, with as many samples each.
        samples: further samples of each item; None where no number of samples would do.
        capped: whether `items` is a lower limit, since the estimate is too near to the threshold.
        bottleneck: "items" or "samples", whichever takes fewer further rollouts.
    """
    if estimate.support is None:
        raise ValueError("estimate has no support: there is nothing to decide")
    if level * (settings.replicates + 1) < 1:
        raise ValueError(f"level = {level:g} is below what {settings.replicates} replicates can tell")
    support, threshold = estimate.support, settings.support_threshold
    distance = abs(support.value - threshold)
    width = support.value - support.low if support.value > threshold else support.high - support.value
    normal = NormalDist()
    width *= normal.inv_cdf(1 - level) / normal.inv_cdf(1 - settings.alpha)
    # The share of the variance that may stay.
    share = min(1.0, (distance / width) ** 2) if width > 0 else 1.0
    most = (_MOST - 1) * estimate.items
    capped = share * _MOST < 1
    items = most if capped else max(1, math.ceil(estimate.items * (1 / share - 1)))
    samples = _more_samples(estimate, share)
    per_item = estimate.samples / estimate.items + estimate.greedy_items / estimate.items
    cheaper = samples is not None and (capped or samples * estimate.items < items * per_item)
    return {"items": items, "samples": samples, "capped": capped, "bottleneck": "samples" if cheaper else "items"}


def _more_samples(estimate: SupportEstimate, share: float) -> int | None:
    between = estimate.between_share
    if math.isnan(between) or between >= share:
        return None
    per_item = estimate.samples / estimate.items
    times = (1 - between) / (share - between)
    return max(1, math.ceil(per_item * (times - 1))) if times <= _MOST else None

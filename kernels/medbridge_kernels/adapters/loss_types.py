"""TRL's and Liger's names of losses, which are the same, as `LossConfig`."""

from __future__ import annotations

from typing import Any

from medbridge_kernels.config import LossConfig, Normalize, Surrogate

LOSS_TYPES: dict[str, tuple[Surrogate, Normalize]] = {
    "grpo": ("clip", "sequences"),
    "bnpo": ("clip", "tokens"),
    "dr_grpo": ("clip", "constant"),
    "dapo": ("clip", "tokens"),
    "cispo": ("cispo", "tokens"),
    "sapo": ("sapo", "sequences"),
}
"""What each `loss_type` is made of."""


def typed_config(
    loss_type: str,
    *,
    epsilon_low: float,
    epsilon_high: float,
    delta: float | None,
    sapo_temperature_pos: float,
    sapo_temperature_neg: float,
    **options: Any,
) -> LossConfig:
    """A loss by its type, and by options under the names that TRL and Liger give them.

    CISPO's upper limit of the ratio is epsilon_high itself, that of the others 1 + epsilon_high; it has no lower one.

    Args:
        options: further fields of `LossConfig`.

    Raises:
        ValueError: a type that there isn't here; a `delta` that wouldn't act; what `LossConfig` refuses.
    """
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type = {loss_type!r} isn't possible with this loss: use one of {', '.join(LOSS_TYPES)}")
    surrogate, normalize = LOSS_TYPES[loss_type]
    if delta is not None and surrogate != "clip":
        raise ValueError(f"delta = {delta}: loss_type {loss_type!r} doesn't read it, set it to None")
    if delta is not None and not delta > 1 + epsilon_high:
        raise ValueError(f"delta = {delta}, must be above 1 + epsilon_high = {1 + epsilon_high}, or None")
    clips: dict[str, Any] = {"clip_low": min(epsilon_low, 1.0), "clip_high": epsilon_high}
    if surrogate == "cispo":
        clips = {"clip_low": 1.0, "clip_high": epsilon_high - 1}
    if surrogate == "sapo":
        clips["sapo_temperature_positive"] = sapo_temperature_pos
        clips["sapo_temperature_negative"] = sapo_temperature_neg
    return LossConfig(surrogate=surrogate, normalize=normalize, delta=delta, **clips, **options)

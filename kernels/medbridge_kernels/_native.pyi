"""Types of the C++ extension; its documentation stands in native.py."""

from typing import Any

from numpy.typing import NDArray

Array = NDArray[Any]

def sweep(
    logits: Array,
    dtype: str,
    token_ids: Array,
    keep: Array | None,
    temperature: float,
    temperatures: Array | None,
    logprobs: Array,
    entropy: Array | None,
    lse: Array,
) -> None: ...
def sweep_backward(
    logits: Array,
    dtype: str,
    token_ids: Array,
    keep: Array | None,
    temperature: float,
    temperatures: Array | None,
    lse: Array,
    entropy: Array | None,
    by_logprob: Array,
    by_entropy: Array | None,
    out: Array,
) -> None: ...
def group_advantages(
    rewards: Array, group_offsets: Array, baseline: str, scale: str, unbiased: bool, eps: float, out: Array
) -> None: ...
def instruction_set() -> str: ...

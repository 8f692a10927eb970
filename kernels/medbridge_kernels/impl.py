"""The back ends by name, and which of them this version has."""

from __future__ import annotations

from typing import Literal, get_args

Impl = Literal["auto", "triton", "native", "reference"]


def choose(impl: Impl) -> Literal["reference"]:
    """The back end to use for `impl`.

    Raises:
        NotImplementedError: a back end that this version doesn't have.
        ValueError: no back end's name.
    """
    if impl in ("auto", "reference"):
        return "reference"
    if impl in get_args(Impl):
        raise NotImplementedError(f"impl={impl!r} isn't available in this version: use impl='auto' or impl='reference'")
    raise ValueError(f"impl = {impl!r}, must be one of {', '.join(get_args(Impl))}")

"""Text from data and models made fit to show: nothing that breaks an encoding, a terminal or reading order.

Escaping for HTML is the template engine's work, not this file's.
"""

from __future__ import annotations

_REPLACEMENT = "\ufffd"

_UNFIT = (
    *range(0x20),
    *range(0x7F, 0xA0),
    # Embeddings, overrides and isolates of writing direction: `<bdi>` alone is no help, since a closing control
    # in the text closes the isolate that the browser opened. The letters' own directions stay.
    *range(0x202A, 0x202F),
    *range(0x2066, 0x206A),
    *range(0xD800, 0xE000),  # lone surrogates, which no encoding takes
    0xFFFE,
    0xFFFF,
)

_TABLE = dict.fromkeys(_UNFIT, _REPLACEMENT) | {ord("\t"): "\t", ord("\n"): "\n", ord("\r"): "\n"}


def clean(text: str) -> str:
    """The text with control characters and lone surrogates replaced, one for one, so that offsets stay."""
    return text.translate(_TABLE)

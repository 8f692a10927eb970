"""Text from data and models made fit to show: nothing that breaks an encoding, a terminal or reading order.

Escaping for HTML is the template engine's work, not this file's.
"""

from __future__ import annotations

_ALLOWED = "\t\n"
_REPLACEMENT = "\ufffd"

_UNFIT = (*range(0x20), *range(0x7F, 0xA0), *range(0xD800, 0xE000), 0xFFFE, 0xFFFF)
"""Control characters, lone surrogates, and the two non-characters that XML forbids."""

_CONTROLS = {code: _REPLACEMENT for code in _UNFIT if chr(code) not in _ALLOWED} | {ord("\r"): "\n"}

_BIDI = dict.fromkeys((0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)))
"""Characters that turn the direction of what follows them, mapped to nothing."""


def clean(text: str, *, bidi: bool = True) -> str:
    """The text with lone surrogates and control characters replaced, one for one, so that offsets stay.

    Args:
        text: any string.
        bidi: keep characters that change the writing direction. HTML isolates them; attributes, drawings and
            terminals can't: they want False, which drops these characters.
    """
    text = text.translate(_CONTROLS)
    return text if bidi else text.translate(_BIDI)

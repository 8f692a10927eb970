"""Texts in the form in which they are compared."""

from __future__ import annotations

import unicodedata


def normalise(text: str) -> str:
    """The form in which texts are compared: Unicode NFKC, case folded, punctuation and extra space dropped.

    A sign, a decimal point and a per cent mark are kept where they belong to a number: -1.5 is not 15.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    folded = folded.translate(_DASHES)
    kept = []
    for index, character in enumerate(folded):
        kind = unicodedata.category(character)
        if kind == "Cf":
            continue
        if kind[0] == "P" and not _belongs_to_number(folded, index):
            kept.append(" ")
        else:
            kept.append(character)
    return " ".join("".join(kept).split())


_DASHES = {ord(dash): "-" for dash in "\u2010\u2011\u2012\u2013\u2014\u2212"}


def _belongs_to_number(text: str, index: int) -> bool:
    character = text[index]
    before = text[index - 1] if index else " "
    after = text[index + 1] if index + 1 < len(text) else " "
    if character == ".":
        return after.isdigit() and not before.isalpha()
    if character == "%":
        return before.isdigit()
    return character == "-" and after.isdigit() and not before.isalnum()

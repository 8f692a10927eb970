"""What a completion answered and where that was read. Without evidence the reader abstains, it never guesses.

Evidence is the last answer tag, or an explicit statement ("the answer is B") outside the reasoning; a letter
or an option's text anywhere else is not evidence. Every pattern here has bounded repeats, so that reading
takes time linear in the completion's length whatever a model writes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from medbridge.data.items import Item, Permutation
from medbridge.data.open_answers import equal_quantities, is_quantity, token_f1
from medbridge.data.prompts import LETTERS, PromptSettings, check_permutation
from medbridge.data.text import normalise
from medbridge.errors import MedbridgeError

Status = Literal["correct", "wrong", "abstain"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was read from one completion.

    `option` is the canonical index that was read (None for an open question), `answer` the text that was
    read, `span` its character offsets [start, end) in the completion; all three are None on "abstain".
    `well_formed`: the completion is an optional <think>...</think>, then one <answer>...</answer> that is not
    blank, and nothing else.
    """

    status: Status
    option: int | None
    answer: str | None
    span: tuple[int, int] | None
    well_formed: bool


@dataclass(frozen=True, slots=True)
class Reading:
    """An answer found in a text: displayed position (None for an open answer) and span [start, end)."""

    position: int | None
    start: int
    end: int

    def shifted(self, offset: int) -> Reading:
        return Reading(self.position, self.start + offset, self.end + offset)


def grade(item: Item, permutation: Permutation, completion: str, settings: PromptSettings) -> Outcome:
    """Read `completion`, which answered `item` with its options in the order `permutation`, and compare.

    An open answer is right if it equals the right one after `normalise`, or is the same quantity, or shares enough
    words with it, as far as the settings allow that.

    Raises MedbridgeError if `permutation` does not order the item's options.
    """
    check_permutation(item, permutation)
    formed = is_well_formed(completion)
    if item.options is None:
        found = read_open(completion, yes_no=_fold(item.answer) in _YES_NO)
    else:
        shown = [item.options[index] for index in permutation]
        found = read_option(completion, shown, settings.answer_style)
    if found is None:
        return Outcome("abstain", None, None, None, formed)
    span = (found.start, found.end)
    text = completion[found.start : found.end]
    if found.position is None:
        right = _same(text, item.answer, settings)
        return Outcome("correct" if right else "wrong", None, text, span, formed)
    option = permutation[found.position]
    return Outcome("correct" if option == item.answer_index else "wrong", option, text, span, formed)


def read_option(completion: str, shown: Sequence[str], style: Literal["letter", "text"] = "letter") -> Reading | None:
    """The option that a completion chose among the texts `shown` (in displayed order), or None to abstain.

    Style "letter" reads a letter, or else the full text of one option; style "text" the text, or else an
    explicit letter. A letter beside the text of another option is a contradiction, and no answer.
    """
    part = _answer_part(completion)
    if part is None:
        return None
    if style == "letter":
        found = _letter(part, shown) or _option_text(part, shown)
    else:
        found = _option_text(part, shown) or _bare_yes_no(part, shown) or _letter(part, shown)
    return found and found.shifted(part.start)


def read_open(completion: str, *, yes_no: bool = False) -> Reading | None:
    """The free answer of a completion, or None to abstain. `yes_no`: one of these words is wanted."""
    part = _answer_part(completion)
    if part is None:
        return None
    reader = _stripped if part.tagged else _statement
    found = _yes_no(part.text) if yes_no else reader(part.text)
    return found and found.shifted(part.start)


def read_letter(completion: str, options: int) -> str | None:
    """The capital letter that a completion chose among the first `options` letters, or None to abstain.

    For texts whose options are not known; `read_option` also sees when letter and text contradict each other.
    Raises MedbridgeError unless `options` is 1 to 26.
    """
    if not 1 <= options <= len(LETTERS):
        raise MedbridgeError(f"{options} options cannot be lettered; give 1 to {len(LETTERS)}.")
    part = _answer_part(completion)
    found = part and _letter(part, [""] * options)
    return None if not found or found.position is None else LETTERS[found.position]


def read_yes_no(text: str) -> Literal["yes", "no"] | None:
    """Whether a text says yes or no, in a whole word at its beginning or in a statement; None otherwise."""
    found = _yes_no(text)
    if found is None:
        return None
    return "yes" if _fold(text[found.start : found.end]) == "yes" else "no"


def is_well_formed(completion: str) -> bool:
    """Whether a text is an optional <think>...</think> and one non-blank <answer>...</answer>, no more."""
    pieces = _STRICT_TAG.split(completion)
    texts, tags = [text.strip() for text in pieces[0::2]], pieces[1::2]
    if tags[:2] == ["<think>", "</think>"] and not texts[0]:
        texts, tags = texts[2:], tags[2:]
    return tags == ["<answer>", "</answer>"] and not texts[0] and bool(texts[1]) and not texts[2]


# -- where the answer stands ---------------------------------------------------------------------------------

_STRICT_TAG = re.compile(r"(</?(?:think|answer)>)")
_THINK = re.compile(r"<(/?)think>", re.IGNORECASE)
_ANSWER = re.compile(r"<(/?)answer>", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class _Part:
    """The text in which to look for the answer, where it starts, and whether an answer tag encloses it."""

    text: str
    start: int
    tagged: bool


def _answer_part(completion: str) -> _Part | None:
    """What the last answer tag encloses, or without tags all but the reasoning; None if either is cut off."""
    spoken, cut_off = _blank_reasoning(completion)
    tags = list(_ANSWER.finditer(spoken))
    opening = max((index for index, tag in enumerate(tags) if not tag.group(1)), default=None)
    if opening is not None:
        if opening + 1 == len(tags):
            return None
        start = tags[opening].end()
        return _Part(spoken[start : tags[opening + 1].start()], start, True)
    return None if cut_off else _Part(spoken, 0, False)


def _blank_reasoning(completion: str) -> tuple[str, bool]:
    """The completion with its ended reasoning as spaces (offsets stay), and whether a reasoning was cut off.

    A </think> without its opening, which many chat templates put into the prompt, ends a reasoning that began
    with the completion.
    """
    pieces: list[str] = []
    done = 0  # up to where `pieces` reaches
    opened: int | None = None
    for tag in _THINK.finditer(completion):
        if not tag.group(1):
            opened = tag.start() if opened is None else opened
            continue
        begin = done if opened is None else opened
        if opened is None:
            pieces, begin = [], 0
        else:
            pieces.append(completion[done:begin])
        pieces.append(" " * (tag.end() - begin))
        done, opened = tag.end(), None
    return "".join(pieces) + completion[done:], opened is not None


def _stripped(text: str) -> Reading | None:
    """All of a text but the surrounding whitespace; None for a blank one."""
    bare = text.strip()
    start = text.find(bare) if bare else 0
    return Reading(None, start, start + len(bare)) if bare else None


_STATEMENT = re.compile(
    r"\b(?:answer|choice|option)(?:\s{1,4}(?:choice|option))?(?:\s{1,4}to\s{1,4}(?:this|the)\s{1,4}question)?"
    r"\s{0,4}(?:\bis\b|\bwould\s{1,4}be\b|[:=])\s{0,4}:?[\s*_\"'`]{0,8}",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[.!?;](?=\s|$)|\n|[*_\"'`]{2}|,?\s(?:because|since)\b|$")
_LONGEST_STATEMENT = 400
"""Characters searched for a statement's end: unbounded, many statements on a line take quadratic time."""


def _statement(text: str) -> Reading | None:
    """What the last "answer is ..." of a text names, up to its sentence's end. A question states nothing."""
    for match in reversed(list(_STATEMENT.finditer(text))):
        ending = _SENTENCE_END.search(text, match.end(), match.end() + _LONGEST_STATEMENT)
        stop = len(text) if ending is None else ending.start()
        part = text[match.end() : stop].rstrip(" \t*_\"'`.,;")
        if part and text[stop : stop + 1] != "?":
            return Reading(None, match.end(), match.end() + len(part))
    return None


# -- letters -------------------------------------------------------------------------------------------------

_ONLY_LETTER = re.compile(
    r"\W{0,8}(?:(?:the\s{1,4})?(?:correct\s{1,4}|final\s{1,4})?(?:option|choice|answer|letter)\s{0,4}(?:is\b)?"
    r"\s{0,4}:?\s{0,4}){0,2}[\s*_\"'`(\[{]{0,8}([A-Za-z])[\s*_\"'`)\]}.,:;!]{0,12}",
    re.IGNORECASE,
)
_LETTER_BESIDE_TEXT = re.compile(r"\W{0,8}(?:(?:option|choice)\s{1,4})?([A-Za-z])\W{1,8}", re.IGNORECASE)
_LEADING_LETTER = re.compile(r"[\s*_\"'`]{0,8}[(\[]?([A-Za-z])[*_]{0,2}(?:[)\]]|[.:](?=\s))")
_MARKED_LETTER = re.compile(r"[(\[]([A-Z])[)\]]|\b(?:[Oo]ption|[Cc]hoice|[Ll]etter)\s{1,4}[(\[]?([A-Z])\b(?!['\u2019])")
# After "answer is" a bare capital is explicit, but "A" and "I" are also words: they need an end or a reason
# behind.
_STATED_LETTER = re.compile(
    r"(?:(?:option|choice|letter)\s{1,4})?(?:[(\[]\s?([A-Za-z])\s?[)\]]"
    r"|([B-HJ-Z])(?![\w'\u2019-])|([AI])(?![\w'\u2019-])(?=[\s*_\"'`]{0,8}(?:$|[^\w\s]|because\b|since\b|as\b|or\b|and\b)))",
)
_ANOTHER = re.compile(r"[\s*_\"'`)\]]{0,8}(?:,|/|&|\bor\b|\band\b|\bor else\b)\s{0,4}[(\[]?([A-Z])(?![\w'\u2019-])")


def _letter(part: _Part, shown: Sequence[str]) -> Reading | None:
    """The one displayed option that a text names by its letter."""
    text = part.text
    spans = _letters_in_tag(text, shown) if part.tagged else _stated_letter(text)
    letters = {text[start:end].upper() for start, end in spans}
    if len(letters) != 1:
        return None
    position = LETTERS.find(letters.pop())  # not there: a letter of another script that folds to one of ours
    if not 0 <= position < len(shown):
        return None
    start, end = spans[-1]
    stated = _statement(text)
    stop = stated.end if stated is not None and not part.tagged else len(text)
    named = {_match(text[end:stop], shown), _match(text[:start], shown) if part.tagged else None}
    named |= {_opens(text, end, stop, shown), *_repeated(text, end, stop, shown)}
    return Reading(position, start, end) if named <= {position, None} else None


_ENTRY = re.compile(r"(?<![\w'\u2019])[(\[]?([A-Z])[*_]{0,2}[)\].:]\s")


def _repeated(text: str, start: int, stop: int, shown: Sequence[str]) -> Iterator[int]:
    """Displayed options that stand in text[start:stop] with their letters: several are a list, and no choice."""
    for match in _ENTRY.finditer(text, start, stop):
        position = LETTERS.find(match.group(1))
        if position == _opens(text, match.end(), stop, shown):
            yield position


def _opens(text: str, start: int, stop: int, shown: Sequence[str]) -> int | None:
    """The option whose full text text[start:stop] begins with; the longest of several."""
    options = [normalise(option) for option in shown]
    reach = 2 * max(map(len, options), default=0) + 16  # what is dropped between words needs some room
    words = f"{normalise(text[start : min(stop, start + reach)])} "
    found = [position for position, option in enumerate(options) if option and words.startswith(f"{option} ")]
    longest = max(found, key=lambda position: len(options[position]), default=None)
    return None if longest is None or options.count(options[longest]) > 1 else longest


def _letters_in_tag(text: str, shown: Sequence[str]) -> list[tuple[int, int]]:
    """Spans of every letter that a tag's content marks as a choice."""
    whole = _ONLY_LETTER.fullmatch(text)
    if whole:
        return [whole.span(1)]
    beside = _LETTER_BESIDE_TEXT.match(text)
    if beside and LETTERS.find(beside.group(1).upper()) == _match(text[beside.end() :], shown):
        return [beside.span(1)]
    spans = []
    leading = _LEADING_LETTER.match(text)
    if leading:
        spans.append(leading.span(1))
        another = _ANOTHER.match(text, leading.end())
        if another:
            spans.append(another.span(1))
    spans.extend(match.span(match.lastindex or 0) for match in _MARKED_LETTER.finditer(text))
    return spans or _stated_letter(text)


def _stated_letter(text: str) -> list[tuple[int, int]]:
    """Span of the letter in the last "answer is X" of a text; two spans where that names two letters."""
    for statement in reversed(list(_STATEMENT.finditer(text))):
        match = _STATED_LETTER.match(text, statement.end())
        if match is None or text[match.end() : match.end() + 12].lstrip(" *_\"'`)").startswith("?"):
            continue
        another = _ANOTHER.match(text, match.end())
        return [match.span(match.lastindex or 0), *([another.span(1)] if another else [])]
    return []


# -- texts ---------------------------------------------------------------------------------------------------

_YES_NO = ("yes", "no")
_LEADING_YES_NO = re.compile(
    r"[\s*_\"'`(\[]{0,8}(?:(yes)\b|(no)\b(?=[\s*_\"'`)\]]{0,8}(?:$|[.,;:!\n\u2013\u2014-]|there\b|it\b|this\b|the\b)))",
    re.IGNORECASE,
)
_OPPOSITE = re.compile(
    r"[\s*_\"'`)\].,;:!?/]{0,8}(?:(?:or|and|but)\s{1,4})?(yes|no)\b(?=\W{0,8}$|\s{0,4}[.,;:!?])",
    re.IGNORECASE,
)


def _fold(text: str) -> str:
    return text.strip().casefold()


def _yes_no(text: str) -> Reading | None:
    """A yes or no in the last "answer is" of a text, or else at its beginning; None where both are said."""
    stated = _statement(text)
    starts = [len(text) - len(text.lstrip())]
    if stated is not None:
        starts.insert(0, stated.start)
    for start in starts:
        match = _LEADING_YES_NO.match(text, start)
        if match is None:
            continue
        begin, end = match.span(match.lastindex or 0)
        opposite = _OPPOSITE.match(text, end)
        if opposite and _fold(opposite.group(1)) != _fold(text[begin:end]):
            return None
        return Reading(None, begin, end)
    return None


def _bare_yes_no(part: _Part, shown: Sequence[str]) -> Reading | None:
    """For the options yes and no: the one that a text says in a whole word."""
    options = [_fold(option) for option in shown]
    found = _yes_no(part.text) if sorted(options) == sorted(_YES_NO) else None
    if found is None:
        return None
    position = options.index(_fold(part.text[found.start : found.end]))
    spans = _letters_in_tag(part.text, shown) if part.tagged else _stated_letter(part.text)
    letters = {part.text[start:end].upper() for start, end in spans}
    # "Yes (B)" where B is no says neither.
    return Reading(position, found.start, found.end) if letters <= {LETTERS[position]} else None


def _option_text(part: _Part, shown: Sequence[str]) -> Reading | None:
    """The one displayed option that a text names by its full text."""
    for place in (_stripped(part.text) if part.tagged else None, _statement(part.text)):
        position = None if place is None else _match(part.text[place.start : place.end], shown)
        if place is not None and position is not None:
            return Reading(position, place.start, place.end)
    return _bare_yes_no(part, shown) if part.tagged else None


def _same(text: str, right: str, settings: PromptSettings) -> bool:
    """Whether an open answer means the right one."""
    if _match(text, [right]) is not None:
        return True
    if is_quantity(right):
        return settings.number_tolerance is not None and equal_quantities(text, right, settings.number_tolerance)
    wanted = settings.f1_from
    return wanted is not None and _fold(right) not in _YES_NO and token_f1(text, right) >= wanted


def _match(part: str, shown: Sequence[str]) -> int | None:
    """Position of the option that equals `part`: exactly, or else as the only one after normalisation."""
    part = part.strip()
    if not part:
        return None
    for position, option in enumerate(shown):
        if option.strip() == part:
            return position
    wanted = normalise(part)
    alike = [position for position, option in enumerate(shown) if wanted and normalise(option) == wanted]
    return alike[0] if len(alike) == 1 else None

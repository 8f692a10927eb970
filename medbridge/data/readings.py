"""Three readings of the same completion, to show how far a verdict rests on the form of the answers.

`standard` is what `answers` read, and what everything else counts. `strict` trusts well-formed completions only;
`lenient` takes whatever names one answer. They bracket the standard reading; neither is used for training.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from medbridge.data.answers import Outcome, Reading, read_open
from medbridge.data.items import Item, Permutation
from medbridge.data.open_answers import is_quantity, same_quantity
from medbridge.data.prompts import LETTERS, PromptSettings, check_permutation
from medbridge.data.text import normalise

ReadingName = Literal["strict", "standard", "lenient"]

READINGS: tuple[ReadingName, ...] = ("strict", "standard", "lenient")

Span = tuple[int, int]


def regrade(
    item: Item,
    permutation: Permutation,
    text: str,
    outcome: Outcome,
    settings: PromptSettings,
    reading: ReadingName,
) -> Outcome:
    """The outcome of completion `text` under another reading; `outcome` is that of `answers.grade`.

    - strict: the same where the completion is well formed, else an abstention.
    - standard: the same.
    - lenient, a choice: where the standard reading abstains, the option named by its letter ("option B", "(B)", a line
      that is "B" or begins with "B)") or by its full text. The last answer tag is looked at first, also one that is cut
      off, then what stands outside the reasoning, then the reasoning; the first of them that isn't blank and names an
      option decides, and an answer tag that isn't blank always does. Within it the last line decides if it is an answer
      and no more, else the last sentence that concludes ("the answer is", "therefore", "most likely", ...), else the
      first line, else the one option that is named at all. Two options where one is wanted stay an abstention. A
      mention that is denied ("no effusion", "B is wrong") or asked ("effusion?") doesn't count, nor does a bare
      capital in running text.
    - lenient, an open answer: correct also where the right answer's words stand, whole and in order, in the answer that
      was read (a quantity: where it is the one number there), or where nothing was read in the answer tag, or else in
      the last sentence that concludes, or else in the last sentence. Nothing becomes wrong by it, but for yes and no,
      which can be read either way.

    Raises MedbridgeError if `permutation` does not order the item's options. Takes time linear in the text's length.
    """
    check_permutation(item, permutation)
    if reading == "standard":
        return outcome
    if reading == "strict":
        return outcome if outcome.well_formed else Outcome("abstain", None, None, None, False)
    if outcome.status != "abstain" and (item.options is not None or outcome.status == "correct"):
        return outcome
    option = None
    if item.options is not None:
        found = _choice(text, [item.options[index] for index in permutation], settings.answer_style)
        option = None if found is None or found.position is None else permutation[found.position]
        span = None if found is None else (found.start, found.end)
        right = option == item.answer_index
    elif _fold(item.answer) in _YES_NO:
        span = _open_yes_no(text) if outcome.status == "abstain" else None
        right = span is not None and _fold(text[slice(*span)]) == _fold(item.answer)
    else:
        span, right = _open(item, text, outcome, settings), True
    if span is None:
        return outcome
    return Outcome("correct" if right else "wrong", option, text[slice(*span)], span, outcome.well_formed)


def _choice(text: str, shown: Sequence[str], style: Literal["letter", "text"]) -> Reading | None:
    """The option that a completion names among the texts `shown`, or None to abstain."""
    for area, spans in _areas(text).items():
        part = _only(text, spans)
        if not part.strip():
            continue
        if sorted(map(_fold, shown)) == sorted(_YES_NO) and (said := _said_yes_no(part, area)):
            return Reading([_fold(option) for option in shown].index(_fold(text[slice(*said)])), *said)
        named = _Named(part, shown, lettered=True)
        settled = _settled(named, shown, style)
        if settled or named.mentions or area == "answer":
            return settled
    return None


def _settled(named: _Named, shown: Sequence[str], style: Literal["letter", "text"]) -> Reading | None:
    """The one option on which a text settles."""
    lines = named.lines()

    def alone(index: int, neighbour: int, step: int) -> Reading | None:
        """The answer of a line, unless its neighbour is the next option in order: both belong to a list then."""
        found = _whole_line(named.text, lines[index], shown, style)
        beside = _whole_line(named.text, lines[neighbour], shown, style) if len(lines) > 1 else None
        listed = found and beside and beside.position == (found.position or 0) + step
        return None if listed else found

    if found := alone(-1, -2, -1):
        return found
    concluded = next((mentions for mentions in named.conclusions() if mentions), None)
    if concluded:
        return _only_one(concluded)
    return alone(0, 1, 1) or _only_one(named.mentions)


def _open(item: Item, text: str, outcome: Outcome, settings: PromptSettings) -> Span | None:
    """Where an open answer is right by the lenient reading; `outcome` is not."""
    if outcome.span is not None:
        if settings.number_tolerance is not None and is_quantity(item.answer):
            said = text[slice(*outcome.span)]
            denied = not _DENIED_BEFORE.isdisjoint(normalise(said).split())
            right = same_quantity(said, item.answer, settings.number_tolerance) and not denied
            return outcome.span if right else None
        named = _Named(_only(text, [outcome.span]), [item.answer], lettered=False)
        return _span_of_last(named.mentions)
    part = next((part for spans in _areas(text).values() if (part := _only(text, spans)).strip()), "")
    named = _Named(part, [item.answer], lettered=False)
    concluded = next(named.conclusions(), None)
    return _span_of_last(named.last_sentence() if concluded is None else concluded)


def _open_yes_no(text: str) -> Span | None:
    """Where a completion says yes or no."""
    for area, spans in _areas(text).items():
        part = _only(text, spans)
        said = _said_yes_no(part, area)
        if said or (part.strip() and area == "answer"):
            return said
    return None


def _only_one(mentions: Sequence[Reading]) -> Reading | None:
    return mentions[-1] if len({mention.position for mention in mentions}) == 1 else None


def _span_of_last(mentions: Sequence[Reading]) -> Span | None:
    return (mentions[-1].start, mentions[-1].end) if mentions else None


# -- where to look -------------------------------------------------------------------------------------------

_TAG = re.compile(r"<(/?)(think|answer)>", re.IGNORECASE)


def _areas(text: str) -> dict[str, list[Span]]:
    """Spans of the last answer tag, of what is spoken, and of the reasoning, in this order of authority.

    As in `answers`: a </think> without its opening ends a reasoning that began with the completion, and answer tags
    within a reasoning that ended are part of it. Here a tag that is cut off counts as well.
    """
    kinds: list[str] = []
    spans: list[Span] = []
    kind, start = "spoken", 0
    opened: int | None = None  # the first piece of the reasoning that is going on
    ended = 0  # the pieces before are known to be reasoning
    for tag in _TAG.finditer(text):
        kinds.append(kind)
        spans.append((start, tag.start()))
        start = tag.end()
        closes, name = tag.group(1), tag.group(2).lower()
        outside = "spoken" if opened is None else "thought"
        if name == "answer":
            kind = outside if closes else "answer"
        elif closes:
            first = ended if opened is None else opened
            kinds[first:] = ["thought"] * (len(kinds) - first)
            ended = len(kinds) if opened is None else ended
            kind, opened = "spoken", None
        else:
            opened = len(kinds) if opened is None else opened
            kind = "thought"
    kinds.append(kind)
    spans.append((start, len(text)))
    areas: dict[str, list[Span]] = {"answer": [], "spoken": [], "thought": []}
    for kind, span in zip(kinds, spans, strict=True):
        areas[kind].append(span)
    areas["answer"] = areas["answer"][-1:]
    return areas


def _only(text: str, spans: Iterable[Span]) -> str:
    """The text up to the last of `spans` with all else as blanks and a line break, so that offsets stay."""
    pieces, done = [], 0
    for start, end in spans:
        if start > done:
            pieces.append(" " * (start - done - 1) + "\n")
        pieces.append(text[start:end])
        done = end
    return "".join(pieces)


# -- what is named -------------------------------------------------------------------------------------------

_WORD = re.compile(r"[^\s/,;:!?()\[\]{}*_\"\\&#@]+")
"""Pieces of a text at whose ends `normalise` breaks words."""

_YES_NO = ("yes", "no")
_EDGES = " \t\n*_\"'`.,;:!?()[]{}\u2018\u2019\u201c\u201d"

_LETTER = re.compile(
    r"\b(?i:option|choice|letter)\s{1,4}[(\[*\"'`]{0,4}([A-Z])\b(?!['\u2019-])"
    r"|[(\[]([A-Z])[)\]]|\\boxed\{\s{0,4}(?:\\text\{)?([A-Z])\}"
)
_BRACKETS = 2
"""Group of `_LETTER` for a letter in brackets."""
_LINE_LETTER = re.compile(r"^[ \t>*_#(-]{0,8}([A-Z])[*_]{0,2}([).:])(?![^\s*_])(.{0,200})$", re.MULTILINE)
_NO_CHOICE = re.compile(
    r"\b(?:fig(?:ure)?|panel|image|view|vitamin|hepatitis|influenza|type|group|stage|grade|class|phase|part)s?\.?\s{0,2}$",
    re.IGNORECASE,
)
"""Before a letter in brackets: it names something else then."""

_WHOLE_LINE_LETTER = re.compile(
    r"[\s>*_#\"'`-]{0,8}(?:(?:the\s{1,4})?(?:final\s{1,4}|correct\s{1,4}|best\s{1,4})?(?:answer|option|choice)\s{0,4}"
    r"(?:is\b)?\s{0,4}:?[\s*_]{0,6}){0,2}[*_\"'`(\[]{0,4}([A-Za-z])[*_\"'`)\].:!]{0,6}\s{0,4}",
    re.IGNORECASE,
)
_LONGEST_LINE = 200
"""Characters of a line that may be an answer and no more."""

_SENTENCE_END = re.compile(r"[.!?;](?=[\s*_\"')\]]|$)|\n")
_CONCLUSION = re.compile(
    r"\b(?:(?:answer|choice|option|diagnosis|conclusion)(?:\s{1,4}(?:choice|option|here))?\s{0,4}"
    r"(?:(?:is|was|seems|appears|(?:would|must|should|could)\s{1,4}be)\b|[:=])"
    r"|(?:therefore|thus|hence|overall|in\s{1,4}(?:conclusion|summary)|most\s{1,4}likely"
    r"|(?:is|seems|looks)\s{1,4}(?:the\s{1,4})?(?:correct|right|best)"
    r"|(?:most|best)\s{1,4}(?:consistent|compatible|in\s{1,4}keeping)\s{1,4}with|fits\s{1,4}best|best\s{1,4}fits"
    r"|i(?:['\u2019]ll|\s{1,4}will|\s{1,4}would)?\s{1,4}(?:choose|select|pick|answer|go\s{1,4}with))\b)",
    re.IGNORECASE,
)
_REASON = re.compile(
    r",?\s(?:because|since|rather\s{1,4}than|instead\s{1,4}of|unlike|whereas|while|although)\b", re.IGNORECASE
)
_LONGEST_CONCLUSION = 400
"""Characters searched for where a conclusion turns to its reasons."""

_MARKS = re.compile(r"[\s:,=*_\"'`]{0,8}")
# Straight after a conclusion a bare capital is explicit, but "A" and "I" are also words: they need an end behind.
_CONCLUDED = re.compile(
    r"(?:(?:the|is|be|with|as|option|choice|letter|answer)\s{1,4}){0,3}[*_\"'`]{0,4}"
    r"(?:([B-HJ-Z])(?![\w'\u2019-])|([AI])(?![\w'\u2019-])(?=[\s*_\"'`)]{0,4}(?:$|[^\w\s]|\n|(?:because|since|as|or|and)\b)))"
)
_ANOTHER = re.compile(r"[\s*_\"'`)\]]{0,8}(?:,|/|&|\bor\b|\band\b)\s{0,4}[(\[*_]{0,3}([A-Z])(?![\w'\u2019-])")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Next to a mention these deny it; the others lie between it and the word that may.
_DENIED_BEFORE = _words(
    "not no without nor neither never cannot exclude excludes excluding unlike against than instead t"
)
_PASSED_BEFORE = _words(
    "a an the any evidence sign signs of option choice letter likely consistent compatible with be been being for is "
    "clearly really definitely probably show demonstrate reveal suggest indicate represent see support favor favour "
    "match fit look like obvious definite significant acute or"
)
_DENIED_AFTER = _words(
    "unlikely improbable implausible incorrect wrong excluded absent less ruled isn wasn aren weren doesn didn cannot"
)
_COPULAS = _words("is are was were can could would be been seems seem appears appear looks does do")
_PASSED_AFTER = _COPULAS | _words("a an the very quite also therefore thus clearly probably more much option which")
_NEAR = 8
"""Words looked at on each side of a mention for its denial."""


class _Named:
    """What a text names, in its order: options by their full text and, with `lettered`, by their letter."""

    def __init__(self, text: str, shown: Sequence[str], *, lettered: bool) -> None:
        self.text = text
        self._shown = [normalise(option) for option in shown]
        self._lettered = lettered
        ends = list(_SENTENCE_END.finditer(text))
        self._ends = [end.start() for end in ends] + [len(text)]
        self._asked = [end.group() == "?" for end in ends] + [False]
        self._words: list[str] = []
        self._spans: list[Span] = []
        for piece in _WORD.finditer(text):
            for word in normalise(piece.group()).split():
                self._words.append(word)
                self._spans.append(piece.span())
        self._starts = [start for start, _ in self._spans]
        self._named_words = {word for option in self._shown for word in option.split()}
        mentions = [*self._by_letter(), *self._by_text()]
        self.mentions = sorted((one for one in mentions if self._affirmed(one)), key=lambda one: (one.start, one.end))
        self._mention_starts = [mention.start for mention in self.mentions]

    def lines(self) -> list[Span]:
        """The lines that aren't blank, without the space around them."""
        found, start = [], 0
        for line in self.text.split("\n"):
            if line.strip():
                found.append((start + len(line) - len(line.lstrip()), start + len(line.rstrip())))
            start += len(line) + 1
        return found

    def conclusions(self) -> Iterator[list[Reading]]:
        """What each sentence that concludes names after its conclusion, or else before it; the last one first."""
        for match in reversed(list(_CONCLUSION.finditer(self.text))):
            begin = _skip_marks(self.text, match.end())
            _, end = self._sentence(begin)
            if self._asked[bisect_left(self._ends, begin)]:
                continue
            reason = _REASON.search(self.text, begin, min(end, begin + _LONGEST_CONCLUSION))
            stop = end if reason is None else reason.start()
            after = [*self._bare_letters(begin, stop), *self._between(begin, stop)]
            yield after or self._between(self._sentence(match.start())[0], match.start())

    def last_sentence(self) -> list[Reading]:
        return self._between(*self._sentence(max(0, len(self.text.rstrip()) - 1)))

    def _sentence(self, index: int) -> Span:
        """Start and end of the sentence in which a character stands."""
        number = bisect_left(self._ends, index)
        return (self._ends[number - 1] + 1 if number else 0), self._ends[number]

    def _between(self, start: int, end: int) -> list[Reading]:
        first = bisect_left(self._mention_starts, start)
        return self.mentions[first : bisect_left(self._mention_starts, end, first)]

    def _letter(self, start: int) -> Reading | None:
        position = LETTERS.find(self.text[start])
        return Reading(position, start, start + 1) if self._lettered and 0 <= position < len(self._shown) else None

    def _bare_letters(self, begin: int, stop: int) -> Iterator[Reading]:
        """The bare letter, or the two, straight after a conclusion."""
        match = _CONCLUDED.match(self.text, begin, stop)
        while match is not None and (found := self._letter(match.start(match.lastindex or 0))):
            yield found
            match = _ANOTHER.match(self.text, match.end(), stop)

    def _by_letter(self) -> Iterator[Reading]:
        for match in _LETTER.finditer(self.text):
            start = match.start(match.lastindex or 0)
            other = match.lastindex == _BRACKETS and _NO_CHOICE.search(self.text, max(0, start - 20), start - 1)
            if not other and (found := self._letter(start)):
                yield found
        for match in _LINE_LETTER.finditer(self.text):
            found = self._letter(match.start(1))
            rest = normalise(match.group(3))
            # "B." and "B:" begin many a sentence; "B)" only a choice.
            if found and (match.group(2) == ")" or rest in ("", self._shown[found.position or 0])):
                yield found

    def _by_text(self) -> Iterator[Reading]:
        """Full texts of options: the longest at each place, and none inside another."""
        phrases: dict[str, list[tuple[list[str], int]]] = defaultdict(list)
        for position, option in enumerate(self._shown):
            # A single character is found in too many places, and so are yes and no.
            if self._lettered and (len(option) < 2 or option in _YES_NO or self._shown.count(option) > 1):
                continue
            if option:
                phrases[option.split()[0]].append((option.split(), position))
        reach = 0
        for index, word in enumerate(self._words):
            for phrase, position in sorted(phrases.get(word, ()), key=lambda entry: -len(entry[0])):
                stop = index + len(phrase)
                if stop > reach and self._words[index:stop] == phrase:
                    yield Reading(position, *_trimmed(self.text, self._spans[index][0], self._spans[stop - 1][1]))
                    reach = stop
                    break

    def _affirmed(self, mention: Reading) -> bool:
        """Whether a mention is neither asked nor denied in its sentence."""
        number = bisect_left(self._ends, mention.end)
        begin, end = self._sentence(mention.end)
        if self._asked[number]:
            return False
        first = max(0, bisect_right(self._starts, mention.start) - 1)
        for index in range(first - 1, max(-1, first - 1 - _NEAR), -1):
            (start, stop), word = self._spans[index], self._words[index]
            if start < begin:
                break
            if word in _DENIED_BEFORE:
                if "," not in self.text[stop : stop + 2]:  # "no, an effusion" denies something else
                    return False
                break
            if word not in _PASSED_BEFORE and word not in self._named_words:  # "no edema, mass or nodule"
                break
        copula = False
        after = bisect_left(self._starts, mention.end)
        for index in range(after, min(after + _NEAR, len(self._words))):
            start, word = self._starts[index], self._words[index]
            if start > end or "," in self.text[max(0, start - 2) : start]:
                break
            if word in _DENIED_AFTER or (word == "not" and copula):
                return False
            copula = copula or word in _COPULAS
            if word not in _PASSED_AFTER:
                break
        return True


def _whole_line(text: str, span: Span, shown: Sequence[str], style: Literal["letter", "text"]) -> Reading | None:
    """The option of a line that is an answer and no more: a letter, an option's full text, or both."""
    line = text[slice(*span)]
    if len(line) > _LONGEST_LINE or line.rstrip().endswith("?"):
        return None
    options = [normalise(option) for option in shown]

    def by_letter() -> Reading | None:
        letter = _WHOLE_LINE_LETTER.fullmatch(line)
        beside = _LINE_LETTER.fullmatch(line) if letter is None else None
        found = letter or beside
        position = LETTERS.find(found.group(1).upper()) if found else -1
        if (
            found is None
            or not 0 <= position < len(shown)
            or (beside and normalise(beside.group(3)) != options[position])
        ):
            return None
        return Reading(position, span[0] + found.start(1), span[0] + found.end(1))

    def by_text() -> Reading | None:
        said = normalise(line)
        return Reading(options.index(said), *_trimmed(text, *span)) if said and options.count(said) == 1 else None

    return by_letter() or by_text() if style == "letter" else by_text() or by_letter()


def _said_yes_no(part: str, area: str) -> Span | None:
    """The yes or no in a conclusion or at the beginning; a reasoning only concludes, its beginning says nothing yet."""
    found = read_open(part, yes_no=True)
    if found is None or (area == "thought" and not part[: found.start].strip()):
        return None
    return found.start, found.end


def _skip_marks(text: str, index: int) -> int:
    match = _MARKS.match(text, index)
    return index if match is None else match.end()


def _trimmed(text: str, start: int, end: int) -> Span:
    bare = text[start:end].strip(_EDGES)
    begin = text.find(bare, start, end)
    return begin, begin + len(bare)


def _fold(text: str) -> str:
    return text.strip().casefold()

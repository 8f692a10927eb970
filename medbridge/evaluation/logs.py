"""Sample logs of other evaluation tools: questions with the completions that were drawn for them.

Read are the `samples_*.jsonl` of lm-evaluation-harness and lmms-eval, the logs of Inspect (`.json`, and `.eval`, a zip
of JSON), MedVLThinker's `eval_results.jsonl`, and plain rows with the completions beside the question. They are graded
elsewhere.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from medbridge.data import Item, Skip
from medbridge.data.importers.lines import numbered_lines, parse_row
from medbridge.data.prompts import LETTERS
from medbridge.errors import MedbridgeError
from medbridge.evaluation.inspect_logs import read_inspect
from medbridge.evaluation.logged import (
    MAX_LINE,
    QUESTION_KEYS,
    Logged,
    logged,
    message_text,
    options_of,
    reason_of,
    right_option,
    storable,
)

FORMATS = ("lm-eval", "lmms-eval", "inspect", "medvlthinker", "rows")

_COMPLETION_KEYS = (
    "completions",
    "outputs",
    "responses",
    "samples",
    "output",
    "response",
    "completion",
    "model_output",
)
_GREEDY_KEYS = ("greedy", "greedy_completion")

_TURN_END = re.compile(r"<\|im_end\|>|<end_of_turn>|<\|eot_id\|>|</s>")
"""What chat templates write behind a message."""

_LETTERED_LINE = re.compile(r"^[ \t]*\(?([A-Z])[.):][ \t]+(\S[^\n]*)$", re.MULTILINE)

_MISSHAPEN = (MedbridgeError, ValueError, TypeError, AttributeError, KeyError, RecursionError)
"""What reading a row of any shape can end in."""

_SCORES = ("exact_match", "acc", "accuracy", "score", "correct", "is_correct")


def read_logs(files: Sequence[Path], kind: str = "auto") -> Iterator[Logged | Skip]:
    """The questions of all files, each once: several rows of one question give it several completions.

    Args:
        files: logs; of one question in several files, the completions are put together.
        kind: one of `FORMATS`, or `auto`.

    Raises:
        MedbridgeError: a file can't be read, or is no log of the kind.
    """
    if kind not in ("auto", *FORMATS):
        raise MedbridgeError(f"log format {kind!r}; known are: auto, {', '.join(FORMATS)}.")
    found: dict[str, Logged] = {}
    last: dict[str, Path] = {}
    for file in _different(files):
        chosen = _recognise(file) if kind == "auto" else kind
        for entry in read_inspect(file) if chosen == "inspect" else _rows(file, chosen):
            if isinstance(entry, Skip):
                yield entry
                continue
            known = found.get(entry.item.id)
            if known is not None and not _same(known.item, entry.item):
                yield Skip(str(file), None, entry.item.id, "another question of the same id stands in these logs.")
                continue
            if known is not None:
                entry = replace(known.joined(entry), files=known.files + (last[entry.item.id] != file))
            found[entry.item.id], last[entry.item.id] = entry, file
    yield from found.values()


def _different(files: Sequence[Path]) -> Iterator[Path]:
    """The files; two with the same content would count each completion twice."""
    known: dict[bytes, Path] = {}
    for file in files:
        try:
            with file.open("rb") as stream:
                digest = hashlib.file_digest(stream, "blake2b").digest()
        except OSError as error:
            raise MedbridgeError(f"{file}: can't be read ({error.strerror or error}).") from error
        if digest in known:
            raise MedbridgeError(f"{file} and {known[digest]} hold the same: leave one out.")
        known[digest] = file
        yield file


def _same(one: Item, other: Item) -> bool:
    return (one.question, one.options, one.answer) == (other.question, other.options, other.answer)


def _recognise(file: Path) -> str:
    if file.suffix == ".eval" or zipfile.is_zipfile(file):
        return "inspect"
    try:
        with _opened(file) as stream:
            head = stream.read(1 << 16).lstrip()
    except (OSError, zlib.error, EOFError) as error:
        raise MedbridgeError(f"{file}: can't be read ({error}).") from error
    if re.match(rb'\{\s*"version"\s*:', head) or (b'"eval"' in head and b'"samples"' in head):
        return "inspect"
    if b'"parsed_outputs"' in head:
        return "medvlthinker"
    return "lm-eval" if b'"resps"' in head or b'"filtered_resps"' in head else "rows"


def _opened(file: Path) -> IO[bytes]:
    return gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb")  # type: ignore[return-value]


# -- a JSON object a line -----------------------------------------------------------------------------------------


def _rows(file: Path, kind: str) -> Iterator[Logged | Skip]:
    """lm-evaluation-harness and lmms-eval write a row a question and filter, other tools a row a question or sample."""
    task = re.sub(r"^(?:.*_)?samples_|_\d{4}-\d{2}-\d{2}T.*$|_samples$", "", file.name.split(".")[0])
    found: dict[str, dict[str, Logged]] = {}  # by question, then by filter
    for number, line in _log_lines(file):
        try:
            row = storable(parse_row(line))
            if kind not in ("lm-eval", "lmms-eval"):
                yield _thinker(row, task) if kind == "medvlthinker" else _plain(row, task, number)
                continue
            entry, name = _harness(row, task), str(row.get("filter"))
            filters = found.setdefault(entry.item.id, {})
            if name in filters:
                raise MedbridgeError(f"doc_id {row.get('doc_id')} stands twice.")
            filters[name] = entry
        except _MISSHAPEN as error:
            yield Skip(str(file), number, None, reason_of(error))
    for filters in found.values():
        first, *_ = own = list(filters.values())
        # The same completions, scored through each filter: right is what one of them finds right.
        each = zip(*(entry.scores for entry in own), strict=False)
        scores = [max((score for score in of_one if score is not None), default=None) for of_one in each]
        yield replace(first, scores=tuple(scores))


def _log_lines(file: Path) -> Iterator[tuple[int, bytes]]:
    try:
        yield from numbered_lines(file, longest=MAX_LINE, opener=_opened)
    except (zlib.error, EOFError) as error:
        raise MedbridgeError(f"{file}: can't be read ({error}).") from error


def _harness(row: Mapping[str, Any], task: str) -> Logged:
    doc = row.get("doc")
    doc = doc if isinstance(doc, dict) else {}
    resps = row.get("resps") or row.get("filtered_resps")
    completions = [] if _likelihoods(resps) else [text for text in _flat(resps) if isinstance(text, str)]
    if not completions:
        raise MedbridgeError(
            "no generated text under 'resps': tasks that compare log-likelihoods draw no answers, so that they tell "
            "nothing of support. Run a generate_until task."
        )
    asked = {**doc, "target": row.get("target", doc.get("target"))}
    prompt = _prompt_text(row)
    if not any(isinstance(asked.get(key), str) for key in QUESTION_KEYS):  # lmms-eval leaves the document out
        asked["question"] = prompt
    if options_of(asked) is None:
        asked["options"] = _prompted_options(asked, prompt)
    score = _verdict(row)
    scores = (score if len(completions) == 1 else None,) * len(completions)
    return logged(asked, task, str(row.get("doc_id")), completions, whole=row, scores=scores)


def _likelihoods(resps: Any) -> bool:
    """Whether answers were scored and not written: [log-likelihood, greedy or not] each, as numbers or as text."""
    while isinstance(resps, list) and resps and isinstance(resps[0], list):
        resps = resps[0]
    if not isinstance(resps, list) or len(resps) != 2:
        return False
    try:
        float(resps[0])
    except (TypeError, ValueError):
        return False
    return str(resps[1]) in ("True", "False")


def _prompted_options(asked: Mapping[str, Any], prompt: str) -> list[str] | None:
    """The options that stand in the prompt alone, where the right answer is one of them."""
    listed = _lettered(prompt)
    try:
        if listed is not None and right_option(asked, listed):
            return listed
    except MedbridgeError:
        listed = None
    if re.fullmatch(r"\(?[A-Z]\)?", str(asked["target"])):
        raise MedbridgeError(f"the right answer is {asked['target']}, and its prompt lists no options by letter.")
    return None


def _prompt_text(row: Mapping[str, Any]) -> str:
    """What the model was asked: lmms-eval's `input`, or the first argument of lm-evaluation-harness."""
    given = row.get("input", row.get("arguments"))
    while isinstance(given, dict | list) and given:  # {"gen_args_0": {"arg_0": ...}} or [[...]]
        given = next(iter(given.values())) if isinstance(given, dict) else given[0]
    text = given if isinstance(given, str) else ""
    if not text.lstrip().startswith("["):
        return text
    try:
        messages = json.loads(text)  # a chat, written as JSON
        return message_text(next(m["content"] for m in reversed(messages) if m["role"] == "user"))
    except (ValueError, KeyError, TypeError, StopIteration, RecursionError):
        return text


def _lettered(prompt: str) -> list[str] | None:
    """The last options that a prompt lists, a lettered line each: those before belong to its examples."""
    found: list[str] = []
    last: list[str] | None = None
    for match in _LETTERED_LINE.finditer(prompt):
        if match[1] == "A":
            found = []
        elif match[1] != LETTERS[len(found) : len(found) + 1]:
            continue
        found.append(match[2].strip())
        if len(found) > 1:
            last = found
    return last


def _plain(row: Mapping[str, Any], task: str, number: int) -> Logged:
    texts = next((row[key] for key in _COMPLETION_KEYS if row.get(key)), None)
    completions = [text for text in _flat(texts) if isinstance(text, str)]
    greedy = next((row[key] for key in _GREEDY_KEYS if isinstance(row.get(key), str)), None)
    if not completions and greedy is None:
        raise MedbridgeError(f"no completions under any of: {', '.join(_COMPLETION_KEYS)}.")
    identity = next(
        (row[key] for key in ("id", "item_id", "dataset_index", "question_id", "qid") if key in row), number
    )
    dataset = str(row.get("dataset_name") or row.get("dataset") or task)
    unscored = (None,) * len(completions)
    return logged(row, dataset, str(identity), completions, whole=row, greedy=greedy, scores=unscored)


def _thinker(row: Mapping[str, Any], task: str) -> Logged:
    """A row of MedVLThinker's inference scripts: question and options stand in the prompt only, unless regraded."""
    outputs = row.get("parsed_outputs")
    drawn = [entry for entry in outputs or () if isinstance(entry, dict) and isinstance(entry.get("output_text"), str)]
    if not drawn:
        raise MedbridgeError("no 'output_text' under 'parsed_outputs'.")
    question, options = _prompted(row.get("prompts"))
    whole = {**row, "question": question, "options": row.get("options") or options}
    identity = str(row.get("dataset_index", row.get("dp_index")))
    scores = (entry.get("is_correct") for entry in drawn)
    return logged(
        whole, str(row.get("dataset_name") or task), identity, [entry["output_text"] for entry in drawn], whole=whole,
        scores=tuple(score if isinstance(score, bool) else None for score in scores),
    )  # fmt: skip


def _prompted(prompt: Any) -> tuple[str, dict[str, str]]:
    """The question and the lettered options of a prompt: chat text, or the messages of an endpoint."""
    if isinstance(prompt, list):
        prompt = "\n".join(
            message_text(m.get("content")) for m in prompt if isinstance(m, dict) and m.get("role") == "user"
        )
    _, asked, rest = str(prompt or "").partition("Question: ")
    question, shown, listed = rest.rpartition("\n\nOptions:")
    if not (asked and shown):
        raise MedbridgeError("no question with options in its 'prompts'.")
    options: dict[str, str] = {}
    for part in _TURN_END.split(listed, maxsplit=1)[0].split("\n\n"):
        letter, dot, text = part.partition(". ")
        if dot and letter == LETTERS[len(options) : len(options) + 1]:
            options[letter] = text
        elif options and part.strip():  # an option of several paragraphs
            options[LETTERS[len(options) - 1]] += f"\n\n{part}"
    return question, options


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for entry in value:
            yield from _flat(entry)
    elif isinstance(value, dict):
        yield from _flat(next((value[key] for key in ("text", "content", "completion") if key in value), None))
    else:
        yield value


def _verdict(row: Mapping[str, Any]) -> bool | None:
    for key in _SCORES:
        value = row.get(key)
        if isinstance(value, bool | int | float) and value in (0, 1):
            return bool(value)
    return None

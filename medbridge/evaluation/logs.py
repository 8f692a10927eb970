"""Sample logs of other evaluation tools: questions with the completions that were drawn for them.

Read are the `samples_*.jsonl` of lm-evaluation-harness and lmms-eval, the logs of Inspect (`.json`, and `.eval`, a zip
of JSON), MedVLThinker's `eval_results.jsonl`, and plain rows with the completions beside the question. They are graded
elsewhere.
"""

from __future__ import annotations

import gzip
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
from medbridge.evaluation.logged import MAX_LINE, QUESTION_KEYS, Logged, logged_item, message_text

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
    for file in files:
        chosen = _recognise(file) if kind == "auto" else kind
        for entry in read_inspect(file) if chosen == "inspect" else _rows(file, chosen):
            if isinstance(entry, Skip):
                yield entry
                continue
            known = found.get(entry.item.id)
            if known is None:
                found[entry.item.id] = entry
            elif _same(known.item, entry.item):
                found[entry.item.id] = replace(
                    known, completions=known.completions + entry.completions, greedy=known.greedy or entry.greedy,
                    scores=known.scores + entry.scores,
                )  # fmt: skip
            else:
                yield Skip(str(file), None, entry.item.id, "another question of the same id stands in these logs.")
    yield from found.values()


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
    seen: dict[str, str] = {}  # question -> the filter whose completions are taken
    for number, line in _log_lines(file):
        try:
            row = parse_row(line)
            if kind in ("lm-eval", "lmms-eval"):
                question, chosen = str(row.get("doc_id")), str(row.get("filter"))
                if question in seen:
                    if seen[question] == chosen:
                        raise MedbridgeError(f"doc_id {question} stands twice.")
                    continue  # the same completions under another filter
                seen[question] = chosen
                yield _harness(row, task)
            elif kind == "medvlthinker":
                yield _thinker(row, task)
            else:
                yield _plain(row, task, number)
        except (MedbridgeError, ValueError, RecursionError) as error:
            yield Skip(str(file), number, None, str(error) or type(error).__name__)


def _log_lines(file: Path) -> Iterator[tuple[int, bytes]]:
    try:
        yield from numbered_lines(file, longest=MAX_LINE, opener=_opened)
    except (zlib.error, EOFError) as error:
        raise MedbridgeError(f"{file}: can't be read ({error}).") from error


def _harness(row: Mapping[str, Any], task: str) -> Logged:
    doc = row.get("doc")
    doc = doc if isinstance(doc, dict) else {}
    resps = row.get("resps") or row.get("filtered_resps")
    completions = [text for text in _flat(resps) if isinstance(text, str)]
    if not completions:
        raise MedbridgeError(
            "no generated text under 'resps': tasks that compare log-likelihoods draw no answers, so that they tell "
            "nothing of support. Run a generate_until task."
        )
    asked = {**doc, "target": row.get("target", doc.get("target"))}
    if not any(isinstance(asked.get(key), str) for key in QUESTION_KEYS):  # lmms-eval leaves the document out
        prompt = _prompt_text(row)
        asked |= {"question": prompt, "options": asked.get("options") or _lettered(prompt)}
        if asked["options"] is None and re.fullmatch(r"\(?[A-Z]\)?", str(asked["target"])):
            raise MedbridgeError(f"the right answer is {asked['target']}, and its prompt lists no options by letter.")
    item = logged_item(asked, task, str(row.get("doc_id")), row)
    score = _verdict(row)
    return Logged(item, tuple(completions), scores=(score if len(completions) == 1 else None,) * len(completions))


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
    item = logged_item(row, str(row.get("dataset_name") or row.get("dataset") or task), str(identity), row)
    return Logged(item, tuple(completions), greedy, (None,) * len(completions))


def _thinker(row: Mapping[str, Any], task: str) -> Logged:
    """A row of MedVLThinker's inference scripts: question and options stand in the prompt only, unless regraded."""
    outputs = row.get("parsed_outputs")
    drawn = [entry for entry in outputs or () if isinstance(entry, dict) and isinstance(entry.get("output_text"), str)]
    if not drawn:
        raise MedbridgeError("no 'output_text' under 'parsed_outputs'.")
    question, options = _prompted(row.get("prompts"))
    whole = {**row, "question": question, "options": row.get("options") or options}
    identity = str(row.get("dataset_index", row.get("dp_index")))
    item = logged_item(whole, str(row.get("dataset_name") or task), identity, whole)
    scores = (entry.get("is_correct") for entry in drawn)
    return Logged(
        item, tuple(entry["output_text"] for entry in drawn),
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

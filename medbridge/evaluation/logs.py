"""Sample logs of other evaluation tools: questions with the completions that were drawn for them.

Read are the `samples_*.jsonl` of lm-evaluation-harness and lmms-eval, the logs of Inspect (`.json`, and `.eval`, a zip
of JSON), and rows in MedVLThinker's form with the completions beside the question. They are graded elsewhere.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from medbridge.data import Item, Skip
from medbridge.data.importers.lines import numbered_lines, parse_row
from medbridge.data.prompts import LETTERS
from medbridge.errors import MedbridgeError

FORMATS = ("lm-eval", "lmms-eval", "inspect", "rows")

_MAX_LINE = 64 << 20
"""Longest line, and largest JSON file within a zip, that is read, in bytes."""

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
_QUESTION_KEYS = ("question", "query", "problem", "prompt", "input")
_ANSWER_KEYS = ("answer", "answer_label", "target", "gold", "label", "answer_idx", "answerKey", "correct_option")
_IMAGE_KEYS = ("image_id", "image_name", "image_path", "image_paths", "img_name", "image")
_STRATUM_KEYS = ("dataset_name", "category", "subject", "subset", "subfield", "task")
_SCORES = ("exact_match", "acc", "accuracy", "score", "correct", "is_correct")


@dataclass(frozen=True, slots=True)
class Logged:
    """One question with its completions.

    Attributes:
        item: the question; without image files; its `cluster` tag says which images it shows, where that is known.
        completions: sampled ones, in order.
        greedy: the greedy one, where the log tells it apart.
        scores: what the log itself made of each completion, right or wrong; None where it says nothing.
    """

    item: Item
    completions: tuple[str, ...]
    greedy: str | None = None
    scores: tuple[bool | None, ...] = field(default=())


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
        reader = _inspect if chosen == "inspect" else _rows
        for entry in reader(file, chosen):
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
    return "lm-eval" if b'"resps"' in head or b'"filtered_resps"' in head else "rows"


def _opened(file: Path) -> IO[bytes]:
    return gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb")  # type: ignore[return-value]


# -- a JSON object a line -----------------------------------------------------------------------------------------


def _rows(file: Path, kind: str) -> Iterator[Logged | Skip]:
    """lm-evaluation-harness and lmms-eval write a row a question and filter, other tools a row a question or sample."""
    task = re.sub(r"^samples_|_\d{4}-\d{2}-\d{2}T.*$|_samples$", "", file.name.split(".")[0])
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
            else:
                yield _plain(row, task, number)
        except (MedbridgeError, ValueError, RecursionError) as error:
            yield Skip(str(file), number, None, str(error) or type(error).__name__)


def _log_lines(file: Path) -> Iterator[tuple[int, bytes]]:
    try:
        yield from numbered_lines(file, longest=_MAX_LINE, opener=_opened)
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
    item = _item({**doc, "target": row.get("target", doc.get("target"))}, task, str(row.get("doc_id")), row)
    score = _verdict(row)
    return Logged(item, tuple(completions), scores=(score if len(completions) == 1 else None,) * len(completions))


def _plain(row: Mapping[str, Any], task: str, number: int) -> Logged:
    texts = next((row[key] for key in _COMPLETION_KEYS if row.get(key)), None)
    completions = [text for text in _flat(texts) if isinstance(text, str)]
    greedy = next((row[key] for key in _GREEDY_KEYS if isinstance(row.get(key), str)), None)
    if not completions and greedy is None:
        raise MedbridgeError(f"no completions under any of: {', '.join(_COMPLETION_KEYS)}.")
    identity = next(
        (row[key] for key in ("id", "item_id", "dataset_index", "question_id", "qid") if key in row), number
    )
    item = _item(row, str(row.get("dataset_name") or row.get("dataset") or task), str(identity), row)
    return Logged(item, tuple(completions), greedy, (None,) * len(completions))


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


# -- Inspect ------------------------------------------------------------------------------------------------------


def _inspect(file: Path, kind: str) -> Iterator[Logged | Skip]:
    for name, sample, task in _inspect_samples(file):
        try:
            yield _inspected(sample, task)
        except (MedbridgeError, ValueError, TypeError, AttributeError) as error:
            yield Skip(f"{file}/{name}" if name else str(file), None, None, str(error) or type(error).__name__)


def _inspect_samples(file: Path) -> Iterator[tuple[str, dict[str, Any], str]]:
    try:
        if not zipfile.is_zipfile(file):
            log = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(log, dict) or not isinstance(log.get("samples"), list):
                raise MedbridgeError(f"{file}: not a log of Inspect: it has no list of samples.")
            for number, sample in enumerate(log["samples"]):
                yield f"sample {number}", sample, _task(log)
            return
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            header = next((m for m in members if m.filename in ("header.json", "_journal/start.json")), None)
            task = "inspect" if header is None else _task(_member(archive, header, file))
            for member in members:
                if member.filename.startswith("samples/") and member.filename.endswith(".json"):
                    yield member.filename, _member(archive, member, file), task
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise MedbridgeError(f"{file}: can't be read ({error}).") from error
    except (ValueError, RecursionError) as error:
        raise MedbridgeError(f"{file}: not valid JSON ({error}).") from error


def _member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, file: Path) -> Any:
    with archive.open(member) as stream:
        content = stream.read(_MAX_LINE + 1)  # what the zip says of sizes is not trusted
    if len(content) > _MAX_LINE:
        raise MedbridgeError(f"{file}: {member.filename} holds more than {_MAX_LINE >> 20} MiB, which is no sample.")
    return json.loads(content)


def _task(log: Any) -> str:
    found = log.get("eval", {}).get("task") if isinstance(log, dict) and isinstance(log.get("eval"), dict) else None
    return str(found or "inspect")


def _inspected(sample: dict[str, Any], task: str) -> Logged:
    output = sample.get("output") or {}
    choices = output.get("choices") or []
    texts = [_message(choice.get("message", {}).get("content")) for choice in choices] or [
        output.get("completion") or ""
    ]
    question = sample.get("input")
    if isinstance(question, list):
        question = next((_message(m.get("content")) for m in reversed(question) if m.get("role") == "user"), "")
    given = sample.get("metadata")
    metadata: dict[str, Any] = given if isinstance(given, dict) else {}
    row = {
        **metadata, "question": question, "options": sample.get("choices") or metadata.get("options"),
        "target": sample.get("target"),
    }  # fmt: skip
    values = [score.get("value") for score in (sample.get("scores") or {}).values() if isinstance(score, dict)]
    right = {"C": True, "I": False, 1: True, 0: False}
    known = [right[value] for value in values if isinstance(value, str | int | float) and value in right]
    score = known[0] if known and len(texts) == 1 else None
    return Logged(_item(row, task, str(sample.get("id")), row), tuple(texts), scores=(score,) * len(texts))


def _message(content: Any) -> str:
    if isinstance(content, str):
        return content
    parts = [part.get("text", "") for part in content or [] if isinstance(part, dict) and part.get("type") == "text"]
    return "\n".join(parts)


# -- one question -------------------------------------------------------------------------------------------------


def _item(row: Mapping[str, Any], dataset: str, identity: str, whole: Mapping[str, Any]) -> Item:
    question = next((row[key] for key in _QUESTION_KEYS if isinstance(row.get(key), str) and row[key].strip()), None)
    if question is None:
        raise MedbridgeError(f"no question under any of: {', '.join(_QUESTION_KEYS)}.")
    options = _options(row)
    answer = _answer(row, options)
    tags = {key: str(row[key]) for key in _STRATUM_KEYS if isinstance(row.get(key), str) and row[key].strip()}
    named = ((one.get(key)) for key in _IMAGE_KEYS for one in (whole, row))
    image = next((value for value in named if value not in (None, "", [])), None)
    shown = json.dumps(image, sort_keys=True, default=str) if image is not None else question
    tags["cluster"] = hashlib.blake2b(shown.encode("utf-8", "replace"), digest_size=8).hexdigest()
    tags["task"] = dataset
    return Item(
        id=f"{dataset}/{identity}", dataset=dataset, split="test", question=question, answer=answer, options=options,
        images=(), tags=tags, floor=0.0 if options is None else 1 / len(options),
    )  # fmt: skip


def _options(row: Mapping[str, Any]) -> tuple[str, ...] | None:
    found = row.get("options", row.get("choices"))
    if isinstance(found, str):
        found = _written(found)
    if isinstance(found, dict) and isinstance(found.get("text"), list):
        found = found["text"]
    if isinstance(found, dict):
        found = [found[key] for key in sorted(found)]
    if found is None and all(isinstance(row.get(letter), str) for letter in "AB"):
        letters = [letter for letter in LETTERS if isinstance(row.get(letter), str)]
        found = [row[letter] for letter in letters]
    if not isinstance(found, list | tuple) or not found:
        return None
    texts = [re.sub(r"^\(?[A-Z][.):]\s+", "", str(option)).strip() for option in found]
    return tuple(texts)


def _written(text: str) -> Any:
    """Options as JSON, or a line each ("A. heart")."""
    try:
        return json.loads(text)
    except ValueError:
        return [line.strip() for line in text.splitlines() if line.strip()] or None


def _answer(row: Mapping[str, Any], options: tuple[str, ...] | None) -> str:
    for key in _ANSWER_KEYS:
        value = row.get(key)
        if isinstance(value, list) and value:
            value = value[0]
        if value is None or isinstance(value, bool | dict | list) or str(value).strip() == "":
            continue
        text = str(value).strip()
        if options is None:
            return text
        if text in options:
            return text
        letter = re.fullmatch(r"\(?([A-Za-z])[.):]?", text)
        if letter and LETTERS.index(letter[1].upper()) < len(options):
            return options[LETTERS.index(letter[1].upper())]
        if text.isdecimal() and int(text) < len(options):
            return options[int(text)]
        folded = [option for option in options if option.casefold() == text.casefold()]
        if len(folded) == 1:
            return folded[0]
    raise MedbridgeError(f"no right answer under any of {', '.join(_ANSWER_KEYS)} that is one of the options.")

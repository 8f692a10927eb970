"""Questions with what was read from their completions: the common form of logs made elsewhere and of a run's rollouts.

Nothing is sampled here, and nothing is counted.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from medbridge.data import Item, PromptSettings, grade
from medbridge.data.answers import Outcome
from medbridge.data.readings import READINGS, ReadingName, regrade
from medbridge.errors import MedbridgeError
from medbridge.evaluation.logged import Logged
from medbridge.ledger import Ledger, Stage
from medbridge.measurement.counting import stored_outcomes
from medbridge.rollout import GREEDY

_BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]{0,400}\}){0,400})\}")
_DRESSED = re.compile(r"\\(?:text|mathrm|mathbf|mbox)[a-z]{0,4}\{([^{}]*)\}")

_TAG = re.compile(r"</?(?:think|answer)>", re.IGNORECASE)

_LONGEST_BARE = 200
"""Characters of a line that is taken for an answer."""

_BATCH = 256
"""Items whose completions are held at once."""

Outcomes = Mapping[int, Outcome]
"""Sample -> what was read from it; the greedy completion under `GREEDY`."""


@dataclass(frozen=True, slots=True)
class Answered:
    """One question with the outcomes of its completions.

    Attributes:
        cluster: what it shares with questions that it depends on.
        readings: the outcomes under each reading of the answers that was asked for.
        cut: sampled completions that ended at their token limit; None where that isn't known.
        scores: of sampled completions, what the log they come from made of them: right or wrong.
        distinct: different texts among the sampled completions; None where that wasn't counted.
    """

    item: Item
    cluster: str
    readings: Mapping[ReadingName, Outcomes]
    cut: int | None = None
    scores: Mapping[int, bool] = field(default_factory=dict)
    distinct: int | None = None


def answered_in_log(entry: Logged, settings: PromptSettings | None = None, *, cluster: str | None = None) -> Answered:
    """One question of a log, its completions graded under every reading.

    Args:
        entry: the question.
        settings: which open answers count as right; None: the defaults.
        cluster: what it shares with questions that it depends on; None: the images that it shows.
    """
    item, settings = entry.item, settings or PromptSettings()
    texts = dict(enumerate(entry.completions)) | ({} if entry.greedy is None else {GREEDY: entry.greedy})
    found: dict[ReadingName, dict[int, Outcome]] = {name: {} for name in READINGS}
    for sample, text in texts.items():
        for name, outcome in _read(item, text, settings).items():
            # Of several answers that are accepted, one is enough.
            for other in entry.accepted:
                if outcome.status == "wrong":
                    again = _read(replace(item, answer=other), text, settings)[name]
                    outcome = again if again.status == "correct" else outcome
            found[name][sample] = outcome
    scores = {sample: score for sample, score in enumerate(entry.scores) if score is not None}
    named = " | ".join(entry.shows) if cluster is None else cluster
    return Answered(item, named, found, entry.cut, scores, len(set(entry.completions)))


def _read(item: Item, text: str, settings: PromptSettings) -> dict[ReadingName, Outcome]:
    order = tuple(range(len(item.options or ())))
    written = _tagged(text)
    outcome = grade(item, order, written, settings)
    if outcome.status == "abstain" and (bare := _bare(written)) is not None:
        written, outcome = bare, replace(grade(item, order, bare, settings), well_formed=False)
    return {name: regrade(item, order, written, outcome, settings, name) for name in READINGS}


def answered_in_stage(ledger: Ledger, stage: Stage, readings: Sequence[ReadingName] = READINGS) -> list[Answered]:
    """The questions of a measuring stage of a run, by id.

    Readings other than the standard one take the completions' texts, which are read a batch of items at a time.

    Raises:
        MedbridgeError: the stage has measured nothing.
    """
    tallies = {tally.item_id: tally for tally in ledger.tallies(stage.stage_id)}
    items = {key: _item(record) for key, record in ledger.items(list(tallies)).items()}
    standard = stored_outcomes(ledger, stage.stage_id, list(items))
    if not standard:
        raise MedbridgeError(f"stage {stage.stage_id} of this run ({stage.kind}) has measured nothing.")
    others = [name for name in readings if name != "standard"]
    reread = _reread(ledger, stage, items, standard, others) if others else {}
    cut = ledger.cut_off(stage.stage_id)
    return [
        Answered(
            items[key],
            tallies[key].cluster,
            {name: reread[name, key] if name in others else standard[key] for name in readings},
            cut.get(key, 0),
        )
        for key in sorted(standard)
    ]


def _reread(
    ledger: Ledger,
    stage: Stage,
    items: Mapping[str, Item],
    standard: Mapping[str, Outcomes],
    readings: Sequence[ReadingName],
) -> dict[tuple[ReadingName, str], dict[int, Outcome]]:
    settings = _prompt_settings(ledger)
    found: dict[tuple[ReadingName, str], dict[int, Outcome]] = defaultdict(dict)
    for keys in _batches(sorted(standard)):
        for key, sample, order, text in ledger.completions(stage.stage_id, keys):
            for name in readings:
                outcome = standard[key][sample]
                found[name, key][sample] = regrade(items[key], order, text, outcome, settings, name)
    return found


def _batches(keys: Sequence[str]) -> Iterator[list[str]]:
    for start in range(0, len(keys), _BATCH):
        yield list(keys[start : start + _BATCH])


def _prompt_settings(ledger: Ledger) -> PromptSettings:
    config = ledger.meta("config")
    return PromptSettings.model_validate(config["data"]["prompt"])


def _item(record: Mapping[str, Any]) -> Item:
    options = record["options"]
    return Item(
        id=record["item_id"], dataset=record["dataset"], split=record["split"], question=record["question"],
        answer=record["answer"], options=None if options is None else tuple(options), images=tuple(record["images"]),
        tags=record["tags"], floor=record["floor"],
    )  # fmt: skip


def _bare(text: str) -> str | None:
    """A completion that says one short line and no more, behind its reasoning, with answer tags around that line.

    Models that were not asked for a form answer so ("B", "left lung"). None for any other completion.
    """
    thought, end, spoken = text.rpartition("</think>")
    line = spoken.strip()
    if not line or "\n" in line or len(line) > _LONGEST_BARE or _TAG.search(line):
        return None
    return f"{thought}{end}<answer>{line}</answer>"


def _tagged(text: str) -> str:
    """A boxed answer, as some models write it, in the tags that are read."""
    boxes = list(_BOXED.finditer(text))
    if not boxes or "<answer>" in text.lower():
        return text
    last = boxes[-1]
    plain = _DRESSED.sub(r"\1", last[1])
    return f"{text[: last.start()]}<answer>{plain}</answer>"

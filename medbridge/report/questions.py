"""Questions of a data set as one HTML file with pictures and filters: no network, every text escaped.

It shows what a model is asked, before any run; what models answered is the report's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from medbridge.data import Item, PromptSettings, build_prompt, permutation, target_completion
from medbridge.files import replace_text
from medbridge.report.images import Embedder, Picture
from medbridge.report.page import TEMPLATES, environment, script_hash

IMAGE_BYTES = 6_000_000
"""Budget of the embedded pictures: some three hundred of them, and a file that any browser opens at once."""

_PICTURES = 4
"""Pictures of one question that are shown."""


@dataclass(frozen=True, slots=True)
class Card:
    """One question as the page shows it; `prompt` and `target` are those of sample 0."""

    item: Item
    stratum: str
    pictures: list[Picture]
    more_pictures: int
    prompt: str
    target: str


def write_questions(
    items: Sequence[Item],
    out: Path,
    *,
    total: int,
    strata: Sequence[str] = (),
    settings: PromptSettings,
    seed: int = 0,
) -> Path:
    """Write the page of `items`, a selection from `total` questions; its path.

    `strata` are the tags that make up a stratum, which the page filters by. A picture that can't be read, or that no
    room is left for, is a note in its place. The file is replaced in one step. Raises MedbridgeError where an item
    lacks a tag of its stratum, and where the file can't be written.
    """
    embedder = Embedder(IMAGE_BYTES)
    replace_text(out, render([_card(item, embedder, strata, settings, seed) for item in items], total))
    return out


def render(cards: Sequence[Card], total: int) -> str:
    """The page as HTML text. Its one script is named by its hash, so that a browser runs no other."""
    templates = environment()
    script = (TEMPLATES / "questions.js").read_text(encoding="utf-8").strip()
    return templates.get_template("questions.html.j2").render(
        cards=cards,
        total=total,
        datasets=sorted({card.item.dataset for card in cards}),
        splits=Counter(card.item.split for card in cards),
        strata=dict(sorted(Counter(card.stratum for card in cards).items())),
        script=script,
        script_hash=script_hash(script),
    )


def _card(item: Item, embedder: Embedder, strata: Sequence[str], settings: PromptSettings, seed: int) -> Card:
    order = permutation(item, seed, 0)
    return Card(
        item,
        item.stratum(strata),
        [embedder.embed(path) for path in item.images[:_PICTURES]],
        max(0, len(item.images) - _PICTURES),
        build_prompt(item, order, settings)[-1]["content"][-1]["text"],
        target_completion(item, order, settings),
    )

"""A few questions as a person or a script wants to see them. The page with pictures is `report.questions`'s."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from medbridge.data.images import load_image
from medbridge.data.items import Item
from medbridge.data.prompts import PromptSettings, build_prompt, permutation, target_completion
from medbridge.data.sampling import even_positions


def describe_items(
    items: Sequence[Item], count: int, settings: PromptSettings, *, seed: int = 0
) -> list[dict[str, Any]]:
    """`count` questions at even distances, as JSON types: the item, its images' sizes, prompt and target.

    The prompt is that of sample 0. Raises MedbridgeError for an image that can't be read.
    """
    views = []
    for position in even_positions(len(items), count):
        item = items[position]
        order = permutation(item, seed, 0)
        message = build_prompt(item, order, settings)[-1]
        sizes = [load_image(image).size for image in item.images]
        views.append(
            {
                **item.to_dict(),
                "image_sizes": [list(size) for size in sizes],
                "prompt": message["content"][-1]["text"],
                "target": target_completion(item, order, settings),
            }
        )
    return views


def format_items(views: Sequence[dict[str, Any]]) -> str:
    """The views of `describe_items` as plain text, one block an item."""
    blocks = []
    for view in views:
        tags = ", ".join(f"{key}={value}" for key, value in view["tags"].items()) or "none"
        lines = [f"{view['id']}  (floor {view['floor']:.3g}; tags: {tags})"]
        for image, (width, height) in zip(view["images"], view["image_sizes"], strict=True):
            lines.append(f"  image   {width}x{height}  {image}")
        prompt = view["prompt"].splitlines()
        lines += [f"  {'prompt' if number == 0 else '':8}{line}" for number, line in enumerate(prompt)]
        lines.append(f"  target  {view['target']}")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)

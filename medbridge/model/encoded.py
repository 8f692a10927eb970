"""A prompt as a model takes it. Encoding it is `policy`'s, packing several into one row `packing`'s."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class EncodedPrompt:
    """One prompt, ready for the model.

    Attributes:
        ids: int64 [T] token ids, image placeholders expanded.
        type_ids: int64 [T] modality of each token (1 at image tokens), where the model wants it.
        positions: int64 [3, T] for M-RoPE models, [1, T] otherwise.
        next_position: position of the first completion token.
        vision: the processor's image tensors, shared by all option orders of the item.
        text: the prompt's text, with a placeholder for each image.
    """

    ids: Tensor
    type_ids: Tensor | None
    positions: Tensor
    next_position: int
    vision: Mapping[str, Tensor]
    text: str

    @property
    def images(self) -> int:
        """How many images the model is given."""
        grids = self.vision.get("image_grid_thw", self.vision.get("pixel_values"))  # Gemma 3: one row an image
        return 0 if grids is None else len(grids)

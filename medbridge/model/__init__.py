"""Vision-language models: loading any Hugging Face one, making a small one, encoding prompts for it.

Importing this package imports transformers; `medbridge.torchvision_ops` comes first and does not.
"""

from __future__ import annotations

from medbridge.torchvision_ops import declare

declare()  # before transformers looks at torchvision

from medbridge.model.initialise import FromNothing, init_model  # noqa: E402
from medbridge.model.policy import (  # noqa: E402
    EncodedPrompt,
    LoraSettings,
    ModelSettings,
    Policy,
    pick_device,
    pick_dtype,
)
from medbridge.model.prompter import Prompter  # noqa: E402

__all__ = [
    "EncodedPrompt", "FromNothing", "LoraSettings", "ModelSettings", "Policy", "Prompter", "init_model", "pick_device",
    "pick_dtype",
]  # fmt: skip

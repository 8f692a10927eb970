"""Vision-language models: loading any Hugging Face one, making a small one, encoding prompts for it.

Whatever here needs transformers imports it when it is first asked for; `medbridge.torchvision_ops` comes right before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from medbridge.declare_first import declare_first
from medbridge.lazy import lazy
from medbridge.model.settings import FromNothing, LoraSettings, ModelSettings

declare_first()

if TYPE_CHECKING:
    from medbridge.model.encoded import EncodedPrompt
    from medbridge.model.initialise import init_model
    from medbridge.model.policy import Policy, pick_device, pick_dtype
    from medbridge.model.prompter import Prompter

__getattr__ = lazy(
    __name__,
    {
        "EncodedPrompt": "encoded",
        "Policy": "policy",
        "Prompter": "prompter",
        "init_model": "initialise",
        "pick_device": "policy",
        "pick_dtype": "policy",
    },
)

__all__ = [
    "EncodedPrompt", "FromNothing", "LoraSettings", "ModelSettings", "Policy", "Prompter", "init_model", "pick_device",
    "pick_dtype",
]  # fmt: skip

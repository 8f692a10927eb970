"""Vision-language models: loading any Hugging Face one, making a small one, encoding prompts for it.

Importing this package imports transformers; `medbridge.torchvision_ops` comes first and does not.
"""

from __future__ import annotations

from medbridge.torchvision_ops import declare

declare()  # before transformers looks at torchvision

from medbridge.model.initialise import FromNothing, init_model  # noqa: E402
from medbridge.model.policy import EncodedPrompt, LoraSettings, ModelSettings, Policy  # noqa: E402

__all__ = ["EncodedPrompt", "FromNothing", "LoraSettings", "ModelSettings", "Policy", "init_model"]

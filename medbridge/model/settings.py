"""What may be chosen about the model. What follows from it stands where it is read."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Architecture = Literal["qwen2_5_vl", "qwen2_vl", "qwen3_vl", "gemma3"]


class FromNothing(BaseModel):
    """The shape of a model made from nothing."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    architecture: Architecture = Field(
        "qwen2_5_vl", description="Model family: qwen2_5_vl, qwen2_vl, qwen3_vl or gemma3."
    )
    vocab_size: int = Field(
        640, ge=320, description="Tokenizer entries: 256 bytes, merges learnt from the data, special tokens."
    )
    hidden_size: int = Field(128, ge=32, multiple_of=32, description="Width of the language model.")
    layers: int = Field(3, ge=1, description="Layers of the language model.")
    vision_hidden_size: int = Field(128, ge=32, multiple_of=32, description="Width of the vision tower.")
    vision_layers: int = Field(2, ge=1, description="Layers of the vision tower.")
    image_size: int = Field(56, ge=28, multiple_of=14, description="Side in pixels to which images are resized.")
    format_steps: int = Field(
        0,
        ge=0,
        description="SFT steps with answers drawn at random, which teach the answer form and no knowledge.",
    )


class LoraSettings(BaseModel):
    """Low-rank adapters (PEFT) trained in place of the whole model; merged when a stage ends."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rank: int = Field(16, ge=1, description="Rank of the adapters.")
    alpha: float = Field(32, gt=0, description="Scale numerator: updates are scaled by alpha / rank.")
    rank_stabilised: bool = Field(
        False,
        description="Scale by alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732), so that larger ranks keep learning.",
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapters' input during training.")
    targets: str | list[str] = Field(
        r"^(?!.*visual|.*vision).*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)$",
        description="Modules that get adapters: a regular expression or a list of module names.",
    )


class ModelSettings(BaseModel):
    """Which model is measured and trained, and how it is held in memory."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str | None = Field(
        None, description="Hugging Face model id or folder; null makes a small model from nothing."
    )
    from_nothing: FromNothing = Field(
        default_factory=FromNothing, description="Shape of the model made from nothing when path is null."
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Compute type; auto is bfloat16 on CUDA and float32 elsewhere."
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where the model runs.")
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = Field(
        "auto", description="Attention back end of transformers; auto takes flash-attn on CUDA if installed."
    )
    freeze_vision: bool = Field(False, description="Leave the vision tower as it is in training.")
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass: less memory, about a third slower."
    )
    liger: bool | Literal["auto"] = Field(
        "auto",
        description="Liger's fused norms, gated MLPs and rotary embeddings in training; auto takes them on CUDA if "
        "liger-kernel is installed.",
    )
    lora: LoraSettings | None = Field(None, description="Train low-rank adapters instead of all weights.")

"""Liger's fused kernels for the norms, gated MLPs and rotary embeddings of a model that is trained on a GPU.

Norms and MLPs are bound module by module, so that another model in the process stays as it is. Liger's own patches
change transformers' classes, and its M-RoPE kernel stands in for a function that transformers no longer calls: the
three axes are merged into one cosine and sine before, to which its plain rotary kernel applies.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from medbridge.errors import MedbridgeError

_NORMS = {
    "Qwen2VLRMSNorm": ("variance_epsilon", 0.0, "llama"),
    "Qwen2_5_VLRMSNorm": ("variance_epsilon", 0.0, "llama"),
    "Qwen3VLTextRMSNorm": ("variance_epsilon", 0.0, "llama"),
    "Gemma3RMSNorm": ("eps", 1.0, "gemma"),
}
"""Classes of transformers: the attribute with epsilon, what is added to the weight, and Liger's casting mode."""

_GATED = frozenset({"Qwen2MLP", "Qwen2_5_VLMLP", "Qwen3VLTextMLP", "Gemma3MLP"})
"""Classes of transformers that compute down(activation(gate(x)) * up(x))."""

_ATTENTION = frozenset({"Qwen2VLAttention", "Qwen2_5_VLAttention", "Qwen3VLTextAttention", "Gemma3Attention"})
"""Classes of transformers whose `apply_rotary_pos_emb` takes q, k [B, heads, T, width] and cos, sin [B, T, width]."""

Kernel = Literal["norm", "mlp", "rotary"]


def wanted(setting: bool | Literal["auto"], device: torch.device, *, trainable: bool) -> bool:
    """Whether `ModelSettings.liger` means Liger's kernels for a model on a device.

    Raises:
        MedbridgeError: they are asked for, and there is no GPU or no Liger.
    """
    installed = importlib.util.find_spec("liger_kernel") is not None
    if setting == "auto":
        return trainable and installed and device.type == "cuda"
    if not setting:
        return False
    if not installed:
        raise MedbridgeError(
            "model.liger is true, and liger-kernel is not installed. Install it, or set auto or false."
        )
    if device.type != "cuda":
        raise MedbridgeError(
            f"model.liger is true, and the model is on {device.type}: Liger's kernels are for GPUs. Set auto or false."
        )
    return True


def use_liger(model: nn.Module) -> Counter[Kernel]:
    """Have a model of transformers compute with Liger's kernels; how many modules now do, of each kind.

    Parts that are not known stay as they are: Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Gemma 3 have all three kinds.
    """
    bound: Counter[Kernel] = Counter()
    for module in model.modules():
        name = type(module).__name__
        if not type(module).__module__.startswith("transformers."):
            continue
        if name in _NORMS:
            module.forward = types.MethodType(_norm(*_NORMS[name]), module)
            bound["norm"] += 1
        elif name in _GATED and (forward := _gated(module)) is not None:
            module.forward = types.MethodType(forward, module)
            bound["mlp"] += 1
        elif name in _ATTENTION:
            _use_rotary(sys.modules[type(module).__module__])
            bound["rotary"] += 1
    return bound


def _norm(epsilon: str, offset: float, casting: str) -> Callable[[Any, Tensor], Tensor]:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    def forward(self: Any, hidden: Tensor) -> Tensor:
        # not in place: Gemma adds the gradient of a norm's output to that of the residual beside it
        normed: Tensor = LigerRMSNormFunction.apply(
            hidden, self.weight, getattr(self, epsilon), offset, casting, False, None
        )
        return normed

    return forward


def _gated(module: Any) -> Callable[[Any, Tensor], Tensor] | None:
    """The forward pass of a gated MLP; None where Liger has no kernel for its activation."""
    from liger_kernel.ops.geglu import LigerGELUMulFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    functions = {"SiLUActivation": LigerSiLUMulFunction, "SiLU": LigerSiLUMulFunction, "GELUTanh": LigerGELUMulFunction}
    function = functions.get(type(module.act_fn).__name__)
    if function is None:
        return None

    def forward(self: Any, hidden: Tensor) -> Tensor:
        out: Tensor = self.down_proj(function.apply(self.gate_proj(hidden), self.up_proj(hidden)))
        return out

    return forward


def _use_rotary(modelling: types.ModuleType) -> None:
    """Replace the function of a module of transformers, which no instance holds, for tensors on a GPU."""
    if getattr(modelling.apply_rotary_pos_emb, "falls_back_to", None) is not None:
        return
    modelling.apply_rotary_pos_emb = _rotary(modelling.apply_rotary_pos_emb)  # type: ignore[attr-defined]


def _rotary(original: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    from liger_kernel.ops.rope import LigerRopeFunction

    def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        if not _on_gpu(q) or unsqueeze_dim != 1:
            return original(q, k, cos, sin, unsqueeze_dim)
        rotated: tuple[Tensor, Tensor] = LigerRopeFunction.apply(q, k, cos, sin, None, unsqueeze_dim)
        return rotated

    apply.falls_back_to = original  # type: ignore[attr-defined]
    return apply


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda

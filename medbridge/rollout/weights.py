"""One version of a policy's weights on their way from the trainer to the engines, by their names in a checkpoint.

How an engine takes them in stands with the engine; whether it did is for `verify` to say.
"""

from __future__ import annotations

import copy
import hashlib
import json
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from medbridge.errors import MedbridgeError
from medbridge.model.policy import Policy
from medbridge.rollout.scratch import make_home

INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_model.safetensors"
_SHARD_BYTES = 2 << 30
_MARGIN_BYTES = 16 << 20  # configuration, headers of the files


class Weights:
    """Version `version` of the weights of `policy`, to be read before the policy is trained further.

    Engines of other processes read `folder()`; an engine that shares the trainer's GPU reads `tensors()`.
    Floating-point weights are given in the type that the policy computes in, which is the engines' too. What was
    written goes when it is released, with this object, or with the process, whichever is first.
    """

    def __init__(self, policy: Policy, version: int, scratch: Path) -> None:
        """`scratch` is a folder for what is written where memory (/dev/shm) has no room for it."""
        self.policy = policy
        self.version = version
        self.scratch = scratch
        self._writing = threading.Lock()  # several engines may ask at once
        self._folders: dict[str, Path] = {}
        self._homes: list[weakref.finalize] = []
        self._trained_on = False

    # -- what is read --------------------------------------------------------------------------------------

    @property
    def adapted(self) -> bool:
        """Whether the policy has adapters, so that `base_folder` and `adapter_folder` say the same as `folder`."""
        return bool(_adapted(self.policy.model))

    @torch.no_grad()
    def tensors(self, *, merged: bool = True) -> Iterator[tuple[str, Tensor]]:
        """(name as in a checkpoint, tensor) of the live weights, adapters merged, one matrix at a time.

        Tied weights come once. A tensor may be the model's own parameter: read it, and change nothing.
        Without `merged` they are the weights beneath the adapters.

        Raises:
            MedbridgeError: adapters sit on a weight that a checkpoint holds in another form; or `train_on` was called.
        """
        if self._trained_on:
            raise MedbridgeError(
                f"An engine asks for weights of version {self.version}, which are being trained on and were not "
                "written: it was started anew in the middle of a step. Nothing is lost: run the same command again."
            )
        adapted = _adapted(self.policy.model)
        layers = {id(layer.get_base_layer().weight): layer for layer in adapted.values()} if merged else {}
        for name, tensor in _checkpoint_form(self.policy.model, adapted).items():
            layer = layers.pop(id(tensor), None)
            weight = tensor.detach() if layer is None else _merged(layer)
            yield name, weight.to(self.policy.compute_dtype) if weight.is_floating_point() else weight
        if layers:
            raise MedbridgeError(
                f"model {self.policy.path!r}: {len(layers)} of its weights have adapters and another form in a "
                "checkpoint, so that they can't be merged on the way to an engine. Give other model.lora.targets."
            )

    def nbytes(self) -> int:
        """Bytes that `tensors` gives in all."""
        size = self.policy.compute_dtype.itemsize
        state = _checkpoint_form(self.policy.model, _adapted(self.policy.model))
        return sum(t.numel() * (size if t.is_floating_point() else t.itemsize) for t in state.values())

    @torch.no_grad()
    def base(self) -> str:
        """A fingerprint of the weights beneath the adapters, from some numbers of each: frozen ones keep theirs."""
        digest = hashlib.blake2b(digest_size=16)
        for name, tensor in self.tensors(merged=False):
            some = tensor.flatten()[:: max(1, tensor.numel() // 64)].float().cpu().numpy()
            digest.update(name.encode() + some.tobytes())
        return digest.hexdigest()

    # -- what is written -----------------------------------------------------------------------------------

    def folder(self) -> Path:
        """A Hugging Face folder with these weights, written at the first call; it has no processor files.

        Raises:
            MedbridgeError: neither memory nor `scratch` has room for it, or the writing fails.
        """
        return self._written("weights", self.nbytes, lambda folder: self._write_model(folder, self.tensors()))

    def base_folder(self) -> Path:
        """As `folder`, without the adapters: what an engine needs once, before it can take `adapter_folder`."""
        return self._written("base", self.nbytes, lambda folder: self._write_model(folder, self.tensors(merged=False)))

    def adapter_folder(self) -> Path:
        """The adapters alone as PEFT writes them, for an engine that holds the weights beneath them (`base` tells).

        Raises:
            MedbridgeError: as for `folder`, and where the policy has no adapters.
        """
        if not self.adapted:
            raise MedbridgeError(f"model {self.policy.path!r} has no adapters to send by themselves.")
        return self._written("adapter", lambda: sum(t.nbytes for t in self._adapter().values()), self._write_adapter)

    def train_on(self) -> None:
        """The policy is trained from here on: only what was written can still be read."""
        self._trained_on = True

    def release(self) -> None:
        """Remove what was written."""
        with self._writing:
            for home in self._homes:
                home()
            self._homes.clear()
            self._folders.clear()

    def _written(self, kind: str, nbytes: Callable[[], int], write: Callable[[Path], None]) -> Path:
        with self._writing:
            if kind not in self._folders:
                home = None
                try:
                    home, remove = make_home(nbytes() + _MARGIN_BYTES, self.scratch)
                    self._homes.append(weakref.finalize(self, remove))
                    part = home / "writing"
                    part.mkdir()
                    write(part)
                    self._folders[kind] = part.rename(home / f"{kind}-{self.version}")
                except (OSError, SafetensorError) as error:
                    if home is not None:
                        self._homes.pop()()
                    raise MedbridgeError(
                        f"{home or self.scratch}: weights of version {self.version} can't be written ({error}). Free "
                        "some space there, or put the run's folder on a larger disk. The run can be resumed."
                    ) from error
            return self._folders[kind]

    def _write_model(self, folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
        config = copy.deepcopy(self.policy.model.config)
        for section in (config, *(getattr(config, name) for name in config.sub_configs)):
            section.dtype = self.policy.compute_dtype
        config.save_pretrained(folder)
        if self.policy.model.can_generate():
            self.policy.model.generation_config.save_pretrained(folder)
        files: dict[str, str] = {}
        total = 0
        for number, shard in enumerate(_shards(tensors)):
            file = f"model-{number:05d}.safetensors"
            save_file(shard, folder / file, metadata={"format": "pt"})
            files |= dict.fromkeys(shard, file)
            total += sum(tensor.nbytes for tensor in shard.values())
        # last: a folder with an index is whole
        index = {"metadata": {"total_size": total, "weights_version": self.version}, "weight_map": files}
        (folder / INDEX).write_text(json.dumps(index))

    def _adapter(self) -> dict[str, Tensor]:
        from peft import get_peft_model_state_dict

        model = self.policy.model
        named = get_peft_model_state_dict(model, adapter_name=_adapter_name(model))
        return {f"base_model.model.{name}": tensor.detach() for name, tensor in named.items()}

    def _write_adapter(self, folder: Path) -> None:
        model: Any = self.policy.model
        model.peft_config[_adapter_name(model)].save_pretrained(folder)
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self._adapter().items()}
        save_file(tensors, folder / ADAPTER, metadata={"format": "pt"})


def check_folder(folder: Path, version: int) -> list[Path]:
    """The files of a folder that `Weights.folder` wrote, after making sure that it is whole, and this version.

    Raises:
        MedbridgeError: a file is missing or cut short, the names in the files are not those of the index, or it is
            another version.
    """
    try:
        index = json.loads((folder / INDEX).read_text())
        expected: dict[str, str] = index["weight_map"]
        found: dict[str, str] = {}
        for file in sorted(set(expected.values())):
            with safe_open(folder / file, framework="pt") as stored:
                found |= dict.fromkeys(stored.keys(), file)
        stands = int(index["metadata"]["weights_version"])
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise MedbridgeError(f"{folder}: weights of version {version} are torn: {error}. {_TORN}") from error
    if found != expected:
        odd = min(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        raise MedbridgeError(
            f"{folder}: weights of version {version} are torn: the files hold {len(found)} names and the index "
            f"{len(expected)}; {odd!r} is not where the index says. {_TORN}"
        )
    if stands != version:
        raise MedbridgeError(f"{folder}: holds weights of version {stands}, and version {version} was to be loaded.")
    return [folder / file for file in sorted(set(expected.values()))]


_TORN = "Nothing was loaded. Resume the run: its weights are written again."


# -- names and values --------------------------------------------------------------------------------------


def _shards(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Tensors in the host's memory, as many at a time as a file holds."""
    shard: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if shard and sum(held.nbytes for held in shard.values()) + tensor.nbytes > _SHARD_BYTES:
            yield shard
            shard = {}
        shard[name] = tensor.cpu().contiguous()
    if shard:
        yield shard


def _adapted(model: nn.Module) -> dict[str, Any]:
    """The layers with adapters by their names; none where the model was never given any."""
    if getattr(model, "peft_config", None) is None:
        return {}
    from peft.tuners.lora import LoraLayer

    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}


def _adapter_name(model: Any) -> str:
    return str(next(iter(model.peft_config)))


def _checkpoint_form(model: Any, adapted: Mapping[str, Any]) -> dict[str, Tensor]:
    """The model's own parameters and buffers under the names that `save_pretrained` would give them."""
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        owner = next((layer for layer in _parents(name) if layer in adapted), None)
        if owner is None:
            state[name] = tensor
        elif name.startswith(f"{owner}.base_layer."):
            state[owner + name.removeprefix(f"{owner}.base_layer")] = tensor
    for name in model._keys_to_ignore_on_save or ():
        state.pop(name, None)
    untied = remove_tied_weights_from_state_dict(state, model)
    return dict(revert_weight_conversion(model, untied))


def _parents(name: str) -> Iterator[str]:
    """Names of the modules around a tensor, from the inside."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _merged(layer: Any) -> Tensor:
    """An adapted layer's weight with its adapters added in float32; the layer stays as it is."""
    weight = layer.get_base_layer().weight.detach().float()
    for adapter in layer.active_adapters:
        weight = weight + layer.get_delta_weight(adapter).detach().float()
    return weight

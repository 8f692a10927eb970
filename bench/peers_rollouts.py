"""The rollouts' peer: TRL's `GRPOTrainer` and the path that its training loop draws completions by.

As a script it draws by vLLM, in colocate mode: `python bench/peers_rollouts.py MODEL TOKENS`. vLLM changes threads and
memory of its process for good, so that nothing else is to be timed there. Calls come as lines of JSON on its standard
input.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from medbridge.data import ImageCache

MARK = "peers_rollouts: "
"""Begins the lines that the script answers in: vLLM writes to the same place."""

Messages = list[dict[str, Any]]


def make_trainer(model: str, *, batch: int, max_tokens: int, vllm: bool) -> Any:
    """A `GRPOTrainer` that draws at temperature 1, uncut. `batch` is its generation batch."""
    import datasets
    import trl
    from transformers import AutoProcessor

    trainer = trl.GRPOTrainer(
        model=model, processing_class=AutoProcessor.from_pretrained(model),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        train_dataset=datasets.Dataset.from_dict({"prompt": ["none"] * batch}),
        args=trl.GRPOConfig(
            output_dir=tempfile.gettempdir(), use_cpu=True, bf16=False, report_to="none",
            per_device_train_batch_size=batch, num_generations=batch, temperature=1.0, top_p=1.0, top_k=0,
            max_completion_length=max_tokens, use_vllm=vllm, vllm_mode="colocate", vllm_max_model_length=1024,
            vllm_gpu_memory_utilization=0.1,
        ),
    )  # fmt: skip
    trainer.model.eval()
    # It would load its weights into vLLM before the first call, and vLLM's linear layers on a CPU take none in.
    trainer._last_loaded_step = trainer.state.global_step
    return trainer


def draw(trainer: Any, prompts: Sequence[Messages], batch: int) -> tuple[float, int]:
    """One completion for each prompt, `batch` at a time. Returns seconds and tokens.

    Pictures are file names in the messages, and each file is read once.
    """
    began = time.perf_counter()
    images = ImageCache(1 << 29)
    tokens = 0
    for start in range(0, len(prompts), batch):
        shown = [_with_pictures(prompt, images) for prompt in prompts[start : start + batch]]
        completions = trainer._generate(shown)[1]
        tokens += sum(map(len, completions))
    return time.perf_counter() - began, tokens


def _with_pictures(prompt: Messages, images: ImageCache) -> Messages:
    return [
        {
            **message,
            "content": [
                {**part, "image": images.get(part["image"])} if part["type"] == "image" else part
                for part in message["content"]
            ],
        }
        for message in prompt
    ]


def main() -> None:
    """Say that it is ready; then, for each line of {prompts, batch}, seconds and tokens."""
    model, max_tokens = sys.argv[1], int(sys.argv[2])
    trainer = make_trainer(model, batch=128, max_tokens=max_tokens, vllm=True)
    print(MARK + "ready", flush=True)
    for line in sys.stdin:
        seconds, tokens = draw(trainer, **json.loads(line))
        print(MARK + json.dumps([seconds, tokens]), flush=True)


if __name__ == "__main__":
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    from medbridge.torchvision_ops import declare, prepare_children

    prepare_children()
    declare()
    main()

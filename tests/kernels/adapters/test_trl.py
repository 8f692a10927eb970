"""TRL's loss through the adapter against TRL's own `GRPOTrainer._compute_loss`: loss, gradients and logged metrics.

Both sides are real trainers of the same tiny language model, and get the same batch. vLLM isn't there to be asked for
samples, so its part of a batch is made here by TRL's formulas, and `use_vllm` set once the trainer stands.
"""

from __future__ import annotations

import copy
import importlib.metadata
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import peft
import pytest
import torch
import transformers
import trl
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from medbridge_kernels.adapters.trl import (
    MedbridgeLossMixin,
    loss_config,
    output_scaling,
    trl_grpo_loss,
    trl_linear_grpo_loss,
)

VOCAB, BATCH, PROMPT, LENGTH = 41, 5, 3, 6
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo")
MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
Make = Callable[..., tuple[Any, Any]]


class Trainer(MedbridgeLossMixin, trl.GRPOTrainer):
    pass


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny language model with wide logits, so that clipping and KL have something to do."""
    folder = tmp_path_factory.mktemp("llama")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, initializer_range=0.6, pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def make(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """TRL's trainer and ours with the same options; `vllm=True` has them correct for a sampling engine."""
    folder = tmp_path_factory.mktemp("out")
    prompts = datasets.Dataset.from_dict({"prompt": ["w2 w3 w4"] * 8})

    def made(cls: type, vllm: bool, *, model: Any = None, peft_config: Any = None, processing_class: Any = None,
             **options: Any) -> Any:  # fmt: skip
        defaults: dict[str, Any] = {
            "output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": "none", "num_generations": 2,
            "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_completion_length": LENGTH + 2,
            "temperature": 0.7,
        }  # fmt: skip
        trainer = cls(
            model=str(model_path) if model is None else copy.deepcopy(model), peft_config=peft_config,
            reward_funcs=lambda completions, **_: [0.0] * len(completions), processing_class=processing_class,
            args=trl.GRPOConfig(**(defaults | options)), train_dataset=prompts,
        )  # fmt: skip
        trainer.use_vllm = trainer.args.use_vllm = vllm
        trainer.current_gradient_accumulation_steps = 2
        trainer.model.train()
        return trainer

    return lambda vllm=False, **options: (made(trl.GRPOTrainer, vllm, **options), made(Trainer, vllm, **options))


def batch_for(trainer: Any, seed: int = 0, drift: float = 0.4, per_token: bool = False) -> dict[str, Any]:
    """A batch as `_generate_and_score_completions` returns it, off policy by `drift` nats a token.

    One completion counts no token, as truncated ones do; one has words of a tool in it.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise() -> torch.Tensor:
        return drift * torch.randn(BATCH, LENGTH, generator=generator)

    lengths = torch.tensor([LENGTH, 3, 1, 5, 0])
    inputs: dict[str, Any] = {
        "prompt_ids": torch.randint(2, VOCAB, (BATCH, PROMPT), generator=generator),
        "prompt_mask": torch.tensor([[1, 1, 1], [0, 1, 1], [1, 1, 1], [0, 0, 1], [1, 1, 1]]),
        "completion_ids": torch.randint(2, VOCAB, (BATCH, LENGTH), generator=generator),
        "completion_mask": (torch.arange(LENGTH) < lengths[:, None]).long(),
        "advantages": torch.randn(BATCH, LENGTH, generator=generator) if per_token else
        torch.tensor([1.3, -0.8, 0.5, -1.1, 0.0]),
        "num_items_in_batch": torch.tensor(29),
    }  # fmt: skip
    inputs["tool_mask"] = torch.ones_like(inputs["completion_mask"])
    inputs["tool_mask"][0, 2:4] = 0
    with torch.no_grad():
        logprobs, _, _ = trl.GRPOTrainer._get_per_token_logps_and_entropies(
            trainer, trainer.model, torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1), LENGTH,
        )  # fmt: skip
    inputs["old_per_token_logps"] = logprobs + noise()
    if trainer.beta:
        inputs["ref_per_token_logps"] = logprobs + noise()
    if trainer.use_vllm:
        inputs["sampling_per_token_logps"] = inputs["old_per_token_logps"] + noise() / 3
        inputs["sampling_per_token_logps"][0, 0] = float("nan")
        inputs["importance_sampling_ratio"] = trl_ratio(trainer.args, inputs)
    return inputs


def trl_ratio(args: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """`importance_sampling_ratio` as TRL 1.16 makes it in `_generate_and_score_completions`."""
    mask = inputs["completion_mask"] * inputs["tool_mask"]
    log_ratio = ((inputs["old_per_token_logps"] - inputs["sampling_per_token_logps"]) * mask).nan_to_num(nan=0.0)
    if args.vllm_importance_sampling_mode.startswith("sequence"):
        log_ratio = log_ratio.sum(-1, keepdim=True)
    ratio = log_ratio.exp()
    low, high = args.vllm_importance_sampling_clip_min, args.vllm_importance_sampling_clip_max
    if args.vllm_importance_sampling_mode.endswith("truncate"):
        return ratio.clamp(low, high)
    outside = (ratio < (-math.inf if low is None else low)) | (ratio > (math.inf if high is None else high))
    return ratio.masked_fill(outside, 0.0)


def gradients(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def run(trainer: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
    """Loss, gradients of all parameters and logged metrics of one `_compute_loss`."""
    trainer._metrics["train"].clear()
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, copy.deepcopy(inputs))
    loss.backward()
    return (
        loss.detach(),
        gradients(trainer.model),
        {name: value[-1] for name, value in trainer._metrics["train"].items()},
    )


def assert_same(theirs: Any, ours: Any, inputs: dict[str, Any]) -> None:
    loss, gradient, metrics = run(theirs, inputs)
    our_loss, our_gradient, our_metrics = run(ours, inputs)
    assert gradient.norm() > 1e-3
    torch.testing.assert_close(our_loss, loss, rtol=1e-5, atol=1e-6)
    assert (our_gradient - gradient).norm() <= 1e-5 * gradient.norm()
    assert our_metrics == pytest.approx(metrics, rel=1e-5, abs=1e-6, nan_ok=True)


CASES: list[dict[str, Any]] = [
    *({"loss_type": kind} for kind in LOSS_TYPES),
    *({"loss_type": kind, "beta": 0.3} for kind in LOSS_TYPES),
    *({"loss_type": kind, "beta": 0.3, "use_bias_correction_kl": False} for kind in LOSS_TYPES),
    *({"loss_type": kind, "epsilon": 0.1, "epsilon_high": 0.28} for kind in LOSS_TYPES),
    {"loss_type": "cispo", "epsilon_high": 5.0},
    {"loss_type": "sapo", "sapo_temperature_pos": 0.7, "sapo_temperature_neg": 2.0},
    *({"loss_type": kind, "delta": 1.5, "beta": 0.1} for kind in ("grpo", "bnpo", "dr_grpo", "dapo")),
    *({"loss_type": kind, "importance_sampling_level": "sequence", "beta": 0.1} for kind in LOSS_TYPES),
    {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
    *({"loss_type": kind, "off_policy_mask_threshold": 0.05} for kind in ("grpo", "dapo", "cispo")),
    {"loss_type": "bnpo", "entropy_coef": 0.2},
    {"loss_type": "grpo", "cast_lm_head_to_fp32": True},
    *({"loss_type": kind, "vllm": True, "vllm_importance_sampling_mode": mode, "beta": 0.1}
      for kind, mode in itertools.product(("grpo", "dapo", "cispo", "sapo"), MODES)),
    *({"loss_type": "dapo", "vllm": True, "vllm_importance_sampling_mode": mode,
       "vllm_importance_sampling_clip_max": high, "vllm_importance_sampling_clip_min": low}
      for mode in MODES for high, low in ((1.2, 0.8), (None, 0.8))),
    {"loss_type": "dapo", "vllm": True, "off_policy_mask_threshold": 0.05},
    {"loss_type": "dapo", "vllm": True, "vllm_importance_sampling_correction": False,
     "off_policy_mask_threshold": 0.05},
]  # fmt: skip


def name_of(case: dict[str, Any]) -> str:
    return "-".join(str(value) if isinstance(value, str) else f"{key}={value}" for key, value in case.items())


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_equal_to_trl(make: Make, case: dict[str, Any]) -> None:
    theirs, ours = make(**case)
    for seed in range(3):
        assert_same(theirs, ours, batch_for(theirs, seed))


def test_equal_to_trl_on_policy_with_advantages_of_tokens_and_in_evaluation(make: Make) -> None:
    theirs, ours = make(loss_type="dapo", beta=0.1)
    assert_same(theirs, ours, batch_for(theirs, 3, per_token=True))
    inputs = batch_for(theirs, 4)
    del inputs["old_per_token_logps"], inputs["tool_mask"]
    assert_same(theirs, ours, inputs)
    for trainer in (theirs, ours):
        trainer.model.eval()
    with torch.no_grad():
        losses = [trainer._compute_loss(trainer.model, inputs) for trainer in (theirs, ours)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
    assert ours._metrics["eval"] == {name: pytest.approx(value) for name, value in theirs._metrics["eval"].items()}


@pytest.mark.parametrize("kind", ["grpo", "bnpo", "dapo"])
def test_batches_of_one_and_of_nothing(make: Make, kind: str) -> None:
    theirs, ours = make(loss_type=kind, beta=0.1)
    inputs = batch_for(theirs)
    one = {name: value[:1] if value.ndim else value for name, value in inputs.items()}
    assert_same(theirs, ours, one)
    inputs["completion_mask"] = torch.zeros_like(inputs["completion_mask"])
    loss, gradient, metrics = run(ours, inputs)
    assert loss == 0 and not gradient.any()
    assert metrics["entropy"] == metrics["kl"] == 0
    assert run(theirs, inputs)[0] == 0


@pytest.mark.parametrize(("high", "low"), [(3.0, None), (1.2, 0.8), (None, 0.9)])
@pytest.mark.parametrize("mode", MODES)
def test_the_correction_made_here_is_the_one_trl_makes(
    make: Make, mode: str, high: float | None, low: float | None
) -> None:
    limits = {"vllm_importance_sampling_clip_max": high, "vllm_importance_sampling_clip_min": low}
    theirs, ours = make(True, loss_type="grpo", vllm_importance_sampling_mode=mode, **limits)
    inputs = batch_for(theirs)
    loss, gradient, _ = run(theirs, inputs)
    del inputs["importance_sampling_ratio"]
    our_loss, our_gradient, _ = run(ours, inputs)
    torch.testing.assert_close(our_loss, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(our_gradient, gradient, rtol=1e-4, atol=1e-5 * float(gradient.norm()))


@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize("kind", LOSS_TYPES)
def test_from_logits(make: Make, kind: str, shifted: bool) -> None:
    theirs, _ = make(loss_type=kind, beta=0.1)
    inputs = batch_for(theirs)
    loss, gradient, _ = run(theirs, inputs)
    theirs.model.zero_grad()
    logits = theirs.model(
        input_ids=torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
        attention_mask=torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1), logits_to_keep=LENGTH + 1,
    ).logits  # fmt: skip
    ours, outputs = trl_grpo_loss(logits[:, :-1] if shifted else logits, inputs, theirs.args, accumulation_steps=2)
    ours.backward()
    torch.testing.assert_close(ours.detach(), loss, rtol=1e-5, atol=1e-6)
    assert (gradients(theirs.model) - gradient).norm() <= 1e-5 * gradient.norm()
    assert outputs.logprobs.shape == outputs.entropy.shape == (BATCH, LENGTH)


def test_several_processes_share_the_tokens_of_a_step(make: Make) -> None:
    theirs, _ = make(loss_type="dapo")
    inputs = batch_for(theirs)
    hidden, weight = torch.randn(BATCH, LENGTH, 8), torch.randn(VOCAB, 8)
    losses = [
        trl_linear_grpo_loss(hidden, weight, inputs, theirs.args, accumulation_steps=2, processes=processes)[0]
        for processes in (1, 4)
    ]
    torch.testing.assert_close(losses[1], 4 * losses[0])


SCALED: list[tuple[str, dict[str, Any]]] = [
    ("Gemma2", {"final_logit_softcapping": 2.0, "head_dim": 8, "tie_word_embeddings": True}),
    ("Cohere", {"logit_scale": 0.25}),
    ("Granite", {"logits_scaling": 3.0}),
    ("Qwen2", {"tie_word_embeddings": False}),
]


@pytest.mark.parametrize(("family", "options"), SCALED, ids=[family for family, _ in SCALED])
def test_models_that_scale_or_cap_their_logits(
    make: Make, model_path: Path, family: str, options: dict[str, Any]
) -> None:
    config = getattr(transformers, f"{family}Config")(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, initializer_range=0.6, pad_token_id=0, bos_token_id=None, eos_token_id=1, **options,
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    pair = make(model=model, processing_class=PreTrainedTokenizerFast.from_pretrained(model_path), loss_type="grpo")
    assert_same(*pair, batch_for(pair[0]))


def test_scaling_by_each_name() -> None:
    def of(**fields: Any) -> Any:
        config = SimpleNamespace(**{"model_type": "any", **fields})
        config.get_text_config = lambda: config
        return output_scaling(config)

    assert of() == of(logit_scale=None) == (1.0, None)
    assert of(lm_head_multiplier=0.5) == of(output_multiplier=0.5) == of(logits_scaling=2.0) == (0.5, None)
    assert of(logits_scaling=2.0, final_logit_softcapping=30.0) == (0.5, 30.0)
    assert of(logits_scaling=2.0, model_type="hyperclovax") == (2.0, None)


def test_adapters_train_and_the_frozen_output_layer_gets_no_gradient(make: Make) -> None:
    lora = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
    torch.manual_seed(0)
    theirs, ours = make(loss_type="grpo", peft_config=lora)
    ours.model.load_state_dict(theirs.model.state_dict())
    inputs = batch_for(theirs)
    found = []
    for trainer in (theirs, ours):
        trainer._compute_loss(trainer.model, inputs).backward()
        found.append({name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad})
    assert found[0].keys() == found[1].keys() and all("lora" in name for name in found[1])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


def test_trains(make: Make) -> None:
    _, trainer = make(loss_type="dapo", beta=0.05, max_steps=2, learning_rate=0.05, logging_steps=1, num_iterations=2,
                      save_strategy="no", disable_tqdm=True)  # fmt: skip
    trainer.reward_funcs[0] = lambda completions, **_: [float(len(text) % 3) for text in completions]
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    assert any(not torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    logged = trainer.state.log_history[0]
    assert {"loss", "grad_norm", "kl", "entropy", "clip_ratio/region_mean", "clip_ratio/low_min"} <= logged.keys()
    assert math.isfinite(logged["loss"])


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("loss_type = 'luspo'", {"loss_type": "luspo"}),
    ("loss_type = 'vespo'", {"loss_type": "vespo"}),
    ("top_entropy_quantile = 0.2", {"top_entropy_quantile": 0.2}),
    ("use_adaptive_entropy = True", {"use_adaptive_entropy": True}),
    ("entropy_coef = 0.1", {"loss_type": "grpo", "entropy_coef": 0.1}),
    ("delta = 1.1", {"delta": 1.1}),
    ("delta = 3.0", {"loss_type": "cispo", "delta": 3.0}),
    ("ratio_level = .word", {"importance_sampling_level": "word"}),
    ("router_aux_loss_coef = 0.1", {"router_aux_loss_coef": 0.1}),
    ("vllm_importance_sampling_mode = 'word'", {"vllm": True, "vllm_importance_sampling_mode": "word"}),
    ("correction_cap", {"vllm": True, "vllm_importance_sampling_clip_max": 0.0}),
    ("kl_coef = -1", {"beta": -1.0}),
]


@pytest.mark.parametrize(("message", "options"), REFUSED, ids=[message for message, _ in REFUSED])
def test_refuses_what_it_cannot_honour(message: str, options: dict[str, Any]) -> None:
    vllm = options.pop("vllm", False)
    args = trl.GRPOConfig(use_cpu=True, bf16=False, report_to="none", **options)
    args.use_vllm = vllm
    with pytest.raises(ValueError, match=message):
        loss_config(args)


def test_the_trainer_refuses_when_it_is_made(make: Make) -> None:
    with pytest.raises(ValueError, match="top_entropy_quantile"):
        make(top_entropy_quantile=0.5)


def test_another_release_of_trl_warns(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.17.0" if name == "trl" else found(name))
    with pytest.warns(UserWarning, match=r"follows TRL 1\.16\.x, and 1\.17\.0 is installed"):
        make(loss_type="grpo")


def test_fields_that_are_not_there_are_not_in_use() -> None:
    assert loss_config(SimpleNamespace(loss_type="grpo", epsilon=0.3)).clip_high == 0.3

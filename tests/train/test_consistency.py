"""The consistency bonus: which tokens are the answer, how likely they are, who is paid; and what the average is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.convert_slow_tokenizer import bytes_to_unicode

from medbridge.data import ImageCache, Item, PromptSettings, grade, permutation
from medbridge.errors import MedbridgeError
from medbridge.model import LoraSettings, ModelSettings, Policy
from medbridge.rollout import Graded, Request, Rollout
from medbridge.train import RlSettings
from medbridge.train.consistency import MOST_LIKELY, answer_of, answer_tokens, bonuses
from medbridge.train.groups import Batch, Group
from medbridge.train.learner import Learner
from medbridge.train.optimization import Trainable
from medbridge.train.reference import computing_as, first_model
from medbridge.train.rewards import reward

PROMPT = PromptSettings(answer_style="text", system="")
LIMIT = 64

# -- who is paid ---------------------------------------------------------------------------------------------------


def test_right_ones_are_compared_with_right_ones_of_their_group() -> None:
    groups: list[list[float | None]] = [
        [0.9, None, 0.2, None],  # mean of the right ones: 0.55
        [None, None, None],
        [0.01],  # alone: it is its own mean
        [],
        [0.3, 0.5, 0.4],
    ]
    assert bonuses(groups, 0.5, 0.0) == [[0.5, 0.0, 0.0, 0.0], [0.0] * 3, [0.5], [], [0.0, 0.5, 0.5]]
    assert bonuses(groups, 0.5, 0.1)[4] == [0.5, 0.5, 0.5]
    assert bonuses(groups, 2.0, 0.36)[0] == [2.0, 0.0, 2.0, 0.0]


def test_equal_completions_are_paid_alike_whatever_their_rounding() -> None:
    generator = np.random.default_rng(0)
    for likelihood in (0.1, 0.7, MOST_LIKELY):
        group = [likelihood + generator.normal(0, 1e-6) for _ in range(7)]
        assert bonuses([group], 0.5, 0.01) == [[0.5] * 7]


# -- which tokens --------------------------------------------------------------------------------------------------

TEXTS = (
    "<think>a bright square</think><answer>left</answer>",
    "<think>größer als 3 µm, naïve 🩻🫁 → 肺炎</think><answer>肺炎 🩻</answer>",
    "<answer>🫁</answer>",
    "<answer>\u0301e\u0301</answer> \n\n",  # combining marks
    "xleft",
)


def rollout_of(ids: Sequence[int], text: str) -> Rollout:
    logprobs = np.zeros(len(ids), dtype=np.float32)
    return Rollout("item", 0, (), text, np.array(ids), logprobs, "stop", 0)


def bytes_of(policy: Policy, token: int) -> bytes:
    """What a token of a byte-level tokenizer writes; nothing for a special one."""
    if token in policy.tokenizer.all_special_ids:
        return b""
    back = {character: byte for byte, character in bytes_to_unicode().items()}
    return bytes(back[character] for character in policy.tokenizer.convert_ids_to_tokens(token))


@pytest.mark.parametrize("text", TEXTS)
def test_the_answer_is_all_tokens_that_write_a_byte_of_it(text: str, load_policy: Callable[..., Policy]) -> None:
    """Against the bytes of each token: every span of every text, some of whose characters take several tokens."""
    policy = load_policy("qwen2_5_vl")
    special = policy.stop_ids[0]
    ids = policy.tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = [special, *ids[: len(ids) // 2], special, special, *ids[len(ids) // 2 :], special]
    assert policy.decode(ids) == text
    ends = np.cumsum([len(bytes_of(policy, token)) for token in ids])
    starts = np.array([0, *ends[:-1]])
    for start in range(len(text)):
        for end in range(start + 1, len(text) + 1):
            low, high = len(text[:start].encode()), len(text[:end].encode())
            own = np.flatnonzero((starts < high) & (ends > low) & (ends > starts))
            found = answer_tokens(policy.decode, rollout_of(ids, text), (start, end))
            assert found == (own[0], own[-1] + 1), text[start:end]


@pytest.mark.parametrize("architecture", ["gemma3", "qwen3_vl"])
def test_answers_are_found_with_any_tokenizer(architecture: str, load_policy: Callable[..., Policy]) -> None:
    policy = load_policy(architecture)
    for text in TEXTS[:3]:
        ids = policy.completion_ids(text)
        if policy.decode(ids) != text:  # characters that this tokenizer can't write
            continue
        at = text.index("<answer>") + len("<answer>")
        start, end = answer_tokens(policy.decode, rollout_of(ids, text), (at, text.index("</answer>")))
        assert text[at : text.index("</answer>")] in policy.decode(ids[start:end])
        assert len(policy.decode(ids[:start])) <= at < len(policy.decode(ids[: start + 1]))


def test_a_text_that_was_cut_at_a_stop_text_keeps_its_answer(load_policy: Callable[..., Policy]) -> None:
    policy = load_policy()
    whole = "<answer>left</answer> END and more"
    ids = policy.completion_ids(whole)
    cut = rollout_of(ids, whole[: whole.index("END")])
    assert answer_tokens(policy.decode, cut, (8, 12)) == answer_tokens(policy.decode, rollout_of(ids, whole), (8, 12))


def test_a_text_that_its_tokens_did_not_write_is_refused(load_policy: Callable[..., Policy]) -> None:
    policy = load_policy()
    ids = policy.completion_ids("<answer>left</answer>")
    for text, span in (("<answer>right</answer>", (8, 13)), ("<answer>left</answer> and so on", (22, 25))):
        with pytest.raises(MedbridgeError, match=r"item 'item', sample 0: its text is not what its tokens say"):
            answer_tokens(policy.decode, rollout_of(ids, text), span)
    with pytest.raises(MedbridgeError, match="not what its tokens say"):
        answer_tokens(policy.decode, rollout_of([], "left"), (0, 4))


# -- how likely, under what ----------------------------------------------------------------------------------------


def batch_of(policy: Policy, items: Sequence[Item], texts: Sequence[str]) -> Batch:
    """A group an item, of the texts with the item's right answer at RIGHT and a wrong one at WRONG."""
    groups = []
    for item in items:
        order = permutation(item, 0, 1)
        assert item.options is not None
        wrong = next(option for option in item.options if option != item.answer)
        graded = []
        for number, text in enumerate(texts):
            said = text.replace("RIGHT", item.answer).replace("WRONG", wrong)
            ids = np.array(policy.completion_ids(said))
            logprobs = np.full(len(ids), -1.0, dtype=np.float32)
            rollout = Rollout(item.id, number, order, said, ids, logprobs, "stop", 10)
            outcome = grade(item, order, said, PROMPT)
            graded.append(Graded(rollout, outcome, reward(outcome, 0.1)))
        groups.append(Group(Request(item, tuple(range(len(texts))), (order,) * len(texts)), tuple(graded)))
    return Batch(groups, [], len(groups), 0, 0.0)


COMPLETIONS = (
    "<think>it is RIGHT</think><answer>RIGHT</answer>",
    "<think>it is WRONG, naïve 肺</think><answer> RIGHT</answer>",
    "<think>it is RIGHT</think><answer>WRONG</answer>",
    "<answer>RIGHT</answer> and more",
    "perhaps it is RIGHT",
    "<think>RIGHT RIGHT RIGHT</think><answer>RIGHT</answer>",
)


def naive_likelihood(policy: Policy, model: Any, item: Item, entry: Graded, images: ImageCache) -> float:
    """By transformers' own forward pass of one row; the answer's tokens by the text of each prefix, one by one."""
    [prompt] = policy.encode(item, [entry.rollout.permutation], PROMPT, images)
    ids = entry.rollout.token_ids.tolist()
    tokens = torch.cat([prompt.ids, torch.tensor(ids)])[None]
    types = {}
    if prompt.type_ids is not None:
        types = policy.type_argument(torch.cat([prompt.type_ids, torch.zeros(len(ids), dtype=torch.long)])[None])
    with torch.no_grad():
        logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), **types, **prompt.vision).logits[0]
    logits[:, policy.banned] = -1e9
    logprobs = (logits[len(prompt.ids) - 1 : -1] / 0.8).log_softmax(-1)
    assert entry.outcome.span is not None
    start, end = entry.outcome.span
    before = [len(policy.decode(ids[:count])) for count in range(len(ids) + 1)]
    own = [n for n in range(len(ids)) if before[n] < end and before[n + 1] > start]
    return min(float(np.exp(np.mean([float(logprobs[n, ids[n]]) for n in own]))), MOST_LIKELY)


def moved(policy: Policy, seed: int, size: float = 0.05) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize(
    ("architecture", "lora"), [("qwen2_5_vl", None), ("gemma3", None), ("qwen2_5_vl", LoraSettings(dropout=0.5))]
)
def test_the_bonus_goes_to_answers_that_the_average_finds_likely(
    architecture: str, lora: LoraSettings | None, load_policy: Callable[..., Policy], train_items: list[Item],
    images: ImageCache,
) -> None:  # fmt: skip
    """Rewards of exactly the right completions, by a loop over plain forward passes of a copy with the average."""
    policy = load_policy(architecture, trainable=True, lora=lora)
    settings = RlSettings(
        completions=6, temperature=0.8, micro_batch_size=4, consistency_weight=0.5, consistency_margin=0.0,
        ema_decay=0.6,
    )  # fmt: skip
    trainable = Trainable(policy, ModelSettings(lora=lora), settings, 1, seed=0)
    average = trainable.keep_average(0.6)
    learner = Learner(policy, settings, PROMPT, images, LIMIT)
    moved(policy, 0, 0.1)
    average.update()
    moved(policy, 1, 0.1)
    items = train_items[:3]
    batch = batch_of(policy, items, COMPLETIONS)
    reference = copy.deepcopy(policy.model).eval()
    named = dict(reference.named_parameters())
    prefix = "" if lora is None else "base_model.model."
    with torch.no_grad():
        for name, value in average.averages.items():
            named[name.removeprefix(prefix)].copy_(value)
    expected, likelihoods = [], []
    for item, group in zip(items, batch.groups, strict=True):
        right = [entry.outcome.status == "correct" for entry in group.graded]
        assert right == [True, True, False, True, False, True]
        found = [
            naive_likelihood(policy, reference, item, entry, images) if is_right else None
            for entry, is_right in zip(group.graded, right, strict=True)
        ]
        own = [value for value in found if value is not None]
        likelihoods += own
        assert min(abs(value - np.mean(own)) for value in own) > 1e-6  # no tie that rounding could decide
        paid = [value is not None and value >= np.mean(own) for value in found]
        assert 0 < sum(paid) < len(own)
        expected.append([r + 0.5 * p for r, p in zip(group.rewards, paid, strict=True)])
    before = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    rewards, metrics = learner._rewards(batch, learner._encode(batch), trainable)
    assert [pytest.approx(own) for own in expected] == rewards
    assert metrics["answer_likelihood"] == pytest.approx(np.mean(likelihoods), rel=1e-4)
    assert metrics["consistency_bonus"] == pytest.approx(
        np.sum(expected) / 18 - np.mean([g.rewards for g in batch.groups])
    )
    assert policy.model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.model.state_dict().items())
    # the policy itself finds other answers likely: it is not what was asked
    others = [
        naive_likelihood(policy, policy.model.eval(), item, group.graded[0], images)
        for item, group in zip(items, batch.groups, strict=True)
    ]
    assert max(abs(a / b - 1) for a, b in zip(others, likelihoods[::4], strict=True)) > 0.1


def test_a_completion_without_a_right_answer_has_none_to_look_at(
    load_policy: Callable[..., Policy], train_items: list[Item], images: ImageCache
) -> None:
    policy = load_policy()
    batch = batch_of(policy, train_items[:1], COMPLETIONS)
    [prompt] = Learner(policy, RlSettings(), PROMPT, images, LIMIT)._encode(batch)
    answers = [answer_of(policy, prompt, entry) for entry in batch.groups[0].graded]
    assert [answer is None for answer in answers] == [False, False, True, False, True, False]
    for answer in answers:
        if answer is not None:
            assert train_items[0].answer in policy.decode(answer.ids[answer.start : answer.end])


def test_a_step_without_a_right_answer_has_no_bonus(
    load_policy: Callable[..., Policy], train_items: list[Item], images: ImageCache
) -> None:
    policy = load_policy(trainable=True)
    settings = RlSettings(completions=4, consistency_weight=0.5)
    trainable = Trainable(policy, ModelSettings(), settings, 1, seed=0)
    trainable.keep_average(0.9)
    learner = Learner(policy, settings, PROMPT, images, LIMIT)
    for items, texts in ((train_items[:2], ["<answer>WRONG</answer>", "RIGHT"]), ([], [])):
        batch = batch_of(policy, items, texts)
        rewards, metrics = learner._rewards(batch, learner._encode(batch), trainable)
        assert rewards == [group.rewards for group in batch.groups]
        assert metrics == {"consistency_bonus": 0.0}


def test_the_bonus_alone_can_teach(
    load_policy: Callable[..., Policy], train_items: list[Item], images: ImageCache
) -> None:
    """All are right and well-formed, and only the bonus tells them apart."""
    policy = load_policy(trainable=True)
    items = [item for item in train_items if item.answer in ("left", "right")][:2]
    texts = ["<think>it is RIGHT</think><answer>RIGHT</answer>", "<answer>RIGHT</answer>"] * 2
    norms = {}
    for weight in (0.0, 0.5):
        more: dict[str, Any] = {"consistency_weight": weight, "consistency_margin": 0.0} if weight else {}
        settings = RlSettings(completions=4, warmup_steps=0, learning_rate=1e-9, **more)
        trainable = Trainable(policy, ModelSettings(), settings, 1, seed=0)
        trainable.keep_average(0.9)
        moved(policy, 3)
        metrics = Learner(policy, settings, PROMPT, images, LIMIT).update(1, batch_of(policy, items, texts), trainable)
        norms[weight] = metrics.get("gradient_norm", 0.0)
    assert norms[0.0] == 0.0 and norms[0.5] > 0


# -- the average ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("every", "lora"), [(1, None), (3, None), (1, LoraSettings(rank=4))])
def test_the_average_moves_with_the_updates_of_a_stage(
    every: int, lora: LoraSettings | None, formed: Path, load_policy: Callable[..., Policy], rl: Callable[..., Any],
    train_items: list[Item], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """ref = d ref + (1 - d) policy after each update of a real run, from the weights that were there then."""
    kept: list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]] = []
    step_of = Trainable.step

    def step(self: Trainable, *arguments: Any) -> Any:
        def copies() -> Any:
            assert self.average is not None
            parameters = {name: p.detach().clone() for name, p in self.parameters.items()}
            return parameters, {name: a.clone() for name, a in self.average.averages.items()}

        if not kept:
            kept.append(copies())
        metrics = step_of(self, *arguments)
        kept.append(copies())
        return metrics

    monkeypatch.setattr(Trainable, "step", step)
    rl(
        load_policy(path=formed, trainable=True, lora=lora), train_items, steps=7, kl_coefficient=0.1,
        kl_reference="ema", ema_decay=0.9, ema_every=every, model=ModelSettings(lora=lora),
    )  # fmt: skip
    assert len(kept) == 8
    first = expected = {name: value.double() for name, value in kept[0][0].items()}
    for number, (policy, average) in enumerate(kept):
        if number and number % every == 0:
            expected = {name: 0.9 * value + 0.1 * policy[name].double() for name, value in expected.items()}
        for name, value in average.items():
            torch.testing.assert_close(value.double(), expected[name], atol=1e-7, rtol=1e-6)
    assert any(not torch.equal(expected[name], value) for name, value in first.items())


def test_the_kl_term_pulls_towards_the_average(
    load_policy: Callable[..., Policy], train_items: list[Item], images: ImageCache
) -> None:
    """As towards a first model with the very weights of the average."""
    gradients = {}
    for reference in ("first", "ema"):
        policy = load_policy(trainable=True)
        settings = RlSettings(
            completions=6, kl_coefficient=0.5, kl_reference=reference, warmup_steps=0, max_gradient_norm=1e9
        )
        moved(policy, 0)
        learner = Learner(policy, settings, PROMPT, images, LIMIT)  # a first model keeps these
        trainable = Trainable(policy, ModelSettings(), settings, 1, seed=0)
        trainable.keep_average(0.995)  # and an average begins at them
        moved(policy, 1)
        caught: dict[str, torch.Tensor] = {}

        def catch(step: int, loss: float, caught: Any = caught, policy: Policy = policy) -> dict[str, float]:
            caught |= {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None}
            return {}

        trainable.step = catch  # type: ignore[method-assign, assignment]
        metrics = learner.update(1, batch_of(policy, train_items[:2], COMPLETIONS), trainable)
        assert metrics["kl"] > 1e-3
        gradients[reference] = caught
    assert gradients["first"].keys() == gradients["ema"].keys()
    assert all(torch.equal(value, gradients["ema"][name]) for name, value in gradients["first"].items())


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=4, dropout=0.5)])
def test_the_first_model_is_that_of_a_whole_copy(
    lora: LoraSettings | None, load_policy: Callable[..., Policy], train_items: list[Item], images: ImageCache
) -> None:
    """Bit by bit, and what is trained stands as it did; with adapters nothing is copied at all."""
    policy = load_policy(trainable=True, lora=lora)
    whole = copy.deepcopy(policy.model).eval()
    settings = RlSettings(completions=6, kl_coefficient=0.5, temperature=0.8)
    trainable = Trainable(policy, ModelSettings(lora=lora), settings, 1, seed=0)
    learner = Learner(policy, settings, PROMPT, images, LIMIT)
    moved(policy, 0)
    batch = batch_of(policy, train_items[:2], COMPLETIONS)
    rows = learner._rows(batch, learner._encode(batch), [group.rewards for group in batch.groups], 1)
    before = {name: p.detach().clone() for name, p in trainable.parameters.items()}
    for _, packed in learner._micro_batches(rows):
        found = learner._reference_logprobs(packed, trainable)
        assert found is not None and not found.requires_grad
        own, policy.model = policy.model, whole
        with torch.no_grad():
            expected = learner.loss.logprobs(policy.packed_hidden(packed), packed.labels)
        policy.model = own
        assert torch.equal(found, expected)
        now = learner.loss.logprobs(policy.packed_hidden(packed), packed.labels)
        assert float((now.detach() - found).abs().max()) > 1e-3 and now.requires_grad
    assert policy.model.training
    for name, parameter in trainable.parameters.items():
        assert torch.equal(parameter, before[name]) and parameter.requires_grad
    if lora is not None:
        held = [p for p in policy.model.parameters() if not p.requires_grad]
        assert held and sum(p.numel() for p in trainable.parameters.values()) < sum(p.numel() for p in held)
        assert not any(isinstance(value, torch.Tensor) for value in _closure(learner.first))


def _closure(function: Any) -> list[Any]:
    return [cell.cell_contents for cell in function.__closure__ or ()]


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=4, dropout=0.1)])
@pytest.mark.parametrize("reference", ["first", "ema"])
def test_references_go_with_activations_that_are_computed_again(
    reference: str, lora: LoraSettings | None, formed: Path, load_policy: Callable[..., Policy],
    rl: Callable[..., Any], train_items: list[Item], tmp_path: Path,
) -> None:  # fmt: skip
    """Gradient checkpointing runs layers once more in the backward pass, behind the reference's own: the same bits."""
    ends = []
    for again in (False, True):
        policy = load_policy(path=formed, trainable=True, lora=lora)
        model = ModelSettings(lora=lora, gradient_checkpointing=again)
        rl(
            policy, train_items, model=model, checkpoints=tmp_path / str(again), steps=3, updates_per_batch=2,
            kl_coefficient=0.1, kl_reference=reference, consistency_weight=0.5, ema_decay=0.5,
        )  # fmt: skip
        ends.append({name: tensor.clone() for name, tensor in policy.model.state_dict().items()})
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_a_reference_gives_back_what_it_took_when_it_fails(
    load_policy: Callable[..., Policy], images: ImageCache
) -> None:
    for lora in (None, LoraSettings(rank=4)):
        policy = load_policy(trainable=True, lora=lora)
        trainable = Trainable(policy, ModelSettings(lora=lora), RlSettings(), 1, seed=0)
        first = first_model(policy)
        moved(policy, 0)
        before = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
        with pytest.raises(RuntimeError, match="half-way"), computing_as(policy, first):
            raise RuntimeError("half-way")
        assert policy.model.training and torch.is_grad_enabled()
        assert all(torch.equal(tensor, before[name]) for name, tensor in policy.model.state_dict().items())
        assert all(parameter.requires_grad for parameter in trainable.parameters.values())

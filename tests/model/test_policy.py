"""The loaded model: prompts are encoded as the processor itself does, and logits are those of the plain model."""

from __future__ import annotations

import dataclasses
import itertools
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from medbridge.data import ImageCache, Item, PromptSettings, build_prompt, load_image, target_completion
from medbridge.errors import MedbridgeError
from medbridge.model import ModelSettings, Policy
from medbridge.model.policy import BANNED_LOGIT

ARCHITECTURES = ("qwen2_5_vl", "qwen2_vl", "qwen3_vl", "gemma3")
PROMPT = PromptSettings(answer_style="text", system="")


@pytest.fixture(scope="module")
def kinds_of_item(train_items: list[Item], odd_pictures: list[str]) -> dict[str, Item]:
    """One image, several of different shapes, none; with options and open."""
    paths = odd_pictures
    one = train_items[0]

    def make(name: str, **changes: Any) -> Item:
        return dataclasses.replace(one, id=f"kinds/train/{name}", **changes)

    return {
        "one": make("one"),
        "wide": make("wide", images=(paths[1],)),
        "several": make("several", images=tuple(paths)),
        "none": make("none", images=()),
        "open": make("open", options=None, floor=0.0),
        "open, none": make("open-none", options=None, images=(), floor=0.0),
        "awkward": make("awkward", question="\n\n  <what>? 1\n\n2", options=(" x", "é\n", "dark"), answer="dark"),
    }


def orders_of(item: Item) -> list[tuple[int, ...]]:
    return [()] if item.options is None else list(itertools.permutations(range(len(item.options))))


def reference(policy: Policy, item: Item, order: tuple[int, ...], prompt: PromptSettings) -> dict[str, torch.Tensor]:
    """What the processor gives for the whole prompt, encoded by itself."""
    processor = AutoProcessor.from_pretrained(policy.path)
    text = processor.apply_chat_template(build_prompt(item, order, prompt), tokenize=False, add_generation_prompt=True)
    pictures = [load_image(path) for path in item.images]
    special = {"add_special_tokens": False} if text.startswith("<bos>") else {}
    return dict(processor(text=[text], images=[pictures] if pictures else None, return_tensors="pt", **special))


def drop_weight(folder: Path, name: str) -> None:
    """Take a weight out of a model's file."""
    stored = load_file(folder / "model.safetensors")
    del stored[name]
    save_file(stored, folder / "model.safetensors", {"format": "pt"})


# -- encoding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("prompt", [PROMPT, PromptSettings()], ids=["bare", "letters and system"])
def test_each_order_is_encoded_as_the_processor_does(
    architecture: str,
    prompt: PromptSettings,
    load_policy: Callable[..., Policy],
    kinds_of_item: dict[str, Item],
    images: ImageCache,
) -> None:
    policy = load_policy(architecture)
    for item in kinds_of_item.values():
        orders = orders_of(item)
        for order, encoded in zip(orders, policy.encode(item, orders, prompt, images), strict=True):
            whole = reference(policy, item, order, prompt)
            assert torch.equal(encoded.ids, whole["input_ids"][0]), item.id
            assert set(encoded.vision) == set(whole) - {
                "input_ids",
                "attention_mask",
                "mm_token_type_ids",
                "token_type_ids",
            }
            for name, tensor in encoded.vision.items():
                assert torch.equal(tensor, whole[name])
            if encoded.type_ids is not None:
                assert torch.equal(encoded.type_ids, whole[policy._type_key][0])
            positions = torch.arange(len(encoded.ids))[None].expand(3 if policy.uses_mrope else 1, -1)
            if policy.uses_mrope and item.images:
                positions = policy.model.model.get_rope_index(
                    whole["input_ids"],
                    mm_token_type_ids=whole["mm_token_type_ids"],
                    image_grid_thw=whole["image_grid_thw"],
                )[0][:, 0]
            assert torch.equal(encoded.positions, positions), item.id
            assert encoded.next_position == int(positions.max()) + 1


def test_text_of_an_encoded_prompt_shows_one_placeholder_for_each_image(
    load_policy: Callable[..., Policy], kinds_of_item: dict[str, Item], images: ImageCache
) -> None:
    policy = load_policy()
    item = kinds_of_item["several"]
    first, second = policy.encode(item, [(0, 1, 2), (2, 1, 0)], PROMPT, images)
    assert first.text.count("<|image_pad|>") == second.text.count("<|image_pad|>") == 3
    assert "- dark\n- grey\n- bright" in first.text and "- bright\n- grey\n- dark" in second.text


def test_encodings_are_kept_within_their_memory(load_policy: Callable[..., Policy], train_items: list[Item]) -> None:
    loaded = load_policy()
    one_by_one = Policy(loaded.model, loaded.processor, path=loaded.path, compute_dtype=torch.float32, cache_mb=0)
    encoded = {}
    for policy, kept in ((loaded, len(train_items)), (one_by_one, 0)):
        cache = ImageCache(0)
        for _ in range(2):
            for item in train_items:
                encoded[policy, item.id] = policy.encode(item, orders_of(item), PROMPT, cache)
        assert len(policy._cache) == kept
        assert policy._cache_bytes == sum(head.nbytes() for head in policy._cache.values())
    for item in train_items:
        for first, second in zip(encoded[loaded, item.id], encoded[one_by_one, item.id], strict=True):
            assert torch.equal(first.ids, second.ids)


def test_a_prompt_that_fills_the_context_is_refused(
    changed_model: Callable[..., Path], load_policy: Callable[..., Policy], train_items: list[Item], images: ImageCache
) -> None:
    folder = changed_model("qwen2_5_vl", {"config.json": {"text_config": {"max_position_embeddings": 16}}})
    with pytest.raises(MedbridgeError, match=f"item '{train_items[0].id}': its prompt has .* takes 16 with the answer"):
        load_policy(path=folder).encode(train_items[0], [(0, 1, 2)], PROMPT, images)


def test_a_supervised_completion_ends_its_turn_and_decodes_to_itself(load_policy: Callable[..., Policy]) -> None:
    for architecture, end in (("qwen2_5_vl", "<|im_end|>"), ("gemma3", "<end_of_turn>")):
        policy = load_policy(architecture)
        text = "<think>a  b\n</think><answer>left </answer>"
        ids = policy.completion_ids(text)
        assert policy.tokenizer.convert_ids_to_tokens(ids[-1]) == end
        assert policy.decode(ids) == policy.decode(ids[:-1]) == text


def test_stop_and_banned_tokens(load_policy: Callable[..., Policy]) -> None:
    qwen, gemma = load_policy("qwen2_5_vl"), load_policy("gemma3")
    assert qwen.tokenizer.convert_ids_to_tokens(qwen.stop_ids) == ["<|im_end|>"]
    assert qwen.tokenizer.convert_ids_to_tokens(qwen.banned) == ["<|image_pad|>", "<|video_pad|>"]
    assert gemma.tokenizer.convert_ids_to_tokens(gemma.stop_ids) == ["<end_of_turn>", "<eos>"]
    assert gemma.tokenizer.convert_ids_to_tokens(gemma.banned) == ["<image_soft_token>"]


# -- logits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_completion_logits_are_those_of_the_plain_model(
    architecture: str, load_policy: Callable[..., Policy], kinds_of_item: dict[str, Item], images: ImageCache
) -> None:
    policy = load_policy(architecture)
    plain = AutoModelForImageTextToText.from_pretrained(policy.path, attn_implementation="eager")
    items = [item for name, item in kinds_of_item.items() if name != "awkward"]
    prompts = [policy.encode(item, orders_of(item)[-1:], PROMPT, images)[0] for item in items]
    completions = [policy.completion_ids(f"<answer>{'grey' * n}</answer>") for n in range(1, len(items) + 1)]
    batch = policy.collate(prompts, completions)
    with torch.no_grad():
        together = policy.completion_logits(batch)
    assert together.shape == (sum(map(len, completions)), policy.vocab_size)
    at = 0
    for row, (item, completion) in enumerate(zip(items, completions, strict=True)):
        whole = reference(policy, item, orders_of(item)[-1], PROMPT)
        count, length = len(completion), whole["input_ids"].shape[1]
        whole["input_ids"] = torch.cat([whole["input_ids"], torch.tensor([completion])], dim=1)
        whole["attention_mask"] = torch.ones_like(whole["input_ids"])
        for name in ("mm_token_type_ids", "token_type_ids"):
            if name in whole:
                whole[name] = torch.cat([whole[name], torch.zeros(1, count, dtype=whole[name].dtype)], dim=1)
        with torch.no_grad():
            expected = plain(**whole).logits[0, length - 1 : -1]
        found = together[at : at + count]
        assert batch.labels[at : at + count].tolist() == completion
        assert batch.sequence_ids[at : at + count].tolist() == [row] * count
        free = [token for token in range(policy.vocab_size) if token not in policy.banned]
        torch.testing.assert_close(found[:, free], expected[:, free], atol=1e-5, rtol=1e-5)
        assert (found[:, policy.banned] == BANNED_LOGIT).all()
        at += count
    assert at == len(together)


def test_banned_tokens_get_no_probability_and_no_nan(
    load_policy: Callable[..., Policy], train_items: list[Item], images: ImageCache
) -> None:
    policy = load_policy()
    prompt = policy.encode(train_items[0], [(0, 1, 2)], PROMPT, images)
    logits = policy.completion_logits(policy.collate(prompt, [policy.completion_ids("x")]))
    probabilities = logits.softmax(-1)
    assert (probabilities[:, policy.banned] == 0).all()
    entropy = -(probabilities * logits.log_softmax(-1)).sum(-1)
    entropy.sum().backward()
    assert torch.isfinite(entropy).all()
    assert all(torch.isfinite(p.grad).all() for p in policy.model.parameters() if p.grad is not None)


# -- loading and saving --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_saved_policy_loads_to_the_same_weights(
    architecture: str, load_policy: Callable[..., Policy], tmp_path: Path, train_items: list[Item], images: ImageCache
) -> None:
    policy = load_policy(architecture, trainable=True)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(0.01)
    saved = policy.save(tmp_path / "saved")
    again = load_policy(path=saved)
    for (name, old), (other, new) in zip(
        policy.model.state_dict().items(), again.model.state_dict().items(), strict=True
    ):
        assert name == other and torch.equal(old, new)
    item = train_items[0]
    [before], [after] = (p.encode(item, [(1, 0, 2)], PROMPT, images) for p in (policy, again))
    assert torch.equal(before.ids, after.ids) and before.text == after.text
    policy.save(tmp_path / "saved")  # over an existing folder
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved"]


def test_masters_are_held_in_float32_and_saved_in_the_type_the_model_came_in(
    load_policy: Callable[..., Policy], model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    source = AutoModelForImageTextToText.from_pretrained(model_folder("qwen2_5_vl"), dtype=torch.bfloat16)
    source.save_pretrained(tmp_path / "half")
    AutoProcessor.from_pretrained(model_folder("qwen2_5_vl")).save_pretrained(tmp_path / "half")
    policy = load_policy(path=tmp_path / "half", trainable=True, dtype="bfloat16")
    assert {p.dtype for p in policy.model.parameters()} == {torch.float32}
    policy.save(tmp_path / "trained")
    stored = load_file(tmp_path / "trained" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    measured = load_policy(path=tmp_path / "trained", dtype="bfloat16")
    assert {p.dtype for p in measured.model.parameters()} == {torch.bfloat16}


def test_a_tied_model_stays_tied(
    changed_model: Callable[..., Path], load_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    tie = {"tie_word_embeddings": True}
    folder = changed_model("qwen2_5_vl", {"config.json": {**tie, "text_config": tie}})
    drop_weight(folder, "lm_head.weight")
    policy = load_policy(path=folder, trainable=True)
    head, embedding = policy.model.get_output_embeddings(), policy.model.get_input_embeddings()
    assert head.weight.data_ptr() == embedding.weight.data_ptr()
    again = load_policy(path=policy.save(tmp_path / "saved"))
    assert torch.equal(again.model.get_output_embeddings().weight, head.weight)
    assert torch.equal(again.model.get_input_embeddings().weight, head.weight)


def test_half_precision_computes_from_float32_masters(
    load_policy: Callable[..., Policy], train_items: list[Item], images: ImageCache
) -> None:
    full, half = load_policy(), load_policy(trainable=True, dtype="bfloat16")
    outputs = []
    for policy in (full, half):
        batch = policy.collate(
            policy.encode(train_items[0], [(0, 1, 2)], PROMPT, images), [policy.completion_ids("<answer>grey</answer>")]
        )
        outputs.append(policy.completion_logits(batch).float())
    assert half.model.lm_head.weight.dtype == torch.float32
    allowed = [token for token in range(full.vocab_size) if token not in full.banned]
    assert 0 < float((outputs[0] - outputs[1])[:, allowed].detach().abs().max()) < 0.05


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
@pytest.mark.parametrize("checkpointing", [False, True], ids=["activations kept", "checkpointing"])
@pytest.mark.parametrize("trained", [False, True], ids=["measured", "trained"])
def test_freed_memory_is_kept_where_a_cpu_trains_without_checkpointing(
    trained: bool, checkpointing: bool, model_folder: Callable[[str], Path], processes: Any, tmp_path: Path
) -> None:
    script, out, log = Path(__file__).with_name("freed_memory.py"), tmp_path / "kept", tmp_path / "log"
    settings = ModelSettings(device="cpu", gradient_checkpointing=checkpointing).model_dump_json()
    argv = [script, model_folder("qwen2_5_vl"), settings, "trained" if trained else "", out]
    assert processes.wait(processes.start(argv, log)) == 0, log.read_text()
    kept = float(out.read_text())
    assert kept > 0.9 if trained and not checkpointing else kept < 0.5


# -- what can't be loaded ------------------------------------------------------------------------------------------


def refused(path: Path | str, **settings: Any) -> str:
    with pytest.raises(MedbridgeError) as caught:
        Policy.load(str(path), ModelSettings(**settings))
    return str(caught.value)


def test_a_missing_folder_or_unknown_id(tmp_path: Path) -> None:
    assert "can't be loaded" in refused(tmp_path / "nowhere")
    assert "can't be loaded" in refused("nobody/no-such-model")
    (tmp_path / "empty").mkdir()
    assert "can't be loaded" in refused(tmp_path / "empty")


def test_a_broken_folder(changed_model: Callable[..., Path]) -> None:
    folder = changed_model("qwen2_5_vl", {})
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert "can't be loaded" in refused(folder)
    weights.write_bytes(whole)
    (folder / "config.json").write_text("{not json")
    assert "can't be loaded" in refused(folder)


def test_a_language_model_or_an_unknown_architecture(changed_model: Callable[..., Path]) -> None:
    folder = changed_model("qwen2_5_vl", {})
    (folder / "config.json").write_text('{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}')
    assert "can't be loaded" in refused(folder)
    (folder / "config.json").write_text('{"model_type": "no_such_type"}')
    assert "can't be loaded" in refused(folder)


def test_missing_processor_or_chat_template(changed_model: Callable[..., Path]) -> None:
    folder = changed_model("qwen2_5_vl", {})
    (folder / "chat_template.jinja").unlink()
    assert "no chat template" in refused(folder)
    for path in folder.iterdir():
        if path.name not in ("config.json", "model.safetensors", "generation_config.json"):
            path.unlink()
    message = refused(folder)
    assert "can't be loaded" in message and "processor" in message


def test_weights_that_the_file_lacks_are_not_made_up(changed_model: Callable[..., Path]) -> None:
    from safetensors.torch import save_file

    folder = changed_model("qwen2_5_vl", {})
    stored = load_file(folder / "model.safetensors")
    name = next(name for name in stored if "lm_head" in name)
    save_file(
        {key: value for key, value in stored.items() if key != name}, folder / "model.safetensors", {"format": "pt"}
    )
    message = refused(folder)
    assert "lm_head" in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_device_that_is_not_there(model_folder: Callable[[str], Path]) -> None:
    assert "no CUDA GPU" in refused(model_folder("qwen2_5_vl"), device="cuda")


def test_an_image_the_processor_refuses_names_the_item(
    load_policy: Callable[..., Policy], train_items: list[Item], tmp_path: Path
) -> None:
    path = tmp_path / "thin.png"
    Image.new("RGB", (400, 1)).save(path)
    item = dataclasses.replace(train_items[0], id="thin/train/0", images=(str(path),))
    with pytest.raises(MedbridgeError, match=r"item 'thin/train/0': the processor .* refuses"):
        load_policy().encode(item, [(0, 1, 2)], PROMPT, ImageCache(0))


def test_targets_written_for_items_tokenize_to_what_is_trained(
    load_policy: Callable[..., Policy], train_items: list[Item]
) -> None:
    policy = load_policy()
    for item in train_items[:4]:
        for order in orders_of(item)[:2]:
            text = target_completion(item, order, PROMPT)
            assert policy.decode(policy.completion_ids(text)) == text

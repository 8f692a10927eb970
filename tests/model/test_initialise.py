"""Models made from nothing: ordinary Hugging Face folders of four architectures, the same bytes for the same seed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from medbridge.data import Item, PromptSettings, build_prompt, load_image
from medbridge.errors import MedbridgeError
from medbridge.model import FromNothing, init_model
from medbridge.model.initialise import ANSWER_TAGS, replace_folder

ARCHITECTURES = ("qwen2_5_vl", "qwen2_vl", "qwen3_vl", "gemma3")
SMALL = {"vocab_size": 400, "hidden_size": 32, "layers": 1, "vision_hidden_size": 32, "vision_layers": 1}


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_transformers_loads_it_whole_and_untied(architecture: str, model_folder: Callable[[str], Path]) -> None:
    model, info = AutoModelForImageTextToText.from_pretrained(model_folder(architecture), output_loading_info=True)
    assert model.config.model_type == architecture
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert head.data_ptr() != embedding.data_ptr()
    assert not torch.equal(head, embedding)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_tokenizer_is_lossless_and_knows_the_answer_tags(
    architecture: str, model_folder: Callable[[str], Path]
) -> None:
    tokenizer = AutoProcessor.from_pretrained(model_folder(architecture)).tokenizer
    for tag in ANSWER_TAGS:
        assert len(tokenizer(tag, add_special_tokens=False)["input_ids"]) == 1
    text = "<think>Größe 12.5 mm, 左肺\n\n</think><answer>How bright is it?</answer>"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) == text
    assert len(tokenizer("How bright is the square?", add_special_tokens=False)["input_ids"]) <= 8  # merges were learnt
    config = AutoModelForImageTextToText.from_pretrained(model_folder(architecture)).config
    assert len(tokenizer) == config.get_text_config().vocab_size <= 400


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_chat_template_renders_and_the_processor_expands_the_image(
    architecture: str, model_folder: Callable[[str], Path], train_items: list[Item]
) -> None:
    processor = AutoProcessor.from_pretrained(model_folder(architecture))
    item = train_items[0]
    text = processor.apply_chat_template(
        build_prompt(item, (2, 0, 1), PromptSettings(system="Be brief.")), tokenize=False, add_generation_prompt=True
    )
    for part in ("Be brief.", item.question, "A) bright", "B) dark", "C) grey"):
        assert part in text
    turn = "<start_of_turn>model\n" if architecture == "gemma3" else "<|im_start|>assistant\n"
    assert text.endswith(turn)
    encoded = processor(text=[text], images=[[load_image(item.images[0])]], return_tensors="pt")
    image_token = "<image_soft_token>" if architecture == "gemma3" else "<|image_pad|>"
    # 28 pixels a side, patches of 7, merged two by two
    assert encoded["input_ids"][0].tolist().count(processor.tokenizer.convert_tokens_to_ids(image_token)) == 4


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path, tiny_texts: list[str]) -> None:
    for architecture in ARCHITECTURES:
        shape = FromNothing(architecture=architecture, **SMALL)
        first = hashes(init_model(tmp_path / "first", shape, tiny_texts, seed=3))
        torch.rand(5)
        again = hashes(init_model(tmp_path / "again", shape, tiny_texts, seed=3))
        other = hashes(init_model(tmp_path / "other", shape, tiny_texts, seed=4))
        assert first == again
        assert {name for name in first if first[name] != other[name]} == {"model.safetensors"}


def test_making_a_model_leaves_the_global_generator_alone(tmp_path: Path, tiny_texts: list[str]) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    init_model(tmp_path / "model", FromNothing(**SMALL), tiny_texts, seed=0)
    assert torch.equal(torch.rand(3), expected)


def test_the_default_has_one_to_four_million_parameters(tmp_path: Path, tiny_texts: list[str]) -> None:
    folder = init_model(tmp_path / "default", FromNothing(), tiny_texts, seed=0)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert model.config.model_type == "qwen2_5_vl"
    assert 1_000_000 <= sum(parameter.numel() for parameter in model.parameters()) <= 4_000_000
    assert [path.name for path in tmp_path.iterdir()] == ["default"]  # no temporary folder is left behind


def test_no_texts_still_make_a_byte_tokenizer(tmp_path: Path) -> None:
    folder = init_model(tmp_path / "bare", FromNothing(**SMALL), [], seed=0)
    tokenizer = AutoProcessor.from_pretrained(folder).tokenizer
    ids = tokenizer("any tèxt", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == "any tèxt"


def test_an_existing_folder_is_replaced_as_a_whole_and_a_file_is_refused(tmp_path: Path, tiny_texts: list[str]) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "left-over").write_text("x")
    init_model(target, FromNothing(**SMALL), tiny_texts, seed=0)
    assert not (target / "left-over").exists()
    assert json.loads((target / "config.json").read_text())["model_type"] == "qwen2_5_vl"
    (tmp_path / "file").write_text("x")
    with pytest.raises(MedbridgeError, match="is a file"):
        replace_folder(target, tmp_path / "file")
    assert target.is_dir()

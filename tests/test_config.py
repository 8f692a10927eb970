"""The configuration: errors that name file, line, key and choices; overrides; every example validates."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from medbridge.config import RunSettings, document, dump_config, load_config, parse_config
from medbridge.errors import MedbridgeError
from medbridge.study import StudyConfig

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = sorted([*(ROOT / "examples").glob("**/*.yaml"), *(ROOT / "medbridge" / "configs").glob("*.yaml")])
DATA = "data:\n  sources:\n    - kind: brain\n"


def error_of(text: str, *overrides: str) -> str:
    with pytest.raises(MedbridgeError) as caught:
        parse_config(text, source="run.yaml", overrides=overrides)
    return str(caught.value)


# -- wrong files ---------------------------------------------------------------------------------------------------


def test_a_wrong_key_names_file_line_key_the_close_match_and_the_valid_keys() -> None:
    message = error_of(DATA + "rl:\n  steps: 3\n  learning_rat: 1.0e-6\n")
    assert message.startswith("run.yaml:6: unknown key 'rl.learning_rat'.")
    assert "Did you mean 'learning_rate'?" in message
    assert "completions" in message and "learning_rate" in message
    assert "items_per_stratum" not in message  # only the keys that are valid there


def test_a_wrong_key_at_the_top_and_in_a_list() -> None:
    assert error_of(DATA + "modle: {}\n").startswith("run.yaml:4: unknown key 'modle'. Did you mean 'model'?")
    message = error_of("data:\n  sources:\n    - kind: brain\n    - kind: jsonl\n      pth: x\n      path: y\n")
    assert message.startswith("run.yaml:5: unknown key 'data.sources.1.pth'. Did you mean 'path'?")


def test_a_key_with_nothing_alike_offers_no_guess() -> None:
    message = error_of(DATA + "zzzzzz: 1\n")
    assert "Did you mean" not in message
    assert "Valid keys here: name, seed, " in message


def test_a_wrong_choice_lists_the_choices() -> None:
    message = error_of(DATA + "\nsft:\n  schedule: step\n")
    assert message == "run.yaml:6: sft.schedule is 'step'; valid are: 'constant', 'cosine' or 'linear'."


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("sft:\n  steps: many\n", "run.yaml:5: sft.steps is 'many': "),
        ("sft:\n  steps: 0\n", "run.yaml:5: sft.steps is 0: "),
        ("sft:\n  steps: 1.5\n", "run.yaml:5: sft.steps is 1.5: "),
        ("rl:\n\n  learning_rate: -1\n", "run.yaml:6: rl.learning_rate is -1: "),
        ("rollout:\n  temperature: .nan\n", "run.yaml:5: rollout.temperature is nan: "),
        ("model:\n  from_nothing:\n    hidden_size: 33\n", "run.yaml:6: model.from_nothing.hidden_size is 33: "),
        ("gate: 3\n", "run.yaml:4: gate is 3: "),
        ("name: 2020-01-01\n", "run.yaml:4: name is datetime.date(2020, 1, 1): "),
        ("budget: null\n", "run.yaml:4: budget is None: "),
    ],
)
def test_a_wrong_value_names_line_and_value(text: str, start: str) -> None:
    assert error_of(DATA + text).startswith(start)


def test_every_mistake_is_named_at_once() -> None:
    lines = error_of(DATA + "seed: -1\nrl:\n  stepz: 2\n  loss: ppo\n").splitlines()
    assert sorted(line.split(":")[1] for line in lines) == ["4", "6", "7"]


def test_missing_data_and_an_empty_file() -> None:
    assert error_of("name: x\n") == "run.yaml:1: key 'data' is missing; it has no default."
    assert "key 'data' is missing" in error_of("")
    assert error_of("data:\n  sources:\n    - limit: 3\n") == (
        "run.yaml:3: key 'data.sources.0.kind' is missing; it has no default."
    )


def test_a_duplicate_key_names_both_lines() -> None:
    message = error_of(DATA + "rl:\n  steps: 3\n  loss: grpo\n  steps: 4\n")
    assert message == "run.yaml:7: key 'steps' stands twice (first in line 5); keep one."


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("data:\n  sources: [\n", 3),
        ("data: {}\n\tname: x\n", 2),
        ("a: 1\nb: 'x\n", 3),
        ("a: 1\n---\nb: 2\n", 2),
        ("a: *nowhere\n", 1),
        ("a: 1\n? [x, y]\n: 2\n", 2),
        ("a: !!python/object:os.system x\n", 1),
    ],
)
def test_invalid_yaml_names_the_line(text: str, line: int) -> None:
    assert error_of(text).startswith(f"run.yaml:{line}: not valid YAML: ")


@pytest.mark.parametrize("text", ["- 1\n- 2\n", "just text\n", "3\n"])
def test_a_file_that_is_no_mapping(text: str) -> None:
    assert error_of(text).startswith("run.yaml:1: a configuration is a mapping of keys, not a ")


def test_a_recursive_alias_is_an_error_and_no_endless_loop() -> None:
    assert error_of("data: &a\n  sources: [*a]\n").startswith("run.yaml:")


@given(st.text(max_size=60))
def test_any_text_is_settings_or_one_clear_error(text: str) -> None:
    try:
        parse_config(text, source="run.yaml")
    except MedbridgeError as error:
        assert str(error).startswith("run.yaml")


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(MedbridgeError, match=r"missing\.yaml: configuration can't be read"):
        load_config(tmp_path / "missing.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9\n")
    with pytest.raises(MedbridgeError, match=r"latin\.yaml: configuration can't be read"):
        load_config(tmp_path / "latin.yaml")


# -- overrides -----------------------------------------------------------------------------------------------------


def test_overrides_reach_nested_keys_lists_and_numbers() -> None:
    settings = parse_config(
        DATA + "rl:\n  steps: 3\n",
        source="run.yaml",
        overrides=[
            "rl.learning_rate=1e-6",
            "data.strata=[plane, level]",
            "data.sources.0.limit=7",
            "model.from_nothing.layers=5",
            "budget.minutes=null",
            "name=a name",
            "rl.steps=4",
        ],
    )
    assert settings.rl.learning_rate == 1e-6
    assert settings.data.strata == ["plane", "level"]
    assert settings.data.sources[0].limit == 7
    assert settings.model.from_nothing.layers == 5
    assert settings.budget.minutes is None
    assert settings.name == "a name"
    assert settings.rl.steps == 4


def test_an_override_of_what_the_file_lacks_or_has_as_null() -> None:
    settings = parse_config("data: {}\nmodel:\n", source="x", overrides=["model.lora.rank=4"])
    assert settings.model.lora is not None and settings.model.lora.rank == 4


def test_a_wrong_override_is_named_by_its_text() -> None:
    assert error_of(DATA, "rl.stepz=4").startswith("--set rl.stepz=4: unknown key 'rl.stepz'. Did you mean 'steps'?")
    assert error_of(DATA, "rl.steps=none").startswith("--set rl.steps=none: rl.steps is 'none': ")
    assert error_of(DATA, "sft.schedule=up").startswith("--set sft.schedule=up: sft.schedule is 'up'; valid are: ")
    assert error_of(DATA + "rl: {stepz: 4}\n", "rl.steps=4").startswith("run.yaml:4: unknown key 'rl.stepz'")


@pytest.mark.parametrize(
    "override",
    ["rl.steps", "=3", "seed.x=1", "data.sources.5.limit=1", "data.sources.one.limit=1", "rl.steps=[", "a..b=1"],
)
def test_a_malformed_override_is_a_clear_error(override: str) -> None:
    assert error_of(DATA + "seed: 1\n", override).startswith(f"--set {override}: ")


# -- the schema ----------------------------------------------------------------------------------------------------


def test_dumped_settings_parse_to_the_same() -> None:
    settings = parse_config(
        DATA + "model:\n  lora: {rank: 4, targets: [q_proj]}\nname: 'Größe: 3 # x'\nbudget: {minutes: 1.5}\n",
        source="x",
    )
    dumped = dump_config(settings)
    assert parse_config(dumped, source="x") == settings
    assert dump_config(parse_config(dumped, source="x")) == dumped


def test_every_key_is_documented() -> None:
    rows = list(document())
    keys = [key for key, _, _, _ in rows]
    assert len(keys) == len(set(keys))
    undescribed = [key for key, _, _, description in rows if len(description) < 5]
    assert not undescribed
    dumped = yaml.safe_load(dump_config(parse_config(DATA + "model: {lora: {}}\n", source="x")))
    assert set(keys) == {re.sub(r"\.\d+", "[]", key) for key in _keys_of(dumped)}
    by_key = {key: (kind, default) for key, kind, default, _ in rows}
    assert by_key["sft.schedule"] == ("constant | cosine | linear", '"cosine"')
    assert by_key["rl.learning_rate"] == ("float", "5e-07")
    assert by_key["budget.minutes"] == ("float | null", "null")
    assert by_key["data.sources[].kind"][1] == "required"
    assert by_key["model.lora"][0] == "section (may be null)"


def test_keys_and_defaults_are_what_a_file_would_hold() -> None:
    by_key = {key: (kind, default) for key, kind, default, _ in document(StudyConfig)}
    assert by_key["study.models"][0] == "sections by name" and by_key["study.models.NAME.path"] == ("str", "required")
    assert all(yaml.safe_load(default) is not None or default in ("null", "") for _, default in by_key.values())
    assert by_key["study.transfer"][0] == "list[list[str]]"
    assert by_key["data.sources[].dicom.window"][0] == "file | full | tuple[float, float]"
    assert by_key["study.train"][1] == '["bridge", "sharpen"]'


def _keys_of(value: object, prefix: str = "") -> set[str]:
    found: set[str] = set()
    if isinstance(value, dict):
        for name, inner in value.items():
            key = f"{prefix}.{name}" if prefix else name
            found |= {key} | _keys_of(inner, key)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        found |= _keys_of(value[0], f"{prefix}.0")
    return found


def test_settings_cannot_be_changed_by_accident() -> None:
    settings = RunSettings.model_validate(yaml.safe_load(DATA))
    with pytest.raises(ValueError, match="frozen"):
        settings.seed = 3  # type: ignore[misc]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_shipped_configurations_are_valid(path: Path) -> None:
    schema = StudyConfig if "\nstudy:\n" in path.read_text() else RunSettings
    settings = load_config(path, schema=schema)
    assert parse_config(dump_config(settings), source="dumped", schema=schema) == settings


def test_a_file_with_a_wrong_key_in_a_section_of_its_own_schema() -> None:
    with pytest.raises(MedbridgeError, match=r"x:3: unknown key 'study\.sights'\. Did you mean 'sight'\?"):
        parse_config("data: {}\nstudy:\n  sights: {}\n", source="x", schema=StudyConfig)


@pytest.mark.parametrize("section", ["sft", "rl"])
def test_a_rate_for_a_frozen_vision_tower_is_refused_at_once(section: str) -> None:
    text = f"{DATA}model: {{freeze_vision: true}}\n{section}: {{vision_learning_rate: 1e-4}}\n"
    message = error_of(text)
    assert message.startswith(f"run.yaml: {section}.vision_learning_rate is 0.0001, and model.freeze_vision")
    parse_config(text.replace("true", "false"), source="run.yaml")


def test_the_best_checkpoint_needs_items_to_tell() -> None:
    text = f"{DATA}held_out: {{keep: best}}\n"
    message = error_of(text)
    assert "run.yaml:4: held_out" in message and "keep is best, and nothing is held out" in message
    assert parse_config(text.replace("best", "best, share: 0.1"), source="run.yaml").held_out.keep == "best"


@pytest.mark.parametrize(("value", "read"), [("auto", "auto"), ("true", True), ("false", False)])
def test_tensorboard_is_auto_or_decided(value: str, read: str | bool) -> None:
    settings = parse_config(f"{DATA}tensorboard: {value}\n", source="run.yaml")
    assert settings.tensorboard == read
    assert "tensorboard" in error_of(f"{DATA}tensorboard: maybe\n")

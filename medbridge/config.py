"""The YAML configuration of a run: its schema, `--set` overrides, and errors that name file, line and choices."""

from __future__ import annotations

import difflib
import json
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import to_jsonable_python

from medbridge.data import DataSettings, SplitName
from medbridge.errors import MedbridgeError
from medbridge.model import ModelSettings
from medbridge.rollout import RolloutSettings
from medbridge.support import GateSettings, GuardSettings, RoutingSettings
from medbridge.train import RlSettings, SftSettings


class DiagnosisSettings(BaseModel):
    """Which items are measured, how often, when sampling goes on, and when a stage is taken back."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    split: SplitName = Field("validation", description="Split that decides what is trained next.")
    samples: int = Field(16, ge=1, description="Completions sampled per item, beside one greedy completion.")
    sequential: bool = Field(
        True,
        description="Sample items in random order and stop a stratum as soon as its verdict is settled, by evidence "
        "that holds however often one looks (half of gate.alpha; the other half is for a last look at all items). "
        "false: measure all items, and look once.",
    )
    finite: bool = Field(
        False,
        description="true: sequential verdicts are about the items of this split and no others, so that they settle "
        "sooner, at the latest when all are measured. false: about items like these, drawn with their clusters.",
    )
    items_per_look: int = Field(
        16,
        ge=1,
        description="Items sampled of a stratum between two looks (whole clusters); at least so many for each rollout "
        "engine.",
    )
    max_items_per_stratum: int | None = Field(
        200, ge=1, description="Most items measured per stratum; null uses all that the split has."
    )
    controls: tuple[Literal["blank", "shuffled"], ...] = Field(
        ("blank", "shuffled"),
        description="Measure the same questions again with grey images (blank) and with another question's (shuffled): "
        "support that stays is not read from the image.",
    )
    control_items: int = Field(32, ge=1, description="Most items per stratum that a control measures.")
    tolerated_loss: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Loss of support, in any stratum, that a sharpen stage may cause; a significantly larger one rolls "
        "the run back to the model before.",
    )
    test_split: SplitName | None = Field(
        "test", description="Held-out split measured once before and once after; null measures none."
    )
    cluster: list[str] = Field(
        default_factory=list,
        description="Tags whose items are not independent (a patient, a slice) and are resampled together for the "
        "intervals; empty: items that share an image, directly or through others.",
    )
    kind_of_question: list[str] = Field(
        default_factory=list,
        description="Tags that define a kind of question for the baseline on the test split (always answering the "
        "training split's most frequent answer for that kind); empty: the strata.",
    )


class HeldOutSettings(BaseModel):
    """Training items that are never trained on: on them each checkpoint's greedy accuracy is measured.

    They are not the diagnosis split, which the gate reads: a checkpoint picked by it would bias the next verdict.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    share: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the training split that is held out of all training, by whole clusters "
        "(diagnosis.cluster). 0: none, and nothing is measured while training.",
    )
    max_items: int | None = Field(
        256,
        ge=1,
        description="Held-out items that a stage asks at each checkpoint, at most; null asks all of its strata.",
    )
    keep: Literal["last", "best"] = Field(
        "last",
        description="Which weights are the stage's result: those after the last step, or those of the checkpoint with "
        "the highest accuracy on the held-out items (the earliest of equals).",
    )

    @model_validator(mode="after")
    def _has_items(self) -> HeldOutSettings:
        if self.keep == "best" and self.share == 0:
            raise ValueError("keep is best, and nothing is held out to tell which is. Set held_out.share, say to 0.1")
        return self


class BudgetSettings(BaseModel):
    """When the loop stops although some stratum is not done."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    stages: int = Field(8, ge=0, description="Most training stages of a run.")
    bridges_per_stratum: int = Field(3, ge=0, description="Most bridge stages a stratum takes part in.")
    sharpens_per_stratum: int = Field(3, ge=0, description="Most sharpen stages a stratum takes part in.")
    mixed: bool = Field(
        False,
        description="Where some strata are to be bridged and others to be sharpened, one stage (mixed) does both: each "
        "step adds the gradient of sft on the one to that of rl on the other. false: bridge first, then measure again.",
    )
    minutes: float | None = Field(
        None, gt=0, description="Minutes of work, summed over resumed runs, after which no stage is begun."
    )


class RunSettings(BaseModel):
    """A whole run, as its YAML file states it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field("run", description="Name shown in the report.")
    seed: int = Field(0, ge=0, description="Seed of weights, data order, option orders and samples.")
    tensorboard: Literal["auto"] | bool = Field(
        "auto",
        description="Write training metrics to TensorBoard files in the run folder too; auto: where it is installed.",
    )
    wandb: str | None = Field(
        None,
        description="Weights & Biases project that training metrics are sent to, a W&B run for each stage; null sends "
        "nothing. WANDB_MODE=offline keeps them in the run folder.",
    )
    model: ModelSettings = Field(default_factory=ModelSettings, description="The model.")
    data: DataSettings = Field(description="Data sets, strata, and how questions are asked.")
    rollout: RolloutSettings = Field(default_factory=RolloutSettings, description="How completions are drawn.")
    diagnosis: DiagnosisSettings = Field(default_factory=DiagnosisSettings, description="What is measured.")
    gate: GateSettings = Field(default_factory=GateSettings, description="The rule that gives verdicts.")
    guard: GuardSettings = Field(default_factory=GuardSettings, description="When a measurement gives no verdict.")
    routing: RoutingSettings = Field(
        default_factory=RoutingSettings,
        description="Which training items a stage uses: those it can teach something.",
    )
    sft: SftSettings = Field(default_factory=SftSettings, description="Bridging: supervised fine-tuning.")
    rl: RlSettings = Field(default_factory=RlSettings, description="Sharpening: GRPO.")
    held_out: HeldOutSettings = Field(
        default_factory=HeldOutSettings, description="Accuracy while training, and which checkpoint is kept."
    )
    budget: BudgetSettings = Field(default_factory=BudgetSettings, description="When to stop.")

    @model_validator(mode="after")
    def _trains_what_it_rates(self) -> RunSettings:
        for name in ("sft", "rl"):
            rate = getattr(self, name).vision_learning_rate
            if rate is not None and self.model.freeze_vision:
                raise ValueError(
                    f"{name}.vision_learning_rate is {rate:g}, and model.freeze_vision leaves the vision tower as it "
                    "is. Leave one of them out"
                )
        return self


Settings = TypeVar("Settings", bound=BaseModel)
"""The schema of a file: a run's, or one that has further sections."""


def load_config(
    path: Path,
    overrides: Sequence[str] = (),
    schema: type[Settings] = RunSettings,  # type: ignore[assignment]
) -> Settings:
    """Read a YAML file and `--set key.path=value` overrides into settings.

    Raises:
        MedbridgeError: for each wrong key or value, with file, line, what was found and what is valid.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MedbridgeError(f"{path}: configuration can't be read: {error}") from error
    return parse_config(text, source=str(path), overrides=overrides, schema=schema)


def parse_config(
    text: str,
    *,
    source: str,
    overrides: Sequence[str] = (),
    schema: type[Settings] = RunSettings,  # type: ignore[assignment]
) -> Settings:
    """As `load_config`, from YAML text; `source` is named in errors."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        _refuse_duplicates(root, source)
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: such as a date with a 13th month
        mark = getattr(error, "problem_mark", None)
        where = f"{source}:{mark.line + 1}" if mark else source
        raise MedbridgeError(f"{where}: not valid YAML: {getattr(error, 'problem', error)}") from error
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise MedbridgeError(f"{source}:1: a configuration is a mapping of keys, not a {type(content).__name__}.")
    origin: dict[tuple[str, ...], str] = {}
    for override in overrides:
        key = _override(content, override)
        origin[key] = f"--set {override}"
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        messages = [_explain(entry, root, source, origin, schema) for entry in error.errors()]
        raise MedbridgeError("\n".join(messages)) from None


def dump_config(settings: RunSettings) -> str:
    """The whole configuration as YAML, defaults included."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def document(schema: type[BaseModel] = RunSettings) -> Iterator[tuple[str, str, str, str]]:
    """Every key of the schema: (dotted key, type, default as YAML, description)."""
    yield from _document(schema, "")


def _document(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, str, str]]:
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        inner = _inner_model(field.annotation)
        if inner is not None:
            origin = typing.get_origin(field.annotation)
            kind, below = ("section" if inner is field.annotation else "section (may be null)"), "."
            if origin is list:
                kind, below = "list of sections", "[]."
            elif origin is dict:
                kind, below = "sections by name", ".NAME."
            yield key, kind, "", field.description or ""
            yield from _document(inner, f"{key}{below}")
        else:
            default = "required" if field.is_required() else _yaml(field.get_default(call_default_factory=True))
            yield key, _type_name(field.annotation), default, field.description or ""


def _yaml(value: Any) -> str:
    """On one line, which JSON is."""
    return json.dumps(to_jsonable_python(value), ensure_ascii=False)


def _inner_model(annotation: Any) -> type[BaseModel] | None:
    candidates = [annotation, *typing.get_args(annotation)]
    for candidate in candidates:
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _type_name(annotation: Any) -> str:
    """As Python writes types, without the constraints that descriptions tell."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Ellipsis:
        return "..."
    if origin is Annotated:
        return _type_name(inner[0])
    if origin is Literal:
        return " | ".join(map(str, inner))
    if origin in (types.UnionType, typing.Union):
        return " | ".join("null" if a is type(None) else _type_name(a) for a in inner)
    if origin is not None:
        return f"{origin.__name__}[{', '.join(map(_type_name, inner))}]"
    return getattr(annotation, "__name__", str(annotation))


def _override(content: dict[str, Any], override: str) -> tuple[str, ...]:
    dotted, separator, value = override.partition("=")
    if not separator or not dotted:
        raise MedbridgeError(f"--set {override}: write it as key=value, for example --set rl.learning_rate=1e-6")
    keys = tuple(dotted.strip().split("."))
    place: Any = content
    for key in keys[:-1]:
        place = _step_into(place, key, override)
    last = keys[-1]
    parsed = _parse_value(value, override)
    if isinstance(place, list):
        place[_index(place, last, override)] = parsed
    elif isinstance(place, dict):
        place[last] = parsed
    else:
        raise MedbridgeError(f"--set {override}: {'.'.join(keys[:-1])} holds a plain value and has no keys.")
    return keys


def _step_into(place: Any, key: str, override: str) -> Any:
    if isinstance(place, list):
        return place[_index(place, key, override)]
    if not isinstance(place, dict):
        raise MedbridgeError(f"--set {override}: {key!r} lies below a plain value, which has no keys.")
    if place.get(key) is None:
        place[key] = {}
    return place[key]


def _index(place: list[Any], key: str, override: str) -> int:
    if not key.isdecimal() or int(key) >= len(place):
        raise MedbridgeError(f"--set {override}: {key!r} is not an index of a list of {len(place)} (0 is the first).")
    return int(key)


def _parse_value(text: str, override: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise MedbridgeError(f"--set {override}: {text!r} is not a YAML value ({error}).") from error


def _refuse_duplicates(root: yaml.Node | None, source: str) -> None:
    visited: set[int] = set()  # an alias stands for a node seen before, perhaps one that holds the alias itself

    def visit(node: yaml.Node | None) -> None:
        if id(node) in visited:
            return
        visited.add(id(node))
        if isinstance(node, yaml.MappingNode):
            seen: dict[str, int] = {}
            for key, value in node.value:
                line = key.start_mark.line + 1
                if isinstance(key, yaml.ScalarNode):
                    if key.value in seen:
                        raise MedbridgeError(
                            f"{source}:{line}: key {key.value!r} stands twice (first in line {seen[key.value]}); "
                            "keep one."
                        )
                    seen[key.value] = line
                visit(value)
        elif isinstance(node, yaml.SequenceNode):
            for entry in node.value:
                visit(entry)

    visit(root)


def _explain(
    entry: Mapping[str, Any],
    root: yaml.Node | None,
    source: str,
    origin: Mapping[tuple[str, ...], str],
    schema: type[BaseModel],
) -> str:
    path = tuple(part for part in entry["loc"] if isinstance(part, int | str))
    dotted = ".".join(map(str, path))
    keys = tuple(map(str, path))
    given = next((text for key, text in origin.items() if key[: len(keys)] == keys or keys[: len(key)] == key), None)
    where = given or f"{source}:{_line(root, path)}"
    kind, message = entry["type"], entry["msg"]
    if not path:  # of keys that don't go together
        return f"{source}: {message.removeprefix('Value error, ')}."
    if kind == "extra_forbidden":
        valid = _valid_keys(schema, path[:-1])
        close = difflib.get_close_matches(str(path[-1]), valid, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        if dotted == "study":
            hint = " It is of a study: `medbridge study` reads it, and other commands take the file without it."
        return f"{where}: unknown key {dotted!r}.{hint} Valid keys here: {', '.join(valid)}."
    if kind == "missing":
        return f"{where}: key {dotted!r} is missing; it has no default."
    if kind == "literal_error":
        return f"{where}: {dotted} is {entry['input']!r}; valid are: {entry['ctx']['expected']}."
    return f"{where}: {dotted} is {entry['input']!r}: {message[0].lower() + message[1:]}."


def _valid_keys(schema: type[BaseModel], path: Sequence[int | str]) -> list[str]:
    model: type[BaseModel] | None = schema
    for part in path:
        if isinstance(part, int) or model is None:
            continue
        field = model.model_fields.get(str(part))
        model = None if field is None else _inner_model(field.annotation)
    return list(model.model_fields) if model is not None else []


def _line(node: yaml.Node | None, path: Sequence[int | str]) -> int:
    """Line of the node at `path`, or of its nearest parent that the file has."""
    line = node.start_mark.line + 1 if node is not None else 1
    for part in path:
        if isinstance(node, yaml.MappingNode):
            pair = next(((k, v) for k, v in node.value if k.value == str(part)), None)
            if pair is None:
                return line
            line, node = pair[0].start_mark.line + 1, pair[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            return line
    return line

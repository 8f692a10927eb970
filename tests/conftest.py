"""Fixtures shared by all tests: a tiny data set on disk, tiny models of each architecture, fast run settings.

Everything here is real, only small: PNG files, JSON lines, Hugging Face folders.
"""

from __future__ import annotations

import os

# Before torch or transformers are imported: nothing is looked up online, and waiting threads give their core back.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pages
import pytest
import torch
from PIL import Image

from medbridge.torchvision_ops import declare

declare()  # before any test imports transformers
torch.set_num_threads(1)  # these models are too small to share out

if TYPE_CHECKING:
    from medbridge.config import RunSettings
    from medbridge.data import ImageCache, Item
    from medbridge.model import Policy
    from medbridge.pipeline import Run

ARCHITECTURES = ("qwen2_5_vl", "qwen2_vl", "qwen3_vl", "gemma3")
SIDE = 28
SHAPE: dict[str, Any] = {
    "vocab_size": 400, "hidden_size": 64, "layers": 2, "vision_hidden_size": 32, "vision_layers": 1, "image_size": SIDE,
}  # fmt: skip
PROMPT: dict[str, Any] = {"answer_style": "text", "system": ""}


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with the nested `changes` laid over it."""
    out = dict(base)
    for key, value in changes.items():
        old = out.get(key)
        out[key] = merged(old, value) if isinstance(value, dict) and isinstance(old, dict) else value
    return out


def write_tiny_data(folder: Path, per_split: int = 12) -> Path:
    """A folder of train/validation/test.jsonl: is the square dark, grey or bright; is its left or right side brighter.

    Two questions are asked of each image. They are the two strata, under the tag `task`.
    """
    shades, sides = ("dark", "grey", "bright"), ("left", "right")
    for number, split in enumerate(("train", "validation", "test")):
        generator = np.random.default_rng(number)
        rows: list[dict[str, Any]] = []
        for image in range(per_split // 2):
            shade, side = image % 3, (image // 3) % 2
            pixels = np.full((SIDE, SIDE), 30 + 80 * shade) + generator.integers(0, 10, (SIDE, SIDE))
            pixels[:, slice(0, SIDE // 2) if side == 0 else slice(SIDE // 2, None)] += 40
            name = f"images/{split}-{image}.png"
            (folder / "images").mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).convert("RGB").save(folder / name)
            for task, question, options, right in (
                ("shade", "How bright is the square?", shades, shade),
                ("side", "Which side is brighter?", sides, side),
            ):
                rows.append(
                    {
                        "dataset_name": "squares", "dataset_index": len(rows), "image_paths": [name],
                        "question": question, "options": dict(zip("ABC", options, strict=False)),
                        "answer_label": "ABC"[right], "answer": options[right], "tags": {"task": task},
                    }
                )  # fmt: skip
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with SLAKE and MedMNIST; the test is skipped where it is absent."""
    named = os.environ.get("MEDBRIDGE_TEST_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder} (set MEDBRIDGE_TEST_DATA)")
    return folder


@pytest.fixture(autouse=True)
def denormals() -> Iterator[None]:
    """Loading a model has the processor flush denormal numbers, for the whole process; other tests count on them."""
    yield
    torch.set_flush_denormal(False)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny data set: 12 items a split, half of stratum "shade" and half of "side"."""
    return write_tiny_data(tmp_path_factory.mktemp("squares"))


@pytest.fixture(scope="session")
def make_tiny_data() -> Callable[[Path, int], Path]:
    """Write the tiny data set with another number of items a split (a multiple of 12 keeps the answers balanced)."""
    return write_tiny_data


@pytest.fixture(scope="session")
def tiny_items(tiny_data: Path) -> list[Item]:
    """All items of the tiny data set."""
    from medbridge.data import DataSettings, SourceSettings, open_items

    settings = DataSettings(sources=[SourceSettings(kind="jsonl", path=str(tiny_data))])
    return open_items(settings, base_dir=tiny_data, cache_dir=tiny_data / "cache").items


@pytest.fixture(scope="session")
def train_items(tiny_items: list[Item]) -> list[Item]:
    """The training items of the tiny data set."""
    return [item for item in tiny_items if item.split == "train"]


@pytest.fixture(scope="session")
def tiny_texts(tiny_items: list[Item]) -> list[str]:
    """What the tiny tokenizers are trained on."""
    from medbridge.pipeline import item_texts

    return sorted({text for item in tiny_items for text in item_texts(item)})


@pytest.fixture(scope="session")
def odd_pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three picture files: a square, a wide and a tall one."""
    folder = tmp_path_factory.mktemp("pictures")
    paths = []
    for number, (width, height) in enumerate([(28, 28), (90, 30), (20, 70)]):
        pixels = np.random.default_rng(number).integers(0, 255, (height, width, 3)).astype(np.uint8)
        paths.append(str(folder / f"{number}.png"))
        Image.fromarray(pixels).save(paths[-1])
    return paths


@pytest.fixture(scope="session")
def images() -> ImageCache:
    """One image cache for all tests."""
    from medbridge.data import ImageCache

    return ImageCache(16 << 20)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tiny_texts: list[str]) -> Callable[[str], Path]:
    """The folder of a tiny random model of an architecture, made once. Not to be changed: copy it first."""
    from medbridge.model import FromNothing, init_model

    base = tmp_path_factory.mktemp("models")

    def make(architecture: str = "qwen2_5_vl") -> Path:
        folder = base / architecture
        if not folder.is_dir():
            init_model(folder, FromNothing(**{**SHAPE, "architecture": architecture}), tiny_texts, seed=0)
        return folder

    return make


@pytest.fixture(scope="session")
def load_policy(model_folder: Callable[[str], Path]) -> Callable[..., Policy]:
    """A fresh policy of a tiny model; keywords are those of `ModelSettings`."""
    from medbridge.model import ModelSettings, Policy

    def load(
        architecture: str = "qwen2_5_vl", *, path: Path | None = None, trainable: bool = False, **model: Any
    ) -> Policy:
        folder = model_folder(architecture) if path is None else path
        return Policy.load(str(folder), ModelSettings(**model), trainable=trainable)

    return load


@pytest.fixture(scope="session")
def formed(
    load_policy: Callable[..., Policy],
    train_items: list[Item],
    images: ImageCache,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The tiny model after some SFT on each item's options in turn: it answers in the right form, and guesses."""
    from medbridge.data import PromptSettings, permutation
    from medbridge.model import ModelSettings
    from medbridge.train import Example, SftSettings, train_sft

    class Guesses:
        def __len__(self) -> int:
            return len(train_items)

        def example(self, index: int, visit: int) -> Example:
            item = train_items[index]
            assert item.options is not None
            guess = item.options[(index + visit) % len(item.options)]
            return Example(item, permutation(item, 0, visit), f"<answer>{guess}</answer>")

    folder = tmp_path_factory.mktemp("formed")
    policy = load_policy(trainable=True)
    train_sft(
        policy, Guesses(), None,
        SftSettings(steps=80, batch_size=8, micro_batch_size=8, learning_rate=5e-3, warmup_steps=3),
        model=ModelSettings(), prompts=PromptSettings(**PROMPT), images=images, seed=0,
        checkpoints=folder / "checkpoints", on_start=lambda step: None, on_step=lambda step, metrics, ids: None,
    )  # fmt: skip
    return policy.save(folder / "model")


@pytest.fixture
def changed_model(model_folder: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of a tiny model's folder with JSON files changed: `changed_model("gemma3", {"config.json": {...}})`."""

    def change(architecture: str, files: dict[str, dict[str, Any]]) -> Path:
        folder = tmp_path / f"{architecture}-changed"
        shutil.copytree(model_folder(architecture), folder)
        for name, changes in files.items():
            path = folder / name
            content = json.loads(path.read_text()) if path.is_file() else {}
            path.write_text(json.dumps(merged(content, changes)))
        return folder

    return change


@pytest.fixture(scope="session")
def tiny_config(tiny_data: Path) -> Callable[..., dict[str, Any]]:
    """A configuration of a run that takes seconds, as a dictionary; keywords are laid over its sections."""
    base: dict[str, Any] = {
        "name": "tiny",
        "tensorboard": False,  # importing it takes as long as a run
        "model": {"from_nothing": {**SHAPE, "format_steps": 4}},
        "data": {"sources": [{"kind": "jsonl", "path": str(tiny_data)}], "strata": ["task"], "prompt": PROMPT},
        "rollout": {"max_new_tokens": 8, "batch_size": 64},
        # a model that saw four steps abstains most of the time, and it is verdicts that most tests are about
        "diagnosis": {"samples": 4, "controls": []},
        "guard": {"max_abstained": 1.0, "max_truncated": 1.0},
        "gate": {"min_items": 4, "replicates": 100},
        "sft": {"steps": 4, "batch_size": 4, "micro_batch_size": 4, "learning_rate": 2e-3, "warmup_steps": 1},
        "rl": {
            "steps": 2, "prompts_per_step": 2, "completions": 4, "micro_batch_size": 8, "learning_rate": 1e-3,
            "warmup_steps": 1,
        },
        "budget": {"stages": 2},
    }  # fmt: skip
    return lambda **changes: merged(base, changes)


@pytest.fixture(scope="session")
def tiny_settings(tiny_config: Callable[..., dict[str, Any]]) -> Callable[..., RunSettings]:
    """`tiny_config` as validated settings."""
    from medbridge.config import RunSettings

    return lambda **changes: RunSettings.model_validate(tiny_config(**changes))


@pytest.fixture
def open_run(
    tmp_path: Path, tiny_settings: Callable[..., RunSettings], tiny_data: Path
) -> Iterator[Callable[..., Run]]:
    """Open a run in a folder of its own, and close the one before; keywords are laid over the tiny settings."""
    from rich.console import Console

    from medbridge.pipeline import Run
    from medbridge.progress import Reporter

    opened: list[Run] = []
    with (tmp_path / "log").open("w") as log:

        def make(folder: str = "run", **sections: Any) -> Run:
            for run in opened:
                run.close()
            opened.clear()
            reporter = Reporter(Console(file=log, width=200))
            run = Run(tmp_path / folder, tiny_settings(**sections), base_dir=tiny_data, reporter=reporter)
            opened.append(run)
            return run

        yield make
        for run in opened:
            run.close()


class Processes:
    """Real child processes that start in milliseconds, since `zygote.py` has imported everything for them."""

    def __init__(self) -> None:
        self._zygote = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("zygote.py"))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        self._running: set[int] = set()

    def start(self, argv: Sequence[object], log: Path) -> int:
        """Start `python -m argv` (or a script); returns its process id. Its output is appended to `log`."""
        pid = self._ask({"argv": [str(part) for part in argv], "log": str(log)})
        self._running.add(pid)
        return pid

    def wait(self, pid: int) -> int:
        """The exit code, negative for a signal."""
        self._running.discard(pid)
        return self._ask({"wait": pid})

    def kill(self, pid: int) -> int:
        """SIGKILL, which no process can see coming; returns the exit code, -9 unless it had ended before."""
        os.kill(pid, signal.SIGKILL)
        return self.wait(pid)

    def close(self) -> None:
        for pid in list(self._running):
            self.kill(pid)
        self._zygote.kill()
        self._zygote.communicate()

    def _ask(self, task: dict[str, Any]) -> int:
        assert self._zygote.stdin is not None and self._zygote.stdout is not None
        self._zygote.stdin.write(json.dumps(task) + "\n")
        self._zygote.stdin.flush()
        return int(self._zygote.stdout.readline())


@pytest.fixture(scope="session")
def processes() -> Iterator[Processes]:
    """Starts and kills child processes."""
    opened = Processes()
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium (`chromium` on the PATH, or its path in CHROMIUM).

    Without it the tests are skipped, unless MEDBRIDGE_REQUIRE_BROWSER=1, which makes that a failure. It is closed
    behind each file: playwright keeps an event loop running in this thread, where `asyncio.run` of others would fail.
    """
    program = os.environ.get("CHROMIUM") or shutil.which("chromium")
    missing = None if program else "no Chromium: install it, or name its program in CHROMIUM"
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing = "the Python package playwright is not installed"
    if missing:
        if os.environ.get("MEDBRIDGE_REQUIRE_BROWSER") == "1":
            pytest.fail(missing)
        pytest.skip(missing)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=pages.ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture
def show(browser: Any) -> Iterator[Callable[..., Any]]:
    """Open a file in a window of a given width; fails at the end if the page said or requested anything."""
    contexts, said, requested = [], [], []

    def open_page(path: Path, width: int = 1280, scheme: str = "light") -> Any:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: requested.append(request.url))
        page.goto(path.as_uri(), wait_until="load")
        loads = [url for url in requested if not url.startswith(("data:", "blob:"))]
        assert loads == [path.as_uri()]
        requested.clear()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert said == []
    assert [url for url in requested if not url.startswith(("data:", "blob:"))] == []

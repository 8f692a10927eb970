"""The command line as a user meets it: help, exit codes, one message for an error, JSON where it is asked for."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from medbridge import __version__, cli


@dataclass
class Done:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def medbridge(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., Done]:
    """Run a command in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")

    def call(*argv: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["medbridge", *map(str, argv)])
        monkeypatch.setitem(cli.state, "debug", False)
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
            raise SystemExit(0)
        captured = capsys.readouterr()
        code = ended.value.code
        return Done(code if isinstance(code, int) else int(code is not None), captured.out, captured.err)

    return call


@pytest.fixture
def config(tmp_path: Path, tiny_config: Callable[..., dict[str, Any]]) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_config()))
    return path


def commands() -> Iterator[tuple[list[str], Any]]:
    """Every command with its path of names."""

    def walk(command: Any, names: list[str]) -> Iterator[tuple[list[str], Any]]:
        if hasattr(command, "commands"):
            for name, inner in command.commands.items():
                yield from walk(inner, [*names, name])
        else:
            yield names, command

    yield from walk(typer.main.get_command(cli.app), [])


def test_the_commands_that_the_readme_lists_are_there() -> None:
    names = {" ".join(path) for path, _ in commands()}
    assert names >= {
        "demo", "diagnose", "bridge", "sharpen", "run", "report", "export", "init-model",
        "data import", "data check", "data show",
    }  # fmt: skip
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    for name in names:
        assert f"`medbridge {name.split()[0]}" in readme, name


@pytest.mark.parametrize(("names", "command"), list(commands()), ids=lambda value: str(value)[:30])
def test_every_command_and_option_is_described(names: list[str], command: Any, medbridge: Callable[..., Done]) -> None:
    assert command.help, names
    for parameter in command.params:
        assert getattr(parameter, "help", None) or parameter.name == "help", (names, parameter.name)
    done = medbridge(*names, "--help")
    assert done.code == 0
    assert "Usage" in done.out


def test_version(medbridge: Callable[..., Done]) -> None:
    assert medbridge("--version").out.strip() == f"medbridge {__version__}"


def test_an_error_is_one_message_and_no_traceback(medbridge: Callable[..., Done], config: Path) -> None:
    config.write_text(config.read_text().replace("temperature", "x") + "\nrl_: {}\n")
    done = medbridge("run", config)
    assert done.code == 2
    assert done.out == ""
    assert "Traceback" not in done.err
    assert "unknown key 'rl_'" in done.err
    assert f"{config.name}:" in done.err


def test_debug_shows_the_traceback(
    medbridge: Callable[..., Done], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from medbridge.errors import MedbridgeError

    monkeypatch.setattr(sys, "argv", ["medbridge", "--debug", "report", str(tmp_path / "none")])
    monkeypatch.setitem(cli.state, "debug", False)
    with pytest.raises(MedbridgeError, match="no such run database"):
        cli.main()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["diagnose"], "nothing to work on"),
        (["diagnose", "--data", "slak:x"], "data.sources.0.kind is 'slak'"),
        (["diagnose", "--data", "jsonl:TINY", "--model", "/nowhere"], "can't be loaded"),
        (["diagnose", "--data", "jsonl:/nowhere"], "/nowhere"),
        (["run", "/nowhere.yaml"], "can't be read"),
        (["report", "/nowhere"], "no such run database"),
        (["diagnose", "--data", "brain", "--set", "rl.lr=1"], "unknown key 'rl.lr'"),
        (["diagnose", "--data", "brain", "--set", "seed"], "key=value"),
    ],
)
def test_errors_name_the_cure(argv: list[str], message: str, medbridge: Callable[..., Done], tiny_data: Path) -> None:
    done = medbridge(*(part.replace("TINY", str(tiny_data)) for part in argv))
    assert done.code == 2
    assert message in done.err.replace("\n", " ")


def test_one_stage_after_another(medbridge: Callable[..., Done], config: Path, tmp_path: Path) -> None:
    """diagnose, bridge and sharpen on one run folder; the folder's own configuration serves after the first."""
    run = tmp_path / "run"
    first = medbridge("diagnose", config, "--run", run, "--json")
    assert first.code == 0, first.err
    assert set(first.json["strata"]) == {"shade", "side"}
    assert Path(first.json["report"]).is_file()

    again = medbridge("diagnose", "--run", run, "--json")
    assert again.json["rollouts"] == first.json["rollouts"], "nothing is sampled twice"

    refused = medbridge("sharpen", "--run", run)
    if "sharpen" not in {stratum["verdict"] for stratum in first.json["strata"].values()}:
        assert refused.code == 2
        assert "no stratum's last verdict is sharpen" in refused.err.replace("\n", " ")

    bridged = medbridge("bridge", "--run", run, "--stratum", "shade", "--json")
    assert bridged.code == 0, bridged.err
    assert (Path(bridged.json["model"]) / "model.safetensors").is_file()

    sharpened = medbridge("sharpen", "--run", run, "--stratum", "side", "--stratum", "shade", "--json")
    assert sharpened.code == 0, sharpened.err
    assert sharpened.json["model"] != bridged.json["model"]

    unknown = medbridge("bridge", "--run", run, "--stratum", "nowhere")
    assert unknown.code == 2
    assert "training strata are: shade, side" in unknown.err.replace("\n", " ")

    changed = medbridge("diagnose", "--run", run, "--set", "diagnosis.samples=3")
    assert changed.code == 2
    assert "begun with other settings (diagnosis.samples)" in changed.err.replace("\n", " ")


def test_run_and_report(medbridge: Callable[..., Done], config: Path, tmp_path: Path) -> None:
    done = medbridge("run", config, "--set", "budget.stages=1")
    assert done.code == 0, done.err
    assert "report:" in done.out
    assert (tmp_path / "runs" / "tiny" / "report.html").is_file()
    report = medbridge("report", tmp_path / "runs" / "tiny", "--out", tmp_path / "r.html", "--json")
    assert report.json["report"] == str(tmp_path / "r.html")
    assert report.json["state"] == "finished"


def test_init_model(medbridge: Callable[..., Done], config: Path, tmp_path: Path) -> None:
    made = medbridge("init-model", tmp_path / "m", "--config", config, "--json")
    assert made.code == 0, made.err
    assert made.json["architecture"] == "qwen2_5_vl"
    assert (tmp_path / "m" / "config.json").is_file()
    refused = medbridge("init-model", tmp_path / "m", "--config", config)
    assert refused.code == 2
    assert "--force" in refused.err
    assert medbridge("init-model", tmp_path / "m", "--config", config, "--force").code == 0
    used = medbridge("diagnose", config, "--model", tmp_path / "m", "--run", tmp_path / "r", "--json")
    assert used.code == 0, used.err
    assert used.json["base_model"] == str(tmp_path / "m")


def test_data_commands(medbridge: Callable[..., Done], tiny_data: Path, tmp_path: Path) -> None:
    source = f"jsonl:{tiny_data}"
    checked = medbridge("data", "check", "--data", source, "--set", "data.strata=[task]")
    assert checked.code == 0, checked.out
    assert "no problems" in checked.out
    assert medbridge("data", "check", "--data", source, "--json").json["splits"]["train"]["items"] == 12

    shown = medbridge("data", "show", "--data", source, "--count", 2)
    assert shown.out.count("target") == 2
    assert len(medbridge("data", "show", "--data", source, "--count", 3, "--split", "test", "--json").json) == 3

    imported = medbridge("data", "import", source, tmp_path / "copy", "--json")
    assert imported.json["items"] == {"train": 12, "validation": 12, "test": 12}
    assert medbridge("data", "check", "--data", f"jsonl:{tmp_path / 'copy'}").code == 0


def test_data_check_finds_problems(medbridge: Callable[..., Done], tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(
        json.dumps(
            {
                "dataset_name": "d", "dataset_index": 0, "image_paths": ["missing.png"], "question": "Which?",
                "options": {"A": "x", "B": "y"}, "answer_label": "A", "answer": "x", "split": "train",
            }
        )
        + "\n"
    )  # fmt: skip
    done = medbridge("data", "check", "--data", f"jsonl:{tmp_path / 'rows.jsonl'}")
    assert done.code != 0
    assert "missing.png" in (done.out + done.err).replace("\n", "")


def test_a_process_shows_a_traceback_with_debug_only(processes: Any, tmp_path: Path) -> None:
    for options, code, shown in (([], 2, False), (["--debug"], 1, True)):
        log = tmp_path / f"log-{code}"
        assert processes.wait(processes.start(["medbridge.cli", *options, "report", tmp_path / "none"], log)) == code
        assert ("Traceback" in log.read_text()) == shown
        assert "no such run database" in log.read_text()


def test_an_interrupted_run_is_reported_and_goes_on_from_anywhere(
    processes: Any,
    medbridge: Callable[..., Done],
    tiny_data: Path,
    tiny_config: Callable[..., dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ctrl-C; a report of what there is; then on from another working folder, without the configuration file."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "squares").symlink_to(tiny_data)
    source = {"kind": "jsonl", "path": "squares"}  # relative to the configuration
    settings = tiny_config(data={"sources": [source]}, budget={"stages": 1}, sft={"steps": 60})
    (home / "run.yaml").write_text(yaml.safe_dump(settings))
    run, log = tmp_path / "run", tmp_path / "log"
    child = processes.start(["medbridge.cli", "run", home / "run.yaml", "--run", run], log)
    deadline = time.monotonic() + 60
    while not (run / "models" / "01-format").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(child, signal.SIGINT)
    assert processes.wait(child) == 130
    assert f"stopped; call again with --run {run} to go on" in log.read_text()
    assert "Traceback" not in log.read_text()

    unfinished = medbridge("report", run, "--json")
    assert unfinished.code == 0, unfinished.err
    assert unfinished.json["state"] != "finished"
    assert Path(unfinished.json["report"]).is_file()

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    done = medbridge("run", "--run", run, "--json")
    assert done.code == 0, done.err
    assert done.json["state"] == "finished"


def test_config_command(medbridge: Callable[..., Done], config: Path) -> None:
    documented = medbridge("config")
    assert documented.code == 0
    lines = documented.out.splitlines()
    assert "rl.learning_rate  float = 5e-07" in lines
    assert "data.sources[].kind" in documented.out and ", required" in documented.out
    completed = yaml.safe_load(medbridge("config", config).out)
    assert completed["gate"]["alpha"] == 0.05
    assert medbridge("config", "--json").json["properties"]["rl"]

"""`medbridge data check`, `show --html` and `subset` as a user calls them: exit codes, bounded output, whole JSON."""

from __future__ import annotations

import json
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from medbridge.cli import app, common
from medbridge.errors import MedbridgeError


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common.stdout, "_width", 200)
    return lambda *arguments: CliRunner().invoke(app, ["data", *map(str, arguments)])


@pytest.fixture
def leaky(
    tmp_path: Path, make_png: Callable[..., Path], make_row: Callable[..., Any], write_rows: Callable[..., Path]
) -> str:
    """Fifteen images that train and test share, each with its own question; one asked twice in train."""
    rows = []
    for index in range(15):
        make_png(tmp_path / "in" / f"[b]{index}.png", index)
        for split in ("train", "test"):
            rows.append(
                make_row(
                    dataset_index=index, image_paths=[f"[b]{index}.png"], split=split, question=f"{split} {index}?"
                )
            )
    rows.append(make_row(dataset_index=99, image_paths=["[b]0.png"], split="train", question="Train 0 ?"))
    write_rows(tmp_path / "in" / "q.jsonl", rows)
    return f"jsonl:{tmp_path / 'in' / 'q.jsonl'}"


def test_check_names_the_leaks_within_bounds(call: Callable[..., Result], leaky: str) -> None:
    done = call("check", "--data", leaky)
    assert done.exit_code == 1
    assert "images shared between splits (15):" in done.stdout and "15 problems" in done.stdout
    assert (
        done.stdout.count("the same image is in train and test") == 10 and "and 5 more: --json lists all" in done.stdout
    )
    assert "[b]0.png" in done.stdout  # taken for a name, not for bold type
    assert "15 (100.0 %)" in done.stdout
    whole = json.loads(call("check", "--data", leaky, "--json").stdout)
    assert len(whole["shared_images"]) == len(whole["problems"]) == 15 and whole["ok"] is False
    assert whole["exposures"][0]["share"] == 1.0 and len(whole["duplicates"]) == len(whole["remarks"]) == 1


def test_the_table_of_leaks_is_whole_on_a_narrow_screen(
    call: Callable[..., Result], leaky: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common.stdout, "_width", 80)
    said = "".join(call("check", "--data", leaky).stdout.split())
    assert "demo/test" in said and "<demo/train" in said


def test_what_is_set_changes_what_data_names(call: Callable[..., Result], leaky: str, tmp_path: Path) -> None:
    limit = ("--set", "data.sources.0.limit=4")
    whole = json.loads(call("check", "--data", leaky, *limit, "--json").stdout)
    assert sum(split["items"] for split in whole["splits"].values()) == 8  # of each split 4
    assert call("import", leaky, tmp_path / "out", *limit).exit_code == 0
    assert sum(len(file.read_text().splitlines()) for file in (tmp_path / "out").glob("*.jsonl")) == 8


def test_a_ready_made_mapping_by_its_name(call: Callable[..., Result], tmp_path: Path) -> None:
    refused = call("import", "table:pmc_vqa", tmp_path / "out")
    assert isinstance(refused.exception, MedbridgeError) and "a table needs `path`" in str(refused.exception)
    absent = call("import", "table:pmc_vqa", tmp_path / "out", "--set", "data.sources.0.path=PMC")
    assert isinstance(absent.exception, MedbridgeError) and "PMC" in str(absent.exception)


def test_what_is_known_of_published_data_is_noted(
    call: Callable[..., Result], tmp_path: Path, make_png: Callable[..., Path]
) -> None:
    make_png(tmp_path / "a.png")
    own = 'path: t.jsonl\nquestion: q\nimages: i\nanswer: a\nsplit_default: test\nwhere: {a: "[a-y]*"}\n'
    (tmp_path / "own.yaml").write_text(own + "dataset: d\ncounts: {d: 5}\n")
    rows = [{"q": f"Which {a}?", "i": "a.png", "a": a} for a in "abz"]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = call("check", "--data", "table:own.yaml")
    assert done.exit_code == 0 and "no problems" in done.stdout
    assert "1 rows were passed over, as `where` says." in done.stdout
    assert "2 questions were read, 5 are published." in done.stdout


def test_remarks_fail_a_strict_check_only(
    call: Callable[..., Result], tmp_path: Path, make_png: Callable[..., Path], make_row: Callable[..., Any],
    write_rows: Callable[..., Path],
) -> None:  # fmt: skip
    make_png(tmp_path / "a.png")
    write_rows(tmp_path / "q.jsonl", [make_row(dataset_index=index) for index in range(2)])
    done = call("check", "--data", "jsonl:q.jsonl")
    assert done.exit_code == 0 and "asked 2 times about the same image in test" in done.stdout
    assert "no problems" in done.stdout
    assert call("check", "--data", "jsonl:q.jsonl", "--strict").exit_code == 1
    write_rows(tmp_path / "q.jsonl", [make_row()])
    assert call("check", "--data", "jsonl:q.jsonl", "--strict").exit_code == 0


def test_a_broken_image_is_one_line(
    call: Callable[..., Result], tmp_path: Path, make_row: Callable[..., Any], write_rows: Callable[..., Path]
) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    write_rows(tmp_path / "q.jsonl", [make_row(dataset_index=index, question=f"{index}?") for index in range(5)])
    whole = json.loads(call("check", "--data", "jsonl:q.jsonl", "--json").stdout)
    (problem,) = whole["problems"]
    assert problem.startswith("broken image: ") and "a.png" in problem and "(questions demo/test/0, " in problem
    assert whole["splits"]["test"]["items"] == 5


def test_show_writes_and_opens_a_page(
    call: Callable[..., Result], leaky: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    visited: list[str] = []
    monkeypatch.setattr(webbrowser, "open", visited.append)
    done = call("show", "--data", leaky, "--html", "out/page.html", "--split", "test", "--open", "--json")
    page = tmp_path / "out" / "page.html"
    assert json.loads(done.stdout) == {"page": str(page), "questions": 15} and visited == [page.as_uri()]
    assert page.read_text().count("<article") == 15
    assert call("show", "--data", leaky, "--html", "page.html", "-n", 2).exit_code == 0
    assert (tmp_path / "page.html").read_text().count("<article") == 2 and len(visited) == 1
    refused = call("show", "--data", leaky, "--open")
    assert isinstance(refused.exception, MedbridgeError) and "--html FILE" in str(refused.exception)


def test_subset_by_the_difficulty_in_a_file(call: Callable[..., Result], leaky: str, tmp_path: Path) -> None:
    (tmp_path / "rates.json").write_text(json.dumps({f"demo/train/{index}": index / 14 for index in range(15)}))
    done = call("subset", leaky, "out", "--size", 9, "--difficulty", "rates.json", "--balance-answers", "--json")
    assert done.exit_code == 0, done.exception
    found = json.loads(done.stdout)
    drawn = {name: counts[1] for name, counts in found["counts"]["difficulty"].items()}
    assert drawn.pop("not measured") == 1 and sorted(drawn.values()) == [2, 3, 3]
    assert found["counts"]["answer"] == {"B of 2": [16, 9]} and found["images"] <= 9
    assert "share of right samples in `rates.json`" in (tmp_path / "out" / "README.md").read_text()
    assert call("check", "--data", "jsonl:out").exit_code == 0
    assert call("subset", leaky, "other", "--size", 3, "--split", "test", "--seed", 4).exit_code == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "an object of item ids"), ('{"a": 2}', "from 0 to 1"), ('{"a": true}', "from 0 to 1"),
        ("{", "neither a run's folder"), (None, "neither a run's folder"), ('{"a": 0.5}', "no success rate"),
    ],
)  # fmt: skip
def test_a_wrong_difficulty_file(
    call: Callable[..., Result], leaky: str, tmp_path: Path, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "rates.json").write_text(content)
    done = call("subset", leaky, "out", "--size", 9, "--difficulty", "rates.json")
    assert isinstance(done.exception, MedbridgeError) and message in str(done.exception)
    assert not (tmp_path / "out").exists()


def test_subset_by_the_difficulty_in_a_run(call: Callable[..., Result], leaky: str, tmp_path: Path) -> None:
    from medbridge.ledger import Ledger
    from medbridge.support import Tally

    def tally(index: int, right: int) -> Tally:
        return Tally(item_id=f"demo/train/{index}", cluster=str(index), floor=0.5, n=8, c=right, abstained=0,
                     greedy_correct=None, votes={})  # fmt: skip

    (tmp_path / "run").mkdir()
    ledger = Ledger(tmp_path / "run" / "run.sqlite")
    empty = call("subset", leaky, "out", "--size", 4, "--difficulty", "run")
    assert "has not measured a question yet" in str(empty.exception)
    # The later measurement counts; a control's, of grey images, does not.
    for kind, right in (("diagnose", 8), ("route", 0), ("control", 8)):
        stage = ledger.begin_stage(round=1, kind=kind, model="m", strata=["demo"], plan={})
        ledger.save_tallies(stage.stage_id, [tally(index, right) for index in range(8)])
        ledger.finish_stage(stage.stage_id, result_model=None, summary={})
    ledger.close()
    done = call("subset", leaky, "out", "--size", 4, "--difficulty", "run", "--json")
    assert json.loads(done.stdout)["counts"]["difficulty"] == {"hard": [8, 2], "not measured": [8, 2]}

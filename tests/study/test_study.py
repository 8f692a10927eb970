"""Studies on a tiny model: trained by the study, or named; cut off and gone on with; what the page holds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from medbridge.errors import MedbridgeError
from medbridge.ledger import Ledger
from medbridge.probe.probing import fit_linear
from medbridge.progress import Reporter
from medbridge.report import write_report
from medbridge.report.collect import collect
from medbridge.study import StudyConfig, StudyResult, run_study
from medbridge.study.study import PAGE, RESULT, Study

CHANGES: dict[str, Any] = {
    "name": "two <strata>",
    "diagnosis": {"samples": 4, "controls": ["blank"], "split": "test", "test_split": None},
    "gate": {"min_items": 4, "replicates": 100},
}


@pytest.fixture
def run(tiny_config: Callable[..., dict[str, Any]], tiny_data: Path, tmp_path: Path) -> Callable[..., StudyResult]:
    """Run a study in tmp_path/study; keywords are the section `study`, but `data`, a folder of other questions."""

    def make(data: Path | None = None, **study: Any) -> StudyResult:
        settings = tiny_config(**CHANGES)
        if data is not None:
            sources = [{"kind": "jsonl", "path": str(data)}]
            settings = {**settings, "data": {**settings["data"], "sources": sources}}
        config = StudyConfig.model_validate({**settings, "study": {"sight": None, **study}})
        with (tmp_path / "log").open("a") as log:
            reporter = Reporter(Console(file=log, width=200))
            return run_study(
                config, tmp_path / "study", base_dir=tiny_data, cache_dir=tmp_path / "c", reporter=reporter
            )

    return make


def kinds(folder: Path) -> list[str]:
    ledger = Ledger(folder / "run.sqlite", read_only=True)
    found = [stage.kind for stage in ledger.stages()]
    ledger.close()
    return found


def test_a_study_trains_measures_and_compares(run: Callable[..., StudyResult], tmp_path: Path) -> None:
    found = run(transfer=[["shade"]])
    assert [row.name for row in found.models] == ["base", "after SFT", "after RL", "SFT on shade"]
    assert len(found.cells) == 4 * len(found.strata) == 8
    assert {(change.model, change.parent) for change in found.changes} == {
        ("after SFT", "base"), ("after RL", "after SFT"), ("SFT on shade", "base"),
    }  # fmt: skip
    trained = {change.stratum for change in found.changes if change.model == "SFT on shade" and change.trained}
    assert trained == {"shade"}
    for cell in found.cells:
        assert cell.items == 6 and cell.samples == 4 and sum(cell.spectrum) == 6
        assert cell.ks[0] == 1 and cell.ks[-1] == 4
    measured = ["diagnose", "control"]
    assert kinds(tmp_path / "study") == [
        "format", *measured, "bridge", *measured, "sharpen", "bridge", *measured, *measured,
    ]  # fmt: skip
    stored = json.loads((tmp_path / "study" / RESULT).read_text())
    assert stored == json.loads(json.dumps(found.to_dict()))
    page = (tmp_path / "study" / PAGE).read_text()
    assert "two &lt;strata&gt;" in page and "<strata>" not in page
    told = json.loads(page.split('id="items">')[1].split("</script>")[0])
    assert len(told["items"]) == 12 and told["models"] == [row.name for row in found.models]
    for item in told["items"]:
        assert item["whole"] and [records[0][0] for records in item["answers"]] == [-1] * 4
        assert [records[0][1] for records in item["answers"]] == [count[2] for count in item["counts"]]


def test_a_finished_study_samples_nothing_again(run: Callable[..., StudyResult], tmp_path: Path) -> None:
    first = run()
    before = kinds(tmp_path / "study")
    assert run() == first
    assert kinds(tmp_path / "study") == before


def test_probes_are_fitted_once(run: Callable[..., StudyResult], formed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted = []

    def fit(*inputs: Any) -> Any:
        fitted.append(inputs)
        return fit_linear(*inputs)

    monkeypatch.setattr("medbridge.study.sight.fit_linear", fit)
    models = {"formed": {"path": str(formed)}}
    first = run(models=models, sight={"min_images": 2})
    assert fitted and all(cell.sight is not None and cell.sight.items == 6 for cell in first.cells)
    fitted.clear()
    assert run(models=models, sight={"min_images": 2}) == first
    assert run(models={**models, "again": models["formed"]}, sight={"min_images": 2}).cells[0] == first.cells[0]
    assert not fitted
    for changed in ({"min_images": 3}, {"min_images": 3, "layer": "before"}, {"min_images": 3, "pool": "max"}):
        fitted.clear()
        run(models=models, sight=changed)
        assert fitted, changed
    fitted.clear()
    assert run(models=models, sight={"min_images": 7}).cells[0].sight is None  # no question has as many
    assert not fitted


def test_a_study_that_was_cut_off_goes_on(
    run: Callable[..., StudyResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Study.sharpen

    def cut(*inputs: Any) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(Study, "sharpen", cut)
    with pytest.raises(KeyboardInterrupt):
        run()
    done = kinds(tmp_path / "study")
    monkeypatch.setattr(Study, "sharpen", real)
    assert len(run().models) == 3
    assert kinds(tmp_path / "study")[: len(done)] == done


def test_models_that_are_named(
    run: Callable[..., StudyResult], model_folder: Callable[[str], Path], formed: Path, tmp_path: Path
) -> None:
    base, taught = str(model_folder("qwen2_5_vl")), str(formed)
    models = {"raw": {"path": base}, "taught": {"path": taught, "parent": "raw", "trained_on": ["shade", "side"]}}
    found = run(models=models)
    assert {cell.model for cell in found.cells} == {"raw", "taught"}
    assert all(change.trained for change in found.changes)
    assert kinds(tmp_path / "study") == ["diagnose", "control"] * 2
    more = {**models, "again": {"path": taught, "parent": "raw"}}
    assert len(run(models=more).cells) == 6  # a further name for a model that is measured
    assert kinds(tmp_path / "study") == ["diagnose", "control"] * 2


def test_groups_of_transfer_in_another_order_are_the_models_that_they_were(
    run: Callable[..., StudyResult], tmp_path: Path
) -> None:
    first = run(train=[], transfer=[["shade"]])
    again = run(train=[], transfer=[["side"], ["shade"]])
    assert [row.name for row in again.models] == ["base", "SFT on side", "SFT on shade"]
    assert again.models[2] == first.models[1] and again.cell("SFT on shade", "side") == first.cell(
        "SFT on shade", "side"
    )
    ledger = Ledger(tmp_path / "study" / "run.sqlite", read_only=True)
    trained = {stage.result_model: stage.strata for stage in ledger.stages() if stage.kind == "bridge"}
    ledger.close()
    assert [list(trained[row.path]) for row in again.models[1:]] == [["side"], ["shade"]]


def test_another_order_of_training_is_refused(run: Callable[..., StudyResult], tmp_path: Path) -> None:
    run(train=["bridge"])
    before = kinds(tmp_path / "study")
    with pytest.raises(
        MedbridgeError, match=r"stage 1 of this run folder is 'bridge', not 'sharpen'\. Name another folder"
    ):
        run(train=["sharpen", "bridge"])
    assert kinds(tmp_path / "study") == before
    assert len(run(train=["bridge", "sharpen"]).models) == 3


def test_other_weights_in_a_measured_folder_are_refused(
    run: Callable[..., StudyResult], formed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "own"
    shutil.copytree(formed, folder)
    models = {"own": {"path": str(folder)}}
    first = run(models=models)
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content)  # written again, and the same
    assert run(models=models) == first
    weights.write_bytes(content[:-4] + bytes(4))
    with pytest.raises(MedbridgeError, match=r"study\.models\.own\.path: .* other weights than those that this run"):
        run(models=models)


def test_a_stratum_without_training_items_is_measured_alone(
    run: Callable[..., StudyResult], tiny_data: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)
    file = data / "train.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    kept = [row for row in rows if "side" not in json.dumps(row.get("tags", row))]
    assert 0 < len(kept) < len(rows)
    file.write_text("".join(json.dumps(row) + "\n" for row in kept))
    with pytest.raises(MedbridgeError, match=r"study\.transfer names 'side', which has no training items"):
        run(data, transfer=[["side"]])
    found = run(data, train=["bridge"])
    assert found.models[1].trained_on == ("shade",) and {cell.stratum for cell in found.cells} == {"shade", "side"}
    assert "no training items of side: measured, and not trained on" in (tmp_path / "log").read_text()


def test_what_cannot_be_opened_is_named_before_anything_is_sampled(
    run: Callable[..., StudyResult], model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    here = {"here": {"path": str(model_folder("qwen2_5_vl"))}}
    with pytest.raises(MedbridgeError, match=r"^study\.models\.gone: "):
        run(models={**here, "gone": {"path": str(tmp_path / "empty")}})
    with pytest.raises(MedbridgeError, match=r"timm:no-such-network"):
        run(models=here, sight={"beside": "timm:no-such-network"})
    assert kinds(tmp_path / "study") == []


def test_a_model_whose_weights_cannot_be_read_is_named(
    run: Callable[..., StudyResult], model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    shutil.copytree(model_folder("qwen2_5_vl"), tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(MedbridgeError, match=r"^study\.models\.cut: "):
        run(models={"cut": {"path": str(tmp_path / "cut")}})


def test_the_report_of_a_study_tells_no_history(run: Callable[..., StudyResult], tmp_path: Path) -> None:
    run(transfer=[["shade"]])
    view = collect(tmp_path / "study")
    assert view.study and view.state == "finished" and view.final_model is None and "study.html" in view.state_note
    page = write_report(tmp_path / "study").read_text()
    assert "A study: its models stand beside each other" in page and "bridged, then sharpened" not in page


def test_probes_are_not_fitted_on_what_is_measured(tiny_config: Callable[..., dict[str, Any]]) -> None:
    changed = {**CHANGES, "diagnosis": {**CHANGES["diagnosis"], "split": "train"}}
    with pytest.raises(ValueError, match=r"diagnosis\.split is train, on which the probes are fitted"):
        StudyConfig.model_validate({**tiny_config(**changed), "study": {}})
    StudyConfig.model_validate({**tiny_config(**changed), "study": {"sight": None}})


@pytest.mark.parametrize(
    ("study", "message"),
    [
        ({"transfer": [[]]}, r"at least 1 item"),
        (
            {"models": {"a": {"path": "x", "parent": "b"}, "b": {"path": "y", "parent": "a"}}},
            r"a comes from b comes from a",
        ),
        ({"transfer": [["shadow"]]}, r"names the stratum 'shadow', and the test split has: shade, side"),
        ({"models": {"a": {"path": "x", "parent": "b"}}}, r"parent 'b' of 'a' is not another"),
        ({"models": {"a": {"path": "x", "trained_on": ["shade"]}}}, r"has trained_on and no parent"),
        ({"models": {"a": {"path": "x"}}, "transfer": [["shade"]]}, r"transfer is for a study that trains"),
    ],
)
def test_refusals(run: Callable[..., StudyResult], study: dict[str, Any], message: str) -> None:
    with pytest.raises((MedbridgeError, ValueError), match=message):
        run(**study)

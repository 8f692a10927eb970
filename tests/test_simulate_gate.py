"""The simulation behind docs/operating-characteristics.md: does it simulate the gate that medbridge has, would it
catch a wrong statistic, and does the page carry what it found?"""

from __future__ import annotations

import importlib
import json
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from medbridge.support import GateSettings, StratumEvidence, Tally, measure, settle

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def bench() -> Any:
    """A loader of the benchmark's modules, which lie outside the package."""
    sys.path.insert(0, str(ROOT / "bench"))
    yield importlib.import_module
    sys.path.remove(str(ROOT / "bench"))


@pytest.fixture(scope="module")
def truths(bench: Any) -> ModuleType:
    return bench("gate_studies.truths")


@pytest.fixture(scope="module")
def gate(bench: Any) -> ModuleType:
    return bench("gate_studies.gate")


@pytest.fixture(scope="module")
def script(bench: Any) -> ModuleType:
    return bench("simulate_gate")


def tallies(truth: Any, counts: np.ndarray, greedy: np.ndarray | None = None) -> list[Tally]:
    """One simulated data set, [clusters, size], as the gate sees it."""
    (clusters, size), types = counts.shape, len(truth.floors)
    return [
        Tally(
            f"{i}-{j}",
            str(i),
            truth.floors[j % types],
            truth.n,
            int(counts[i, j]) % (truth.n + 1),
            greedy_correct=None if greedy is None else bool(greedy[i, j]),
        )
        for i in range(clusters)
        for j in range(size)
    ]


@pytest.mark.parametrize("statistic", ["reached", "pass"])
@pytest.mark.parametrize("options", [(2,), (4,), (0,), (2, 0)])
def test_intervals_are_those_of_the_gate(truths: Any, gate: Any, options: tuple[int, ...], statistic: str) -> None:
    truth = truths.Truth(0.5, 0.6, options, "wrong", items=48, n=8, size=4, correlation=0.5)
    generator = np.random.default_rng(1)
    sample = truths.draw(truth, 1, generator)
    name = gate.CHOSEN if statistic == "reached" else "pass, room 0.25"
    scores = gate.candidates(truth.floors, truth.n).of(name)
    low, high = gate.bootstrap(sample, scores, generator, 8000, gate.ends)
    real = measure(tallies(truth, sample.categories[0]), GateSettings(statistic=statistic, replicates=8000), seed=0)
    assert real.support is not None
    assert gate.point(sample, scores).item() == pytest.approx(real.support.value, abs=1e-12)
    spread = real.support.high - real.support.low
    assert low.item() == pytest.approx(real.support.low, abs=0.04 * spread)
    assert high.item() == pytest.approx(real.support.high, abs=0.04 * spread)


def test_merged_items_weigh_as_single_ones(truths: Any, gate: Any) -> None:
    truth = truths.Truth(0.4, 0.6, (4,), "fresh", items=30)
    generator = np.random.default_rng(2)
    histogram = truths.draw(truth, 1, generator).histogram
    scores = gate.chosen(truth)
    single = truths.Sample(None, np.repeat(np.arange(truth.n + 1), histogram[0])[None, :, None])
    merged, apart = (
        np.concatenate(gate.bootstrap(sample, scores, generator, 20_000, gate.ends))
        for sample in (truths.Sample(histogram, None), single)
    )
    assert merged == pytest.approx(apart, abs=0.01)


@pytest.mark.parametrize("size", [1, 4])
def test_draws_have_the_estimand_as_their_mean(truths: Any, gate: Any, size: int) -> None:
    truth = truths.Truth(0.3, 0.6, (2, 0), "repeat", items=40, n=8, size=size, correlation=0.7)
    scores = gate.candidates(truth.floors, truth.n)
    values = gate.point(truths.draw(truth, 4000, np.random.default_rng(3)), scores)
    error = values.std(axis=0) / np.sqrt(len(values))
    assert (np.abs(values.mean(axis=0) - scores.truth(truth)) < 4.5 * error).all()


def test_correlation_of_skill_within_a_cluster(truths: Any) -> None:
    truth = truths.Truth(0.4, 1.0, (0,), "wrong", items=4000, n=1, size=2, correlation=0.5)
    counts, _ = truths.draw_items(truth, 10, np.random.default_rng(4))
    first, second = counts[..., 0].ravel(), counts[..., 1].ravel()
    assert np.corrcoef(first, second)[0, 1] == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("options", [(2,), (3,), (4,), (5,), (8,), (11,)])
@pytest.mark.parametrize("unskilled", ["fresh", "repeat"])
def test_every_guesser_reads_zero(truths: Any, gate: Any, options: tuple[int], unskilled: str) -> None:
    truth = truths.Truth(0.5, 0.6, options, unskilled)
    scores = gate.candidates(truth.floors, truth.n)
    for name, value in zip(scores.names, scores.part(truth, False), strict=True):
        if "reached" in name or unskilled == "fresh":
            assert value == pytest.approx(0, abs=1e-9), name


def test_a_wrong_statistic_is_caught(truths: Any, gate: Any) -> None:
    """Support that forgets to subtract guessing errs nearly always where the right one errs in alpha of the runs."""
    base = truths.Truth(0.5, 0.9, (4,), "fresh", items=100)
    right = gate.chosen(base)
    truth = gate.at_threshold(base, right)
    assert truth is not None and right.truth(truth).item() == pytest.approx(gate.TAU)
    top = right.top + np.array([[1 / 4]])
    wrong = gate.Scores(right.names, top, np.ones_like(top), np.zeros(1), np.ones(1), np.ones(1))
    runs = 400
    limit = gate.ALPHA + 4 * np.sqrt(gate.ALPHA * (1 - gate.ALPHA) / runs)
    for scores, bound in ((right, True), (wrong, False)):
        bridge, sharpen = gate.verdict_rates(truth, scores, runs, np.random.default_rng(5))
        assert bool(max(bridge.item(), sharpen.item()) <= limit) is bound
    assert sharpen.item() > 0.5


def test_truths_without_a_threshold_are_left_out(truths: Any, gate: Any) -> None:
    weak = truths.Truth(0.5, 0.05, (4,), "fresh")
    assert gate.at_threshold(weak, gate.chosen(weak)) is None


def test_cover_of_clear_cut_items(truths: Any, gate: Any) -> None:
    histogram = np.zeros(17)
    histogram[0], histogram[16] = 30, 70
    assert gate.em_cover(histogram, 16, 0.25) == pytest.approx([0.7, 0.7], abs=0.01)


def test_sequential_plan_is_that_of_the_gate(truths: Any, bench: Any) -> None:
    """The vectorised plan stops where StratumEvidence and settle stop, with the same claims proven."""
    sequential = bench("gate_studies.sequential")
    base = truths.Truth(0.5, 0.9, (4,), "repeat", items=64, size=2, correlation=0.5)
    strata = [truths.Truth(pi, 0.6, (4,), "repeat", 64, size=2, correlation=0.5) for pi in (0.05, 0.5, 0.95)]
    generator, runs = np.random.default_rng(6), 6
    data = [truths.draw_items(truth, runs, generator) for truth in strata]
    found = [sequential.log_evidence(truth, *drawn) for truth, drawn in zip(strata, data, strict=True)]
    stopped = sequential.stop(np.stack([log_e for log_e, _ in found], axis=2), found[0][1])
    settings = GateSettings()
    for run in range(runs):
        own = [tallies(truth, counts[run], greedy[run]) for truth, (counts, greedy) in zip(strata, data, strict=True)]
        tests = {
            str(j): StratumEvidence(settings, base.n, [t.floor for t in items], [t.cluster for t in items])
            for j, items in enumerate(own)
        }
        used = dict.fromkeys(tests, 0)
        waiting = set(tests)
        while waiting:
            for name in waiting:
                tests[name].add(own[int(name)][used[name] : used[name] + sequential.LOOK])
                used[name] += sequential.LOOK
            settled = settle(tests, settings)
            waiting = {name for name in waiting if settled[name] is None and used[name] < base.items}
        assert stopped.items[run].tolist() == list(used.values())
        bridged = [settled[name] == "bridge" for name in tests]
        assert stopped.below[run].tolist() == bridged
        assert (~stopped.exhausted[run]).tolist() == [settled[name] is not None for name in tests]
    assert stopped.items.min() < base.items and stopped.items.max() == base.items


def test_results_do_not_depend_on_the_jobs(truths: Any, gate: Any, bench: Any) -> None:
    running = bench("gate_studies.running")
    rates = bench("gate_studies.power")._chosen_rates
    cells = [truths.Truth(pi, 0.6, items=20) for pi in (0.2, 0.8, 0.9)]
    one, two = (running.spread(partial(rates, 20), cells, running.Plan(jobs=jobs), "test") for jobs in (1, 2))
    assert one == two


def table_rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_script_writes_results_and_page(
    script: Any, bench: Any, truths: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    results, page = tmp_path / "gate.json", tmp_path / "page.md"
    low, high = (truths.Truth(pi, 0.9, items=64) for pi in (0.0, 1.0))
    tiny = {"far below and above": (low, high), "above": (high, high)}
    monkeypatch.setattr(bench("gate_studies.sequential"), "_scenarios", lambda: tiny)
    monkeypatch.setattr("records.machine", lambda: {"processor": "tested"})  # reading the versions takes seconds
    page.write_text("before\n<!-- table: strata -->\nold\n<!-- end: strata -->\nafter\n")
    script.main(["--study", "strata", "--runs", "10", "--jobs", "1", "--write"], results, page)
    saved = json.loads(results.read_text())["figures"]["strata"]
    assert saved["runs"] == 10 and saved["command"].endswith("--study strata --runs 10") and saved["machine"]
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    header, _, *rows = table_rows(text)
    assert [row[0] for row in rows] == list(tiny)
    assert all(len(row) == len(header) for row in rows)
    for row in rows:
        wrong, right, share = row[1:5], row[5:7], row[7]
        assert [float(cell) for cell in wrong] == [0] * 4
        assert [float(cell) for cell in right] == [1] * 2
        assert 0 < float(share) < 1
    assert "far below and above" in capsys.readouterr().out


def test_script_refuses_what_makes_no_sense(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--quick", "--write"], "--quick saves nothing"),
        (["--runs", "3"], "--runs 3"),
        (["--study", "nothing"], "invalid choice"),
    ):
        with pytest.raises(SystemExit):
            script.main(arguments, tmp_path / "gate.json", tmp_path / "page.md")
        assert message in capsys.readouterr().err
    (tmp_path / "page.md").write_text("no markers")
    with pytest.raises(ValueError, match="no markers `<!-- table: strata -->`"):
        script.write_page(tmp_path / "page.md", {"strata": {"scenarios": [], "runs": 1, "command": "", "measured": ""}})


def test_page_carries_the_saved_results(script: Any, tmp_path: Path) -> None:
    figures = json.loads(script.RESULTS.read_text())["figures"]
    assert set(figures) == set(script.STUDIES)
    copy = tmp_path / "page.md"
    copy.write_text(script.PAGE.read_text())
    script.write_page(copy, figures)
    assert copy.read_text() == script.PAGE.read_text()

"""What a training stage shows: a live table on a terminal, a few readable lines in a log."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
from rich.console import Console

from medbridge import live
from medbridge.live import figure
from medbridge.metrics import METRICS, PHASES
from medbridge.progress import Reporter

STEP = {
    "reward": 0.5, "accuracy": 0.25, "loss": -0.01, "kl": 0.001, "entropy": 0.7, "clip_high": 0.02, "signal": 0.75,
    "groups_without_signal": 2.0, "completion_length": 48.0, "tokens_per_second": 1234.5, "mfu": 0.31,
    "memory_gb": 3.2, "seconds_sampling": 1.5, "seconds_syncing": 0.2, "seconds_training": 2.5, "seconds_loss": 0.5,
    "held_out_accuracy": 0.4,
}  # fmt: skip


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The seconds that the view reads, in a list of one."""
    now = [0.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])
    yield now


def test_a_log_gets_the_first_and_the_last_step_and_a_line_now_and_then(clock: list[float]) -> None:
    file = io.StringIO()
    with Reporter(Console(file=file)).training("sharpen: GRPO", 100) as view:
        view.begin(0)
        for step in range(1, 101):
            view.show(step, STEP)
            clock[0] += 1.0
    lines = file.getvalue().splitlines()
    steps = [int(line.split("/100")[0].rsplit(" ", 1)[1]) for line in lines]
    assert steps == [1, 11, 21, 31, 41, 51, 61, 71, 81, 91, 100]
    assert all("\x1b" not in line and "\r" not in line for line in lines)
    for part in ("sharpen: GRPO 1/100: ", "reward 0.5", "entropy (nats) 0.7", "training 2.5 s", "loss 0.5 s"):
        assert part in lines[0]


def test_a_terminal_gets_a_table_that_is_drawn_over() -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=120, height=40)
    with Reporter(console).training("sharpen: GRPO", 3) as view:
        view.begin(1)
        view.show(2, STEP)
        console.print("said in between")
        view.show(3, {**STEP, "reward": 1.0})
    drawn = file.getvalue()
    assert "\x1b[" in drawn and "said in between" in drawn
    last = drawn.rsplit("sharpen: GRPO", 1)[1]
    assert "3/3" in last
    for label in ("Reward", "Entropy (nats)", "Clipped at the high end", "Groups with equal rewards", "MFU"):
        assert label in last
    for phase in PHASES:
        assert f"Seconds: {phase}" in last
    reward = next(line for line in last.splitlines() if "Reward" in line)
    assert reward.split()[1:3] == ["1", "0.75"]  # now, and the mean


def test_a_step_without_a_loss_and_numbers_that_are_none(clock: list[float]) -> None:
    for terminal in (False, True):
        file = io.StringIO()
        console = Console(file=file, force_terminal=terminal, width=120)
        with Reporter(console).training("bridge: SFT", 2) as view:
            view.begin(0)
            view.show(1, {"loss": float("nan")})
            view.show(2, {})
        assert "nan" in file.getvalue()


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("mfu", 0.314159, "31.4 %"), ("clip_low", 0.0, "0 %"), ("loss", 1.23456, "1.235"), ("loss", -1e-7, "-1e-07"),
        ("tokens_per_second", 12345.6, "12,346"), ("mfu", float("inf"), "inf"), ("unknown", 2.0, "2"),
    ],
)  # fmt: skip
def test_figures_are_short(name: str, value: float, text: str) -> None:
    assert figure(name, value) == text


def test_every_metric_of_the_table_is_known() -> None:
    assert set(live._ROWS) | set(live._LINE) | set(PHASES.values()) <= METRICS.keys()
    assert all(metric.meaning.endswith(".") and metric.label for metric in METRICS.values())

"""What logged completions show, per stratum."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from sklearn.metrics import cohen_kappa_score
from typer.testing import CliRunner

from medbridge.cli import app
from medbridge.data import Skip
from medbridge.errors import MedbridgeError
from medbridge.evaluation import Evaluation, Logged, answered_in_log, evaluate_logs, read_logs
from medbridge.evaluation.figures import ABSTAINED

OPTIONS = ["Heart", "Liver", "Lung", "Spleen"]


def log(path: Path, completions: Sequence[Sequence[str]], **changes: Any) -> Path:
    """A question a row, whose right answer goes round the options."""
    content = [
        {"id": n, "question": f"Which organ ({n})?", "options": OPTIONS, "answer": "ABCD"[n % 4], "image_id": n // 2,
         "dataset_name": "organs", "completions": list(texts), **changes}
        for n, texts in enumerate(completions)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


def evaluated(path: Path, **options: Any) -> Evaluation:
    return evaluate_logs(list(read_logs([path])), **options)


def test_a_model_that_knows(tmp_path: Path) -> None:
    texts = [[f"<answer>{'ABCD'[n % 4]}</answer>"] * 8 for n in range(40)]
    [found] = evaluated(log(tmp_path / "a.jsonl", texts)).strata
    assert found.accuracy["value"] == found.macro_accuracy == 1 and found.pass_at_k == (1.0,) * 8
    assert found.majority == pytest.approx((1.0,) * 8) and found.floors[0] == pytest.approx(0.25)
    assert (found.items, found.clusters, found.samples) == (40, 20, (8, 8))
    assert found.acc_at_1 is None and found.support is not None and found.support["value"] == pytest.approx(1)
    assert found.verdict in ("sharpen", "undecided", "done")
    assert found.confusion is not None and found.confusion["Liver"] == {"Liver": 80}


def test_a_model_that_is_wrong_and_one_that_says_nothing_readable(tmp_path: Path) -> None:
    wrong = [[f"Image {sample}. The answer is {'BCDA'[n % 4]}." for sample in range(8)] for n in range(40)]
    [found] = evaluated(log(tmp_path / "a.jsonl", wrong)).strata
    assert found.verdict == "bridge" and found.accuracy["value"] == 0 and found.abstain_rate == 0
    [mute] = evaluated(log(tmp_path / "b.jsonl", [["hmm", "well", "hmm", "so"]] * 10)).strata
    assert mute.verdict == "undecided" and mute.reason.startswith("No verdict: the measurement can't be trusted. 100%")
    assert mute.abstain_rate == 1 and mute.confusion is not None and set(mute.confusion["Heart"]) == {ABSTAINED}
    assert mute.majority == (0.0,) * 4


def test_pass_at_k_is_the_unbiased_estimate(tmp_path: Path) -> None:
    """One right of four samples: Pass@1 1/4, Pass@2 1/2, Pass@4 1."""
    texts = [[f"<answer>{letter}</answer>" for letter in "ABCD"] for _ in range(12)]
    [found] = evaluated(log(tmp_path / "a.jsonl", texts)).strata
    assert found.pass_at_k == pytest.approx((0.25, 0.5, 0.75, 1.0))
    assert found.majority[0] == pytest.approx(0.25) and found.majority[3] == pytest.approx(0.25)


def test_readings_stand_side_by_side(tmp_path: Path) -> None:
    texts = [[f"I think it is option {'ABCD'[n % 4]}", f"<answer>{'ABCD'[n % 4]}</answer>"] for n in range(20)]
    [found] = evaluated(log(tmp_path / "a.jsonl", texts)).strata
    assert found.readings["strict"] == 0.5 <= found.readings["standard"] <= found.readings["lenient"] == 1
    [lenient] = evaluated(log(tmp_path / "a.jsonl", texts), reading="lenient").strata
    assert lenient.accuracy["value"] == 1 and lenient.abstain_rate == 0


def test_boxed_answers_are_read(tmp_path: Path) -> None:
    forms = (r"First \boxed{A}, no: \boxed{%s}", r"\boxed{\text{%s}}", r"\boxed{\mathrm{(%s)}}")
    texts = [[forms[n % 3] % "ABCD"[n % 4]] for n in range(24)]
    [found] = evaluated(log(tmp_path / "a.jsonl", texts)).strata
    assert found.accuracy["value"] == 1


@pytest.mark.parametrize(
    ("text", "status"),
    [
        (r"so \boxed{\textbf{(C)}}.", "correct"),
        (r"\boxed{{C}", "abstain"),
        ("C", "correct"),
        (" (C) ", "correct"),
        ("C. Lung", "correct"),
        ("lung.", "correct"),
        ("ANSWER: C", "correct"),
        ("<think>It is B, or\nso.</think>\n\nC", "correct"),
        ("B", "wrong"),
        ("Liver", "wrong"),
        ("C\nB", "abstain"),
        ("The lung and the liver", "abstain"),
        ("C is what it may be. " * 20, "abstain"),
        ("<think>C", "abstain"),
        ("<answer>C", "abstain"),
        ("", "abstain"),
    ],
)
def test_completions_without_a_form(tmp_path: Path, text: str, status: str) -> None:
    """One short line is an answer; strictly read it is none."""
    path = log(tmp_path / "a.jsonl", [["<answer>A</answer>"], ["<answer>B</answer>"], [text or " "]])
    entry = answered_in_log([found for found in read_logs([path]) if isinstance(found, Logged)][2])
    assert entry.readings["standard"][0].status == status
    assert entry.readings["strict"][0].status == "abstain"


@pytest.mark.parametrize(
    ("text", "status"),
    [("Left lung.", "correct"), ("the heart", "wrong"), ("The answer is left lung.", "correct"), ("a\nb", "abstain")],
)
def test_open_completions_without_a_form(tmp_path: Path, text: str, status: str) -> None:
    path = tmp_path / "open.jsonl"
    path.write_text(json.dumps({"question": "Where?", "answer": "left lung", "completions": [text]}) + "\n")
    [entry] = [answered_in_log(found) for found in read_logs([path]) if isinstance(found, Logged)]
    assert entry.readings["standard"][0].status == status


def test_the_logs_own_scores_are_compared(tmp_path: Path) -> None:
    rows = [
        {"doc_id": n, "doc": {"question": f"q{n}", "choices": OPTIONS, "answer": 1}, "target": "B",
         "resps": [["The answer is B."]], "filtered_resps": ["B"], "filter": "none", "acc": int(n > 2)}
        for n in range(10)
    ]  # fmt: skip
    path = tmp_path / "samples_t_x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    [found] = evaluated(path).strata
    assert (found.disagreements, found.scored) == (3, 10)


def test_greedy_completions_and_strata(tmp_path: Path) -> None:
    path = log(tmp_path / "a.jsonl", [["<answer>A</answer>"] * 4] * 40, greedy="<answer>A</answer>")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**row, "category": f"c{n % 2}"}) + "\n" for n, row in enumerate(lines)))
    found = evaluated(path, by=["category"])
    assert [row.stratum for row in found.strata] == ["c0", "c1"]
    assert [row.acc_at_1 and row.acc_at_1["value"] for row in found.strata] == [0.5, 0.0]
    with pytest.raises(MedbridgeError, match="no tag 'organ'"):
        evaluated(path, by=["organ"])


def test_open_questions_and_differing_numbers_of_samples(tmp_path: Path) -> None:
    rows = [
        {"id": n, "question": "Which organ?", "answer": "the liver", "image_id": n,
         "completions": ["<answer>The liver.</answer>"] * (1 + n % 3)}
        for n in range(12)
    ]  # fmt: skip
    path = tmp_path / "open.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    [found] = evaluated(path).strata
    assert found.samples == (1, 3) and found.accuracy["value"] == 1 and found.confusion is None
    assert found.floors == (0.0,)


def test_open_answers_beyond_equality(tmp_path: Path) -> None:
    rows = [
        {"id": 1, "question": "Where?", "answer": "left upper lobe", "completions": ["<answer>the left lobe</answer>"]},
        {"id": 2, "question": "How large?", "answer": "1.5 cm", "completions": ["<answer>15 mm</answer>"]},
        {"id": 3, "question": "How many?", "answer": "2", "completions": ["no idea"]},
    ]
    path = tmp_path / "open.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    [found] = evaluated(path).strata
    assert found.open_answers is not None and found.open_answers["quantities"] == 2
    assert found.open_answers["same_quantity"] == 0.5
    assert found.open_answers["token_f1"] == pytest.approx((0.8 + 1 + 0) / 3)  # 15 mm is right
    assert "token F1 0.60; the right quantity in 0.50" in CliRunner().invoke(app, ["evaluate", str(path)]).output


def test_grades_in_order(tmp_path: Path) -> None:
    """One grade too high, but for the highest: 3 of 4 are off by one."""
    texts = [[f"<answer>{'BCDD'[n % 4]}</answer>", "nothing"] for n in range(20)]
    path = log(tmp_path / "a.jsonl", texts)
    [found] = evaluated(path, ordered=["organs"]).strata
    assert found.ordinal is not None and found.ordinal["mean_absolute_error"] == pytest.approx(0.75)
    truth, read = [0, 1, 2, 3], [1, 2, 3, 3]
    assert found.ordinal["quadratic_kappa"] == pytest.approx(cohen_kappa_score(truth, read, weights="quadratic"))
    assert evaluated(path).strata[0].ordinal is None
    assert "0.75 grades off" in CliRunner().invoke(app, ["evaluate", str(path), "--ordered", "organs"]).output
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0].replace("Spleen", "Bowel"), *lines[1:]]))
    with pytest.raises(MedbridgeError, match="no grades"):
        evaluated(path, ordered=["organs"])


def test_a_data_set_that_is_not_there_to_be_in_order(tmp_path: Path) -> None:
    with pytest.raises(MedbridgeError, match="no data set is named 'organ' to be in order; there are: organs"):
        evaluated(log(tmp_path / "a.jsonl", [["A", "B"]] * 10), ordered=["organ"])


def test_one_completion_a_question_gives_no_verdict(tmp_path: Path) -> None:
    [found] = evaluated(log(tmp_path / "a.jsonl", [["B"]] * 100)).strata
    assert found.accuracy["value"] == 0.25 and found.verdict == "undecided"
    assert "one completion a question tells accuracy alone" in found.reason


def test_a_question_that_broke_off_does_not_cut_the_curves(tmp_path: Path) -> None:
    found = evaluated(log(tmp_path / "a.jsonl", [["A", "B", "C", "D"]] * 40 + [["A"]]))
    assert found.strata[0].samples == (4, 4) and found.strata[0].items == 40
    assert found.skipped == ("organs/40: 1 completions, where 4 are usual.",)


def test_samples_that_all_repeat_each_other_give_no_verdict(tmp_path: Path) -> None:
    """As a log has it that was sampled at temperature 0."""
    [found] = evaluated(log(tmp_path / "a.jsonl", [["A"] * 8] * 40)).strata
    assert found.verdict == "undecided" and "40 of 40 items have 8 identical samples" in found.reason
    one_differs = [["A"] * 8] * 39 + [["A"] * 7 + ["A."]]
    assert evaluated(log(tmp_path / "b.jsonl", one_differs)).strata[0].verdict == "bridge"


@pytest.mark.parametrize("shared", [[["x0"], ["x0"]], [["x0", "a"], ["b", "x0"]], [["x0", "a"], ["x1", "a"]]])
def test_questions_with_an_image_in_common_belong_together(tmp_path: Path, shared: list[list[str]]) -> None:
    rows = [json.loads(line) for line in log(tmp_path / "a.jsonl", [["A", "B"]] * 22).read_text().splitlines()]
    for row, images in zip(rows, shared, strict=False):
        row["image_paths"] = images
    for row in rows:
        row["image_id"] = None if "image_paths" in row else row["id"]
    path = tmp_path / "b.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert evaluated(path).strata[0].clusters == 21


def test_any_of_several_accepted_answers_is_right(tmp_path: Path) -> None:
    texts = [["left lung", "lung, left", "right lung", "heart"]] * 10
    changes = {"options": None, "answer": ["left lung", "lung left"]}
    [found] = evaluated(log(tmp_path / "a.jsonl", texts, **changes)).strata
    assert found.accuracy["value"] == 0.5


def test_how_open_answers_in_logs_are_graded(tmp_path: Path) -> None:
    path = log(tmp_path / "a.jsonl", [["the left lung", "51 mm"]] * 10, options=None, answer="left lung")
    runner = CliRunner()

    def accuracy(*options: str) -> float:
        shown = runner.invoke(app, ["evaluate", str(path), "--json", *options])
        assert shown.exit_code == 0, shown.output
        return float(json.loads(shown.stdout)["strata"][0]["accuracy"]["value"])

    assert accuracy() == 0 and accuracy("--set", "data.prompt.f1_from=0.8") == 0.5
    wrong = runner.invoke(app, ["evaluate", str(path), "--set", "rl.steps=3"])
    assert "--set rl.steps=3: of logs only how answers are graded" in str(wrong.exception)
    wrong = runner.invoke(app, ["evaluate", str(path), "--set", "data.prompt.f1_from=7"])
    assert isinstance(wrong.exception, MedbridgeError) and "f1_from" in str(wrong.exception)


def test_questions_in_several_logs(tmp_path: Path) -> None:
    paths = [log(tmp_path / f"{name}.jsonl", [[name, "B"]] * 10) for name in ("A", "C")]
    found = evaluate_logs(list(read_logs(paths)))
    assert found.strata[0].samples == (4, 4)
    assert found.notes == (
        "10 questions stand in several logs, and their completions add up: all must be of one model.",
    )
    shown = CliRunner().invoke(app, ["evaluate", *map(str, paths)])
    assert "note: 10 questions stand in several logs" in shown.output
    paths[1].write_bytes(paths[0].read_bytes())
    with pytest.raises(MedbridgeError, match="hold the same: leave one out"):
        list(read_logs(paths))


def test_nothing_to_evaluate() -> None:
    with pytest.raises(MedbridgeError, match="no question with completions"):
        evaluate_logs([Skip("a", 1, None, "bad")])


def test_the_command(tmp_path: Path) -> None:
    path = log(tmp_path / "a.jsonl", [["<answer>A</answer>"] * 4] * 20)
    runner = CliRunner()
    shown = runner.invoke(app, ["evaluate", str(path)])
    assert shown.exit_code == 0, shown.output
    assert "organs" in shown.output and "Mean accuracy by reading: strict 0.25" in shown.output
    assert "mean over right answers 0.25; guessing 0.25" in shown.output
    told = runner.invoke(app, ["evaluate", str(path), "--json", "--out", str(tmp_path / "out.json")])
    assert json.loads(told.stdout) == json.loads((tmp_path / "out.json").read_text())
    wrong = runner.invoke(app, ["evaluate", str(path), "--reading", "kind"])
    assert isinstance(wrong.exception, MedbridgeError) and "strict, standard, lenient" in str(wrong.exception)

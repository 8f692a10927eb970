"""Logs in the forms in which other tools publish them, whole and broken."""

from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from medbridge.data import Skip
from medbridge.errors import MedbridgeError
from medbridge.evaluation import Logged, read_logs

DOC = {"question": "Which organ is shown?", "options": ["Heart", "Liver", "Lung"], "answer": "B", "image_id": "x1"}


def rows(path: Path, *content: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


def one(path: Path, kind: str = "auto") -> Logged:
    [found] = read_logs([path], kind)
    assert isinstance(found, Logged), found
    return found


def harness(doc_id: int, resps: Any, **changes: Any) -> dict[str, Any]:
    return {
        "doc_id": doc_id, "doc": DOC, "target": "B", "arguments": {}, "resps": resps, "filtered_resps": ["B"],
        "filter": "none", "exact_match": 1.0, **changes,
    }  # fmt: skip


def test_lm_evaluation_harness(tmp_path: Path) -> None:
    path = rows(tmp_path / "samples_medqa_2026-11-23T10-00-00.123.jsonl", harness(0, [["The answer is B.", "A", "C"]]))
    found = one(path)
    assert found.completions == ("The answer is B.", "A", "C") and found.scores == (None,) * 3
    assert found.item.id == "medqa/0" and found.item.answer == "Liver" and found.item.floor == pytest.approx(1 / 3)


def test_a_row_a_filter_is_one_question(tmp_path: Path) -> None:
    path = rows(
        tmp_path / "samples_t_x.jsonl", harness(0, [["B"]], filter="strict"), harness(0, [["B"]], filter="loose")
    )
    assert one(path).completions == ("B",) and one(path).scores == (True,)


def lmms(doc_id: int, **changes: Any) -> dict[str, Any]:
    """As lmms-eval writes a row: without the document, and without `resps` where filters change nothing."""
    prompt = (
        "Answer the following question. The last line should be 'Answer: $LETTER'.\nQuestion: Which organ is shown?\n"
        "A. Heart\nB. Liver\nC. Lung\n"
    )
    return {
        "doc_id": doc_id, "target": "B", "filtered_resps": "I see the liver.\nAnswer: B", "token_counts": [None],
        "doc_hash": "74ab", "input": prompt, "input_media": ["slake/xmlab1/source.jpg"], "accuracy": 1.0, **changes,
    }  # fmt: skip


@pytest.mark.parametrize(
    "name", ["20261123_101500_samples_slake_closed.jsonl", "samples_slake_closed_2026-01-01T1.jsonl"]
)
def test_lmms_eval(tmp_path: Path, name: str) -> None:
    path = rows(tmp_path / name, lmms(0), lmms(1, resps=["Answer: A", "Answer: B"], filtered_resps="A"))
    first, second = read_logs([path])
    assert isinstance(first, Logged) and isinstance(second, Logged)
    assert first.item.id == "slake_closed/0" and first.item.options == ("Heart", "Liver", "Lung")
    assert first.item.answer == "Liver" and first.completions == ("I see the liver.\nAnswer: B",)
    assert first.scores == (True,) and second.completions == ("Answer: A", "Answer: B")
    assert first.shows == second.shows  # the same picture


CHAT = [{"role": "system", "content": "A. x"}, {"role": "user", "content": "q?\nA) Heart\nB) Liver"}]


@pytest.mark.parametrize(
    "prompt",
    [
        "Example\nA. One\nB. Two\nAnswer: A\n\nNow\n(A) Heart\n(B) Liver",
        json.dumps(CHAT),
        "Where?\nA: Heart\nC: Lung\nB: Liver",
    ],
)
@pytest.mark.parametrize("form", ["input", "list", "dict"])
def test_options_in_a_prompt(tmp_path: Path, prompt: str, form: str) -> None:
    forms: dict[str, dict[str, Any]] = {
        "input": {"input": prompt},
        "list": {"arguments": [[prompt, {"until": []}]], "doc": {"idx": 1}},
        "dict": {"arguments": {"gen_args_0": {"arg_0": prompt, "arg_1": {}}}, "doc": {"idx": 1}},
    }
    row = {key: value for key, value in lmms(0).items() if key != "input"}
    found = one(rows(tmp_path / "samples_t.jsonl", {**row, **forms[form]}))
    assert found.item.options == ("Heart", "Liver") and found.item.answer == "Liver"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"input": "A. is the aorta shown?"}, "the right answer is B, and its prompt lists no options"),
        ({"input": ""}, "the right answer is B"),
        ({"input": "", "target": "liver"}, "no question"),
        ({"input": {"a": []}, "target": "liver"}, "no question"),
    ],
)
def test_prompts_that_say_too_little(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    [skip] = read_logs([rows(tmp_path / "samples_t.jsonl", lmms(0, **changes))])
    assert isinstance(skip, Skip) and reason in skip.reason


QWEN = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|><|image_pad|>"
    "<|vision_end|>Write your final answer within <answer> </answer> tags.\n\nQuestion: Which organ is shown?\n\n"
    "Options:\n\nA. Heart\n\nB. Liver\n\nC. Lung. Left\n\nand right<|im_end|>\n<|im_start|>assistant\n"
)


def thinker(**changes: Any) -> dict[str, Any]:
    """As MedVLThinker's inference scripts write a row."""
    outputs = [
        {"output_text": "<think>x</think> <answer>B</answer>", "pred_letter": "B", "is_correct": True},
        {"output_text": "<answer>C. Lung</answer>", "pred_letter": "C. Lung", "is_correct": False},
    ]
    return {
        "dp_index": 0, "prompts": QWEN, "dataset_name": "pmc_vqa", "dataset_index": 17, "answer_label": "B",
        "answer": "Liver", "parsed_outputs": outputs, "num_rollouts": 2, "num_correct": 1, **changes,
    }  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "prompts": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QWEN.partition("user")[2]}]}
            ]
        },
        {"options": {"A": "Heart", "B": "Liver", "C": "Lung. Left\n\nand right"}, "pass_at_num_rollouts": True},
    ],
)
def test_medvlthinker(tmp_path: Path, changes: dict[str, Any]) -> None:
    found = one(rows(tmp_path / "eval_results.jsonl", thinker(**changes)))
    assert found.item.id == "pmc_vqa/17" and found.item.question == "Which organ is shown?"
    assert found.item.options == ("Heart", "Liver", "Lung. Left\n\nand right") and found.item.answer == "Liver"
    assert len(found.completions) == 2 and found.scores == (True, False)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"parsed_outputs": []}, "no 'output_text'"),
        ({"parsed_outputs": [{"text": "B"}, "B", None]}, "no 'output_text'"),
        ({"prompts": None}, "no question with options in its 'prompts'"),
        ({"prompts": "What is it?"}, "no question with options"),
        ({"answer_label": "D", "answer": "Spleen"}, "no right answer"),
    ],
)
def test_rows_of_medvlthinker_that_cannot_be_read(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    path = rows(tmp_path / "eval_results.jsonl", thinker(**changes), thinker(dataset_index=18))
    skip, found = read_logs([path], "medvlthinker")
    assert isinstance(skip, Skip) and reason in skip.reason and isinstance(found, Logged)


def test_several_files_of_one_task_add_up(tmp_path: Path) -> None:
    paths = [
        rows(tmp_path / f"samples_t_2026-01-0{day}T00-00-00.jsonl", harness(0, [[text]], exact_match=text == "B"))
        for day, text in ((1, "A"), (2, "B"))
    ]
    [found] = read_logs(paths)
    assert isinstance(found, Logged) and found.completions == ("A", "B") and found.scores == (False, True)


def test_compressed(tmp_path: Path) -> None:
    path = tmp_path / "samples_t.jsonl.gz"
    path.write_bytes(gzip.compress((json.dumps(harness(0, [["B"]])) + "\n").encode()))
    assert one(path).completions == ("B",)


def test_log_likelihood_tasks_are_refused(tmp_path: Path) -> None:
    path = rows(
        tmp_path / "samples_t.jsonl", harness(0, [[[-1.5, False]], [[-0.2, True]]], filtered_resps=[[-1.5, False]])
    )
    [found] = read_logs([path])
    assert isinstance(found, Skip) and "log-likelihoods" in found.reason


@pytest.mark.parametrize(
    "resps",
    [[[["-1.5", "False"]], [["-0.2", "True"]]], [["-1.5", "False"], ["-0.2", "True"]], [[["-inf", "False"]]]],
)
def test_log_likelihoods_as_text(tmp_path: Path, resps: Any) -> None:
    """As lm-evaluation-harness writes them: all that JSON has no type for, and its lists, become text."""
    [found] = read_logs([rows(tmp_path / "samples_t.jsonl", harness(0, resps))])
    assert isinstance(found, Skip) and "log-likelihoods" in found.reason


PROMPT = "Example?\nA. One\nB. Two\nAnswer: A\n\nWhich organ?\nA. Heart\nB. Liver\nC. Lung\nD. Spleen\nAnswer:"


@pytest.mark.parametrize("target", ["B", "(B)", "Liver", 1])
def test_options_that_stand_in_the_prompt_alone(tmp_path: Path, target: Any) -> None:
    """As of tasks that keep them under names of their own (MedMCQA's opa to opd)."""
    row = harness(0, [["B"]], doc={"question": "Which organ?", "opa": "Heart"}, target=target, arguments=[[PROMPT, {}]])
    found = one(rows(tmp_path / "samples_t.jsonl", row))
    assert found.item.options == ("Heart", "Liver", "Lung", "Spleen") and found.item.answer == "Liver"
    assert found.item.floor == 0.25


def test_a_letter_without_options_is_refused_and_another_answer_open(tmp_path: Path) -> None:
    doc = {"question": "Which organ?"}
    path = rows(
        tmp_path / "samples_t.jsonl", harness(0, [["B"]], doc=doc),
        harness(1, [["Bowel"]], doc=doc, target="Bowel", arguments=[[PROMPT, {}]]),
    )  # fmt: skip
    skip, found = read_logs([path])
    assert isinstance(skip, Skip) and "lists no options by letter" in skip.reason
    assert isinstance(found, Logged) and found.item.options is None and found.item.floor == 0


@pytest.mark.parametrize(("answer", "floor"), [("Yes", 0.5), (" no", 0.5), ("nodule", 0), ("2", 0)])
def test_a_coin_answers_yes_or_no(tmp_path: Path, answer: str, floor: float) -> None:
    row = {"question": "Is it?", "answer": answer, "outputs": ["yes", "no"]}
    assert one(rows(tmp_path / "a.jsonl", row)).item.floor == floor


@pytest.mark.parametrize(
    ("row", "right"),
    [
        ({"answer": 1}, "2"),  # a number is a place
        ({"answer": "1"}, "1"),  # a text that is an option is that option
        ({"answer": 1, "target": "B"}, "2"),
        ({"answer": 4}, "4"),  # no place
        ({"label": 0, "answer": "C"}, "3"),  # letters and texts go before places
        ({"answer": ["D"]}, "4"),
    ],
)
def test_options_that_are_numbers(tmp_path: Path, row: dict[str, Any], right: str) -> None:
    whole = {"question": "How many?", "options": ["1", "2", "3", "4"], "outputs": ["B"], **row}
    assert one(rows(tmp_path / "a.jsonl", whole)).item.answer == right


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"answer_label": "B", "answer": "Lung"}, "several right answers ('Lung' under 'answer', 'Liver' under"),
        ({"answer": ["A", "C"]}, "several right answers"),
        ({"question": 3, "outputs": {"text": {"text": 3}}}, "no completions"),
    ],
)
def test_rows_that_contradict_themselves(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    [skip] = read_logs([rows(tmp_path / "a.jsonl", {**DOC, "outputs": ["A"], **changes})])
    assert isinstance(skip, Skip) and reason in skip.reason


def test_a_row_of_another_shape_is_left_out(tmp_path: Path) -> None:
    path = rows(tmp_path / "eval_results.jsonl", thinker(parsed_outputs=1), thinker())
    skip, found = read_logs([path], "medvlthinker")
    assert isinstance(skip, Skip) and skip.line == 1 and "not in the form of its format (TypeError)" in skip.reason
    assert isinstance(found, Logged)


def test_what_cannot_be_stored_is_replaced(tmp_path: Path) -> None:
    changes = {"dataset": "d\ud800", "options": ["Heart\udfff", "Liver"], "outputs": ["B \ud800"]}
    found = one(rows(tmp_path / "a.jsonl", {**DOC, **changes}))
    json.dumps([found.item.to_json(), found.completions], ensure_ascii=False).encode()
    assert found.item.options == ("Heart?", "Liver")


def test_a_completion_is_right_where_one_filter_finds_it_right(tmp_path: Path) -> None:
    strict, loose = (harness(0, [["B"]], filter=name, exact_match=score) for name, score in (("s", 0.0), ("l", 1.0)))
    assert one(rows(tmp_path / "samples_t.jsonl", strict, loose)).scores == (True,)


def inspect_sample(**changes: Any) -> dict[str, Any]:
    return {
        "id": 7, "epoch": 1, "input": [{"role": "user", "content": [{"type": "image", "image": "data:,"},
                                                                      {"type": "text", "text": "Which organ?"}]}],
        "choices": ["Heart", "Liver"], "target": "B", "scores": {"choice": {"value": "C"}},
        "output": {"choices": [{"message": {"role": "assistant", "content": "ANSWER: B"}}]}, **changes,
    }  # fmt: skip


HEADER = {"version": 2, "status": "success", "eval": {"task": "slake"}}


def test_inspect_json(tmp_path: Path) -> None:
    path = tmp_path / "log.json"
    second = inspect_sample(epoch=2, scores={"choice": {"value": "I"}}, output={"completion": "ANSWER: A"})
    path.write_text(json.dumps({**HEADER, "samples": [inspect_sample(), second]}))
    found = one(path)
    assert found.item.id == "slake/7" and found.item.question == "Which organ?" and found.item.answer == "Liver"
    assert found.completions == ("ANSWER: B", "ANSWER: A") and found.scores == (True, False)


def test_failed_and_cut_samples_of_inspect(tmp_path: Path) -> None:
    cut = {"choices": [{"message": {"content": "It may"}, "stop_reason": "max_tokens"}]}
    done = {"choices": [{"message": {"content": "B"}, "stop_reason": "stop"}]}
    failed = inspect_sample(epoch=3, output={}, error={"message": "timeout"})
    samples = [inspect_sample(epoch=1, output=cut), inspect_sample(epoch=2, output=done), failed, "no sample"]
    path = tmp_path / "log.json"
    path.write_text(json.dumps({**HEADER, "samples": samples}))
    first, second, found = read_logs([path])
    assert isinstance(first, Skip) and "failed in Inspect" in first.reason
    assert isinstance(second, Skip) and "not in the form of its format" in second.reason
    assert isinstance(found, Logged) and found.completions == ("It may", "B") and found.cut == 1


@pytest.mark.parametrize("content", [b"", b"broken", b"PK\x03\x04broken"])
def test_a_log_that_is_no_whole_zip(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "log.eval"
    path.write_bytes(content)
    with pytest.raises(MedbridgeError, match="not a whole zip"):
        list(read_logs([path]))


def test_inspect_eval(tmp_path: Path) -> None:
    path = tmp_path / "log.eval"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("header.json", json.dumps(HEADER))
        archive.writestr("samples/7_epoch_1.json", json.dumps(inspect_sample()))
        archive.writestr("summaries.json", "[]")
    assert one(path).item.id == "slake/7"


def test_a_zip_bomb_ends_in_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import medbridge.evaluation.inspect_logs as module

    monkeypatch.setattr(module, "MAX_LINE", 1 << 16)
    path = tmp_path / "log.eval"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("samples/1_epoch_1.json", "0" * (1 << 22))
        archive.writestr("samples/2_epoch_1.json", "{broken")
        archive.writestr("samples/3_epoch_1.json", json.dumps(inspect_sample(input="plain")))
    bomb, broken, found = read_logs([path])
    assert isinstance(bomb, Skip) and "1_epoch_1.json holds more than" in bomb.reason
    assert isinstance(broken, Skip) and "2_epoch_1.json is not valid JSON" in broken.reason
    assert isinstance(found, Logged)


NAMED = {"dataset_name": "slake", "dataset_index": 3}
BARE = {"question": DOC["question"], "A": "Heart", "B": "Liver", "C": "Lung", "answer_idx": 1}
WRITTEN = json.dumps({"A": "Heart", "B": "Liver", "C": "Lung"})


@pytest.mark.parametrize(
    "row",
    [
        {**DOC, "outputs": ["A", "B"]},
        {**DOC, "options": WRITTEN, "answer": "Liver", "completions": [{"text": "A"}, {"text": "B"}]},
        {**DOC, "options": "A. Heart\nB. Liver\nC. Lung", "responses": ["A", "B"]},
        {**BARE, "outputs": [["A"], ["B"]]},
    ],
)
def test_rows(tmp_path: Path, row: dict[str, Any]) -> None:
    found = one(rows(tmp_path / "out.jsonl", {**row, **NAMED}))
    assert found.item.id == "slake/3" and found.item.options == ("Heart", "Liver", "Lung")
    assert found.item.answer == "Liver" and found.completions == ("A", "B")


def test_a_greedy_completion_and_questions_on_one_image(tmp_path: Path) -> None:
    path = rows(
        tmp_path / "out.jsonl", {**DOC, "id": 1, "greedy": "B", "completions": ["A"]},
        {**DOC, "id": 2, "completions": ["A"]}, {**DOC, "id": 3, "image_id": "x2", "completions": ["A"]},
    )  # fmt: skip
    first, second, third = (entry for entry in read_logs([path]) if isinstance(entry, Logged))
    assert first.greedy == "B" and second.greedy is None
    assert first.shows == second.shows != third.shows


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "Expecting"),
        ("[1]", "a JSON object is needed, this line holds a list"),
        (json.dumps({**DOC}), "no completions under any of"),
        (json.dumps({"outputs": ["A"], "answer": "A"}), "no question under any of"),
        (json.dumps({**DOC, "answer": "Brain", "outputs": ["A"]}), "no right answer"),
        (json.dumps({**DOC, "options": ["Heart", "Heart"], "outputs": ["A"]}), "Heart"),
        ("[" * 100_000, ""),
    ],
)
def test_a_bad_row_is_left_out_and_counted(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text(line + "\n" + json.dumps({**DOC, "id": 9, "outputs": ["A"]}) + "\n")
    found = list(read_logs([path], "rows"))
    [skip] = [entry for entry in found if isinstance(entry, Skip)]
    assert skip.line == 1 and reason in skip.reason and len(found) == 2


@pytest.mark.parametrize("content", [b"\x1f\x8bbroken", b"PK\x03\x04broken"])
@pytest.mark.parametrize("name", ["log.eval", "samples.jsonl.gz"])
def test_a_broken_file_ends_in_a_message(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(MedbridgeError, match=r"can't be read|not valid JSON|not a log"):
        list(read_logs([path]))


def test_no_such_file_or_format(tmp_path: Path) -> None:
    with pytest.raises(MedbridgeError, match="can't be read"):
        list(read_logs([tmp_path / "none.jsonl"]))
    with pytest.raises(MedbridgeError, match="known are: auto, lm-eval"):
        list(read_logs([], "excel"))

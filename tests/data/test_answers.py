"""The reading of answers: the oracle's readings, what is no evidence, and time linear in the length."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medbridge.data import Item, PromptSettings, grade, permutation, target_completion
from medbridge.data.answers import is_well_formed, read_letter, read_open, read_option, read_yes_no
from medbridge.data.text import normalise
from medbridge.errors import MedbridgeError

MakeItem = Callable[..., Item]
SHOWN = ("Edema", "Effusion", "Mass", "Nodule")
LETTER = PromptSettings(answer_style="letter")
TEXT = PromptSettings(answer_style="text")

# The readings that public kits get wrong (oracles/support.json), repeated so that they are tested everywhere.
LETTERS = [
    ("<think>A patient presents with cough. Option C fits best.</think>", 4, None),
    ("<answer>This is a melanoma (B)</answer>", 4, "B"),
    ("Vitamin D deficiency is likely. The answer is C", 4, "C"),
    ("As a final a priori guess, none fits well. <answer>C</answer>", 4, "C"),
    ("I believe the correct choice is (B)", 4, "B"),
    ("<answer>B</answer> wait, <answer>C</answer>", 4, "C"),
    ("<answer>B.</answer>", 4, "B"),
    ("<answer>(b)</answer>", 4, "B"),
    ("<answer>B) Effusion</answer>", 4, "B"),
    ("<answer></answer>", 4, None),
    ("", 4, None),
    ("<answer>E</answer>", 4, None),
    ("<answer>A or B</answer>", 4, None),
    ("<think>could be A</think>\n<answer>\nD\n</answer>", 4, "D"),
    ("<answer>option a</answer>", 4, "A"),
    ("<answer>A nodule is seen</answer>", 4, None),
]
YES_NO = [
    ("Yes, there is an abnormality", "yes"),
    ("Yes, a nodule is seen", "yes"),
    ("No.", "no"),
    ("No, it is not normal", "no"),
    ("It is notable", None),
    ("", None),
]


@pytest.mark.parametrize(("completion", "options", "letter"), LETTERS)
def test_letter_oracle(completion: str, options: int, letter: str | None) -> None:
    assert read_letter(completion, options) == letter


@pytest.mark.parametrize(("text", "reading"), YES_NO)
def test_yes_no_oracle(text: str, reading: str | None) -> None:
    assert read_yes_no(text) == reading


def test_oracle_file(real_data: Path) -> None:
    file = real_data.parent / "oracles" / "support.json"
    if not file.is_file():
        pytest.skip(f"no oracle at {file}")
    oracle = json.loads(file.read_text())
    for completion, options, letter in oracle["answer_letter"]["values"]:
        assert read_letter(completion, options) == letter, completion
    for text, reading in oracle["answer_yes_no"]["values"]:
        assert read_yes_no(text) == reading, text


@pytest.mark.parametrize(
    ("completion", "position"),
    [
        ("<answer>**B**</answer>", 1),
        ("<answer>The correct answer is B</answer>", 1),
        ("<answer>Answer: B</answer>", 1),
        ("<answer>B - Effusion</answer>", 1),
        ("<answer>option b: effusion</answer>", 1),
        ("<Answer>b</Answer>", 1),
        ("<answer>Effusion (B)</answer>", 1),
        ("<answer>Effusion</answer>", 1),
        ("The correct answer is B) Effusion", 1),
        ("The answer is **B**.", 1),
        ("Is the answer is B? No, the answer is C.", 2),
        ("The answer is effusion because of the fluid", 1),
        ("reasoning</think>The answer is: (D)", 3),
        ("<think>first <answer>A</answer></think><answer>D</answer>", 3),
        ("<answer>B</answer>\n<think>was that right?</think>", 1),
        # Contradictions, several letters, no letter, and words that look like letters.
        ("<answer>Edema (B)</answer>", None),
        ("<answer>A) Effusion</answer>", None),
        ("The answer is A) Effusion.", None),
        ("<answer>(A) or (B)</answer>", None),
        ("<answer>A) or B)</answer>", None),
        ("<answer>A, B</answer>", None),
        ("<answer>Option A is wrong, option B is right</answer>", None),
        ("<answer>A. Edema B. Effusion</answer>", None),
        ("<answer>A. Effusion B. Edema</answer>", None),
        ("<answer>A) Edema; C) Mass</answer>", None),
        ("<answer>A: Edema and B: Effusion</answer>", None),
        ("<answer>A. Edema\nB. Effusion\nC. Mass\nD. Nodule</answer>", None),
        ("Answer: A) Edema B) Effusion", None),
        ("<answer>A. Nodule, likely</answer>", None),
        ("<answer>B. Effusion, no edema</answer>", 1),
        ("<answer>B. Effusion. Not A. Mass is not seen</answer>", 1),
        ("The answer is B or C", None),
        ("The answer is a nodule", None),
        ("The answer is A nodule", None),
        ("The answer is not B", None),
        ("The answer is B?", None),
        ("B", None),
        ("I think B fits", None),
        ("<think>The answer is B</think>", None),
        ("<think>The answer is B", None),
        ("<think><answer>B</answer></think>", None),
        # Cut off.
        ("<answer>B", None),
        ("<answer>B</answer> no, <answer>", None),
        ("<answer>B</answer> no, <answer></answer>", None),
        ("B</answer>", None),
    ],
)
@pytest.mark.parametrize("style", ["letter", "text"])
def test_option_readings(completion: str, position: int | None, style: Any) -> None:
    found = read_option(completion, SHOWN, style)
    assert (None if found is None else found.position) == position


@pytest.mark.parametrize(
    ("completion", "shown", "position"),
    [
        ("<answer>T1</answer>", ("T1", "T1 weighted"), 0),
        ("<answer>t1 Weighted.</answer>", ("T1", "T1 weighted"), 1),
        ("<answer>t1</answer>", ("T1", "t-1", "T1."), None),  # two alike after normalisation
        ("<answer>T1.</answer>", ("T1", "T1."), 1),  # but one to the letter
        ("<answer>-</answer>", ("+", "-"), 1),
        ("<answer>\uff28\uff45\uff41\uff52\uff54</answer>", ("Heart", "Lung"), 0),  # full-width letters
        ("<answer>Grey\u00a0 matter</answer>", ("white matter", "grey matter"), 1),
        ("<answer>-1.5</answer>", ("1.5", "-1.5", "15"), 1),
        ("<answer>B</answer>", ("B", "A"), 0),  # an option that is called like a letter
        ("<answer>It is grey matter</answer>", ("white matter", "grey matter"), None),
        ("grey matter", ("white matter", "grey matter"), None),
    ],
)
def test_text_style(completion: str, shown: tuple[str, ...], position: int | None) -> None:
    found = read_option(completion, shown, "text")
    assert (None if found is None else found.position) == position


@pytest.mark.parametrize("letter", ["\u212a", "\u017f", "\uff21", "\u0410"])
def test_letters_of_other_scripts_are_read_or_abstained_on_but_never_fail(letter: str) -> None:
    for completion in (f"<answer>{letter}</answer>", f"The answer is ({letter})", f"<answer>{letter}) lung</answer>"):
        assert read_letter(completion, 26) in (None, "S")  # the long s is an s


def test_letter_style_prefers_the_letter_to_an_option_of_that_name() -> None:
    found = read_option("<answer>B</answer>", ("B", "A"), "letter")
    assert found is not None and found.position == 1


@pytest.mark.parametrize(
    ("completion", "style", "position"),
    [
        ("<answer>Yes, there is</answer>", "letter", 0),
        ("<answer>No</answer>", "text", 1),
        ("<answer>No abnormality</answer>", "text", None),
        ("<answer>yes or no</answer>", "text", None),
        ("No. Yes.", "text", None),
        ("No, it is not.", "text", 1),
        ("No, it is not.", "letter", None),
        ("Nodules are seen", "text", None),
        ("The answer is no", "letter", 1),
        ("<answer>Yes (B)</answer>", "text", None),
        ("<answer>Yes (B)</answer>", "letter", None),
        ("<answer>Yes (A)</answer>", "text", 0),
        ("<answer>No (B)</answer>", "letter", 1),
    ],
)
def test_yes_no_options(completion: str, style: Any, position: int | None) -> None:
    found = read_option(completion, ("Yes", "No"), style)
    assert (None if found is None else found.position) == position


@pytest.mark.parametrize(
    ("completion", "answer", "status", "text"),
    [
        ("<answer>Lung cancer.</answer>", "Lung Cancer", "correct", "Lung cancer."),
        ("<answer> Liver </answer>", "Lung Cancer", "wrong", "Liver"),
        ("The answer is lung cancer.", "Lung Cancer", "correct", "lung cancer"),
        ("lung cancer", "Lung Cancer", "abstain", None),
        ("<answer> </answer>", "Lung Cancer", "abstain", None),
        ("<answer>Yes, clearly</answer>", "Yes", "correct", "Yes"),
        ("No.", "Yes", "wrong", "No"),
        ("<answer>It is notable</answer>", "Yes", "abstain", None),
        ("<answer>\u22121.5</answer>", "-1.5", "correct", "\u22121.5"),
        ("<answer>15</answer>", "1.5", "wrong", "15"),
        ("<answer>?</answer>", "?", "correct", "?"),
        ("<answer>!</answer>", "?", "wrong", "!"),
    ],
)
def test_open_answers(make_item: MakeItem, completion: str, answer: str, status: str, text: str | None) -> None:
    item = make_item(options=None, floor=0.0, answer=answer)
    outcome = grade(item, (), completion, LETTER)
    assert (outcome.status, outcome.answer, outcome.option) == (status, text, None)
    if outcome.span is not None:
        assert completion[slice(*outcome.span)] == text


@pytest.mark.parametrize(
    ("said", "answer", "changes", "status"),
    [
        ("50 mm", "5 cm", {}, "correct"),
        ("about 5.0 cm", "5 cm", {}, "correct"),
        ("5", "5 cm", {}, "correct"),
        ("two", "2", {}, "correct"),
        ("3", "2", {}, "wrong"),
        ("5 g", "5 cm", {}, "wrong"),
        ("2 nodules", "2", {}, "wrong"),
        ("2", "2 nodules", {}, "wrong"),
        ("4.9 cm", "5 cm", {}, "wrong"),
        ("4.9 cm", "5 cm", {"number_tolerance": 0.05}, "correct"),
        ("50 mm", "5 cm", {"number_tolerance": None}, "wrong"),
        ("upper lobe of the left lung", "left upper lobe", {}, "wrong"),
        ("upper lobe of the left lung", "left upper lobe", {"f1_from": 0.7}, "correct"),
        ("upper lobe of the left lung", "left upper lobe", {"f1_from": 0.8}, "wrong"),
        ("No", "Yes", {"f1_from": 0.1}, "wrong"),
        ("5 mm", "5 cm", {"f1_from": 0.1}, "wrong"),
    ],
)
def test_quantities_and_shared_words(
    make_item: MakeItem, said: str, answer: str, changes: dict[str, Any], status: str
) -> None:
    item = make_item(options=None, floor=0.0, answer=answer)
    settings = LETTER.model_copy(update=changes)
    assert grade(item, (), f"<answer>{said}</answer>", settings).status == status


def test_outcome_maps_the_letter_through_the_permutation(make_item: MakeItem) -> None:
    completion = "<think>Is it B?</think> <answer>A</answer>"
    outcome = grade(make_item(), (1, 0, 2, 3), completion, LETTER)
    assert (outcome.status, outcome.option, outcome.answer) == ("correct", 1, "A")
    assert outcome.span == (completion.index(">A<") + 1, completion.index(">A<") + 2)
    assert outcome.well_formed
    assert grade(make_item(), (0, 1, 2, 3), completion, LETTER).status == "wrong"


def test_abstention_carries_nothing(make_item: MakeItem) -> None:
    outcome = grade(make_item(), (0, 1, 2, 3), "no idea", LETTER)
    assert (outcome.status, outcome.option, outcome.answer, outcome.span) == ("abstain", None, None, None)


def test_wrong_permutation_is_refused(make_item: MakeItem) -> None:
    with pytest.raises(MedbridgeError, match="does not order"):
        grade(make_item(), (0, 1), "<answer>A</answer>", LETTER)


plain = st.text(st.characters(exclude_characters="<", exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    str.strip
)


@given(data=st.data(), style=st.sampled_from(["letter", "text"]), trace=st.none() | plain)
def test_target_completion_is_always_right(data: st.DataObject, style: Any, trace: str | None) -> None:
    options = data.draw(st.none() | st.lists(plain, min_size=2, max_size=8, unique_by=str.strip).map(tuple))
    answer = data.draw(plain if options is None else st.sampled_from(options))
    item = Item("d/test/0", "d", "test", "q", answer, options, (), {}, 0.0, trace)
    settings = PromptSettings(answer_style=style)
    order = permutation(item, data.draw(st.integers()), data.draw(st.integers(-1, 20)))
    completion = target_completion(item, order, settings)
    outcome = grade(item, order, completion, settings)
    assert outcome.status == "correct" and outcome.option == item.answer_index and outcome.well_formed


@given(
    completion=st.text()
    | st.lists(
        st.sampled_from(["<answer>", "</answer>", "<think>", "</think>", "answer is ", "A", "(B)", "yes", " or ", "."])
    ).map("".join)
)
def test_any_text_is_read_without_error(completion: str) -> None:
    items = [
        Item("d/test/0", "d", "test", "q", "Yes", ("Yes", "No"), (), {}, 0.5),
        Item("d/test/1", "d", "test", "q", "Mass", SHOWN, (), {}, 0.25),
        Item("d/test/2", "d", "test", "q", "Mass", None, (), {}, 0.0),
    ]
    for item in items:
        for settings in (LETTER, TEXT):
            order = tuple(range(len(item.options or ())))
            outcome = grade(item, order, completion, settings)
            assert (outcome.span is None) == (outcome.status == "abstain")
            if outcome.span is not None:
                assert completion[slice(*outcome.span)] == outcome.answer != ""


@pytest.mark.parametrize(
    ("completion", "formed"),
    [
        ("<answer>B</answer>", True),
        (" <think>x\n</think>\n\n<answer>B</answer>\n", True),
        ("<think></think><answer>B</answer>", True),
        ("<answer> </answer>", False),
        ("<answer>B</answer> so B", False),
        ("so <answer>B</answer>", False),
        ("<think>x</think> so <answer>B</answer>", False),
        ("<answer>B</answer><answer>B</answer>", False),
        ("<answer>B</answer><think>x</think>", False),
        ("<think>x<think></think><answer>B</answer>", False),
        ("x</think><answer>B</answer>", False),
        ("<think>x</think>", False),
        ("<answer>B", False),
        ("", False),
    ],
)
def test_well_formed(completion: str, formed: bool) -> None:
    assert is_well_formed(completion) is formed


@pytest.mark.parametrize(
    "piece",
    [
        *(
            "<answer>",
            "<think>",
            "</think>",
            "<think></think>",
            "<answer></answer>",
            "answer is ",
            "answer: (",
        ),
        *(
            "(",
            "(A)",
            " ",
            "*",
            "the ",
            "option ",
            "answer is A or ",
            "yes or ",
            "\u0130",
            "\n",
            "answer is B?",
            "A) ",
        ),
    ],
)
def test_a_hundred_thousand_characters_take_no_time(make_item: MakeItem, piece: str) -> None:
    text = piece * (100_000 // len(piece))
    start = time.process_time()
    for completion in (text, f"<answer>{text}</answer>", f"the answer is {text}B"):
        for settings in (LETTER, TEXT):
            grade(make_item(), (0, 1, 2, 3), completion, settings)
            grade(make_item(options=None, answer="Yes"), (), completion, settings)
    # Quadratic reading takes minutes here; the bound is far above any slow machine's linear time.
    assert time.process_time() - start < 60


def test_normalise() -> None:
    assert normalise("  Left-sided  PLEURAL\u200b effusion! ") == "left sided pleural effusion"
    assert normalise("-0.5 %") == "-0.5" and normalise("5%") == "5%"
    assert normalise("stra\u00dfe") == normalise("STRASSE")


def test_read_open_statement_span() -> None:
    text = "I see fluid. The answer is pleural effusion. Done."
    found = read_open(text)
    assert found is not None and text[found.start : found.end] == "pleural effusion"


def test_letters_have_an_end() -> None:
    with pytest.raises(MedbridgeError, match="27 options"):
        read_letter("<answer>A</answer>", 27)

"""The strict and the lenient reading, on completions as models write them, and time linear in their length."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medbridge.data import Item, Outcome, PromptSettings, grade, permutation
from medbridge.data.readings import READINGS, regrade
from medbridge.errors import MedbridgeError

MakeItem = Callable[..., Item]
LETTER = PromptSettings(answer_style="letter")
TEXT = PromptSettings(answer_style="text")
SHOWN = ("Edema", "Effusion", "Mass", "Nodule")


def item(options: tuple[str, ...] | None = SHOWN, answer: str = "Effusion") -> Item:
    return Item("q", "demo", "test", "What is seen?", answer, options, ("a.png",), {}, 0.0 if options is None else 0.25)


def read(question: Item, text: str, reading: Any = "lenient", style: PromptSettings = LETTER) -> Outcome:
    order = tuple(range(len(question.options or ())))
    return regrade(question, order, text, grade(question, order, text, style), style, reading)


def chosen(text: str, options: tuple[str, ...] = SHOWN, style: PromptSettings = LETTER) -> int | None:
    """The option of the lenient reading, having checked that the standard one abstains and that the span fits."""
    question = item(options, options[0])
    assert read(question, text, "standard", style).status == "abstain", text
    found = read(question, text, "lenient", style)
    if found.span is not None:
        assert text[slice(*found.span)] == found.answer
        assert found.answer and found.answer == found.answer.strip()
    assert (found.option is None) == (found.status == "abstain") == (found.span is None)
    return found.option


# -- strict --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("<think>fluid</think><answer>B</answer>", "correct"),
        ("<answer>B</answer>", "correct"),
        ("<answer>C</answer>", "wrong"),
        ("<answer>A or B</answer>", "abstain"),
        ("<answer>B</answer> I am sure.", "abstain"),
        ("The answer is B", "abstain"),
        ("The answer is C", "abstain"),
        ("<think>fluid<answer>B</answer>", "abstain"),
        ("", "abstain"),
    ],
)
def test_strict_counts_well_formed_completions_only(text: str, status: str) -> None:
    found = read(item(), text, "strict")
    assert found.status == status
    if status == "abstain":
        assert (found.option, found.answer, found.span) == (None, None, None)
    else:
        assert found == read(item(), text, "standard")


@pytest.mark.parametrize("text", ["<answer>B</answer>", "The answer is C", "", "(B)"])
def test_standard_is_what_was_stored(text: str) -> None:
    outcome = grade(item(), (0, 1, 2, 3), text, LETTER)
    assert regrade(item(), (0, 1, 2, 3), text, outcome, LETTER, "standard") is outcome


# -- lenient: one option is named ----------------------------------------------------------------------------

EFFUSION = [
    # an answer and no more, without tags
    "B",
    "B.",
    "(B)",
    "**B**",
    "B)",
    "Answer B",
    "Option B",
    "B) Effusion",
    "B. Effusion",
    "Effusion",
    "effusion.",
    "**Effusion**",
    "$\\boxed{B}$",
    "\\boxed{\\text{B}}",
    "B\n\nThe costophrenic angle is blunted, unlike in edema or with a mass.",
    "Looking at the image, there is fluid at the base.\n\nB",
    "Looking at the image, there could be edema or a mass.\n\n**B) Effusion**",
    "Final answer:\nB",
    # tags that are cut off, half there or hold a sentence
    "<think>Fluid at the base.</think><answer>B",
    "<think>Fluid at the base.</think>\n<answer>\nB\n",
    "<answer>Effusion",
    "<answer>Eff</answer> no: <answer>effusion",
    "<answer>a mass I think</answer> no: <answer>an effusion I think",
    "B</answer>",
    "<answer>There is an effusion</answer>",
    "<answer>Edema is unlikely, I see an effusion</answer>",
    "<answer>Most likely effusion, not edema</answer>",
    # cut off in the reasoning
    "<think>The angle is blunted, so the answer is B",
    "<think>There is fluid. This is consistent with option B.",
    "<think>It could be edema or a mass. The blunted angle makes effusion most likely.",
    "<think>Edema? No. Effusion? The angle is blunted. So I would choose effusion because",
    "<think>Option A is wrong. Option C is incorrect, and option D is not right. Option B is correct.",
    "<think>The meniscus sign shows an effusion.</think>",
    "<think>The answer is B.</think>",
    "The meniscus sign shows an effusion.</think>\n\n",
    "<think>Therefore effusion, since a mass would be round.",
    "<think>Effusion not mass.",
    # the reasoning named others
    "It could be a mass, or edema.</think>I see an effusion.",
    "<think>At first <answer>mass</answer></think>I see an effusion.",
    "I see an effusion.<think>A mass or edema could be.</think>",
    # prose outside the reasoning
    "There is an effusion at the right base.",
    "I would go with option B here.",
    "I think it must be (B).",
    "<think>Could be edema, or a nodule.</think>The image shows a pleural effusion.",
    "<think>Perhaps C? Or (D)?</think>\nSo I choose B.",
    "Edema would be bilateral, a mass rounder. Therefore, B.",
    "Therefore the best choice here is: **(B)**",
    "No edema, no mass and no nodule can be seen, but there is an effusion.",
    "This is not a mass. There isn't a nodule. The fluid level means effusion.",
    "Edema is less likely. Nodule is excluded. Mass is not likely. Effusion fits.",
    "A mass is ruled out. Effusion it is.",
    "No edema, mass, or nodule. A moderate effusion.",
    "No, an effusion.",
    "Is it a mass? Is it option C? I see an effusion.",
    "I am torn between edema and effusion. Effusion is the best fit.",
    "A) Edema\nB) Effusion\nC) Mass\nD) Nodule\n\nB",
    "A) Edema\nB) Effusion\nC) Mass\nD) Nodule\n\nB) Effusion",
    "A) Edema\nB) Effusion\nC) Mass\nD) Nodule\n\nThe correct option would be B, since the angle is blunted.",
    "Vitamin (A) has no part in this; see panel (C). Effusion.",
]


@pytest.mark.parametrize("text", EFFUSION)
def test_one_option_is_named(text: str) -> None:
    assert read(item(), text).option == 1
    assert read(item(), text).status == "correct"
    assert read(item(answer="Mass"), text).status == "wrong"


@pytest.mark.parametrize("text", ["<answer>B</answer>", "The answer is B.", "The answer is effusion because of fluid"])
def test_what_was_read_stays(text: str) -> None:
    for question in (item(), item(answer="Mass")):
        assert read(question, text) == read(question, text, "standard")
        assert read(question, text).status != "abstain"


ABSTAIN = [
    "",
    "   \n ",
    "<answer></answer>",
    "<answer>",
    "<think></think>",
    # capitals that are words
    "A radiograph of the chest. I see nothing else.",
    "I see A lot of fluid",
    "It is a C shape of B lines",
    "Vitamin B deficiency, hepatitis (B), Figure (C)",
    "Hepatitis B",
    "B lines are seen.",
    "A. fumigatus grows here",
    "A: the left lung",
    # several options, and none that it settles on
    "Effusion or edema",
    "Effusion, edema or a mass are possible.",
    "A) Edema\nB) Effusion\nC) Mass\nD) Nodule",
    "Edema\nEffusion\nMass\nNodule",
    "- Edema\n- Effusion",
    "(A) or (B)",
    "<answer>It is B because of the fluid</answer>",
    "The answer is B or C",
    "The answer is B, C",
    "Option A or option B",
    "<answer>A or B</answer>",
    "<answer>Edema (B)</answer>",
    "<answer>A) Effusion</answer>",
    "B) Edema",
    "<think>It may be an effusion. Or edema.",
    # denied or asked
    "There is no effusion.",
    "No evidence of an effusion or",
    "It does not show effusion",
    "This isn't an effusion.",
    "There is no edema, mass, effusion or nodule.",
    "Neither option B nor a mass.",
    "Option B is wrong.",
    "B) is not correct",
    "Effusion is unlikely.",
    "Effusion can be ruled out.",
    "Is it an effusion?",
    "The answer is not B",
    "The answer is B?",
    "B?",
    # nothing that was offered
    "<answer>E</answer>",
    "<answer>Pneumothorax</answer>",
    "Option E",
    "(F)",
    "\u212a",  # the Kelvin sign, a K to whoever ignores case
    "The answer is pneumothorax.",
    "Effusions and massive nodular things",
    # the answer tag says something else, whatever was said before
    "<think>The answer is B</think><answer>E</answer>",
    "I choose B. <answer>pneumonia</answer>",
    "<think>Option B fits.</think><answer>none of them",
]


@pytest.mark.parametrize("text", ABSTAIN)
def test_nothing_is_named(text: str) -> None:
    assert chosen(text) is None


def test_a_single_capital_is_an_answer_where_nothing_else_stands() -> None:
    assert chosen("A") == 0
    assert chosen("A\n\nThere is fluid.") == 0
    assert chosen("There is fluid.\nA") == 0
    assert chosen("There is fluid. A") is None
    assert chosen("Therefore, A.") == 0
    assert chosen("Therefore, A nodule") == 3


@pytest.mark.parametrize(
    ("text", "options", "position"),
    [
        ("It is T1 weighted.", ("T1", "T1 weighted"), 1),
        ("It is T1.", ("T1", "T1 weighted"), 0),
        ("A T1-weighted image", ("T1", "T1 weighted"), 1),
        ("a pleural effusion", ("pleural effusion", "effusion"), 0),
        ("left lung cancer", ("left lung", "lung cancer"), None),
        ("The signal is -1.5 there", ("1.5", "-1.5"), 1),
        ("The grey/white matter border", ("Grey", "White matter"), None),
        ("I count 3 of them.", ("2", "3"), None),  # one character, in running text
        ("I count them.\n3", ("2", "3"), 1),
        ("Grey\u00a0matter, I think.", ("white matter", "grey matter"), 1),
        ("T1 it is", ("t1", "T1.", "FLAIR"), None),  # two alike
        ("none of the above", ("CT", "None of the above"), 1),
        ("There is no mass.", ("Mass", "No mass"), 1),
        ("*Effusion*/fluid", ("Effusion", "Mass"), 0),
    ],
)
def test_texts_of_options(text: str, options: tuple[str, ...], position: int | None) -> None:
    assert chosen(text, options) == position


@pytest.mark.parametrize("style", [LETTER, TEXT])
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<answer>Yes, there is", "yes"),
        ("<think>The heart is large. The answer is yes", "yes"),
        ("<think>No nodule here. Yes", None),
        ("<think>Yes, let me look.", None),
        ("The heart is large and there is no fluid.", None),
        ("The heart is large.\n\nYes", "yes"),
        ("Is it? Yes or no?", None),
        ("Yes or no: unclear", None),
    ],
)
def test_yes_and_no(text: str, said: str | None, style: PromptSettings) -> None:
    found = chosen(text, ("Yes", "No"), style)
    assert found == (None if said is None else ["yes", "no"].index(said))
    order = (1, 0)  # the other way round
    question = item(("No", "Yes"), "Yes")
    outcome = grade(question, order, text, style)
    assert (regrade(question, order, text, outcome, style, "lenient").status == "correct") == (said == "yes")


def test_yes_at_the_beginning_in_letter_style() -> None:
    assert chosen("Yes, there is an effusion.", ("Yes", "No")) == 0
    assert chosen("No, it is normal.", ("Yes", "No")) == 1


def test_letter_or_text_where_an_option_is_called_like_a_letter() -> None:
    assert chosen("B", ("B", "A"), LETTER) == 1
    assert chosen("B", ("B", "A"), TEXT) == 0


def test_the_option_is_canonical_whatever_the_order() -> None:
    question = item()
    for sample in range(8):
        order = permutation(question, 0, sample)
        text = f"Surely {question.options[order[2]].lower()}."  # type: ignore[index]
        for said in (text, "I choose C.", "C"):
            found = regrade(question, order, said, grade(question, order, said, LETTER), LETTER, "lenient")
            assert found.option == order[2]
            assert (found.status == "correct") == (order[2] == 1)


def test_a_wrong_order_is_refused() -> None:
    outcome = Outcome("abstain", None, None, None, False)
    for reading in READINGS:
        with pytest.raises(MedbridgeError, match="does not order"):
            regrade(item(), (0, 1), "B", outcome, LETTER, reading)


# -- lenient: open answers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "before"),
    [
        ("Pleural effusion", "abstain"),
        ("The image shows fluid at the base. This is a pleural effusion.", "abstain"),
        (
            "It might be pneumonia. Most likely it is a pleural effusion, since the angle is blunted. Look again.",
            "abstain",
        ),
        ("<think>fluid</think><answer>pleural effusion", "abstain"),
        ("<think>fluid, so a pleural effusion", "abstain"),
        ("<think>pneumonia?</think>I see a Pleural  Effusion.", "abstain"),
        ("<answer>There is a pleural effusion on the right</answer>", "wrong"),
        ("<answer>pleural-effusion, right</answer>", "wrong"),
        ("The answer is a large pleural effusion.", "wrong"),
    ],
)
def test_open_answers_that_hold_the_right_words(text: str, before: str) -> None:
    question = item(None, "pleural effusion")
    assert read(question, text, "standard").status == before
    found = read(question, text)
    assert found.status == "correct"
    assert found.option is None and found.span is not None
    assert text[slice(*found.span)] == found.answer
    assert found.answer is not None and found.answer.lower().split("-")[0].startswith("pleural")


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("", "abstain"),
        ("Pleural effusion was my first thought. It is pneumonia.", "abstain"),
        ("Most likely pneumonia. It has a pleural effusion, too.", "abstain"),
        ("There is no pleural effusion.", "abstain"),
        ("Is it a pleural effusion?", "abstain"),
        ("Pleural fluid and effusion", "abstain"),
        ("<think>pleural effusion</think>It is pneumonia.", "abstain"),
        ("<answer>not a pleural effusion</answer>", "wrong"),
        ("<answer>pneumonia</answer> or a pleural effusion", "wrong"),
        ("<answer>pleural effusions</answer>", "wrong"),
        ("The answer is liver. So overall the answer is the pleura.", "wrong"),
    ],
)
def test_open_answers_that_do_not(text: str, status: str) -> None:
    question = item(None, "pleural effusion")
    assert read(question, text) == read(question, text, "standard")
    assert read(question, text).status == status


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("<answer>there are 2 nodules</answer>", "correct"),
        ("<answer>two of them</answer>", "correct"),
        ("<answer>2 of 5 nodules</answer>", "wrong"),
        ("<answer>not 2</answer>", "wrong"),
        ("<answer>3 nodules</answer>", "wrong"),
        ("I count 2.", "correct"),
    ],
)
def test_open_quantities(text: str, status: str) -> None:
    assert read(item(None, "2"), text).status == status


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("<answer>Yes, it", "correct"),
        ("<think>The answer is no", "wrong"),
        ("<think>No fluid. Yes", "abstain"),
        ("<think>The answer is yes</think><answer>perhaps", "abstain"),
        ("<answer>No</answer>", "wrong"),
        ("hard to say", "abstain"),
    ],
)
def test_open_yes_and_no(text: str, status: str) -> None:
    assert read(item(None, "yes"), text).status == status


# -- properties ----------------------------------------------------------------------------------------------

PIECES = st.lists(
    st.sampled_from(
        ["<think>", "</think>", "<answer>", "</answer>", "B", "(C)", "option A", "effusion", "mass", "not", "no", ". ",
         "?", "\n", "the answer is", "therefore", ",", "yes", "is wrong", "\u2019", "A) Edema"]
    ),
    max_size=14,
)  # fmt: skip


@settings(deadline=None, max_examples=300)
@given(PIECES, st.sampled_from([SHOWN, ("Yes", "No"), None]), st.sampled_from([LETTER, TEXT]))
def test_readings_are_ordered(pieces: list[str], options: tuple[str, ...] | None, style: PromptSettings) -> None:
    """Strict only abstains more, lenient only reads more; spans are where they say."""
    text = " ".join(pieces)
    for answer in options or ("mass", "yes"):
        question = item(options, answer)
        strict, standard, lenient = (read(question, text, reading, style) for reading in READINGS)
        assert strict == standard or (strict.status == "abstain" and not strict.well_formed)
        assert {standard.status, lenient.status} != {"correct", "abstain"} or lenient.status == "correct"
        assert (strict.status == "correct") <= (standard.status == "correct") <= (lenient.status == "correct")
        if options is not None and standard.status != "abstain":
            assert lenient == standard
        if lenient.span is not None:
            assert text[slice(*lenient.span)] == lenient.answer
        assert strict.well_formed == standard.well_formed == lenient.well_formed


@settings(deadline=None, max_examples=200)
@given(st.text(max_size=60), st.sampled_from([SHOWN, None]))
def test_any_text_is_read(text: str, options: tuple[str, ...] | None) -> None:
    found = read(item(options), text)
    assert found.span is None or text[slice(*found.span)] == found.answer


@pytest.mark.parametrize(
    "piece",
    [
        "a", " ", "\n", "B ", "(B) ", "B) ", "B)\n", "option B ", "effusion ", "no effusion ", "no no ", "therefore ",
        "therefore effusion, ", "the answer is ", "the answer is B ", "most likely because ", "is is is ", "<think>",
        "</think>", "<think></think>", "<answer>", "<answer>B</answer>", "? ", ". ", "*", "mass/nodule ", "yes ", "> ",
        "the final answer ", "option ",
    ],
)  # fmt: skip
def test_time_is_linear(piece: str) -> None:
    """Four times the text takes about four times the computing: 16 times were quadratic."""
    abstained = Outcome("abstain", None, None, None, False)

    def seconds(length: int, question: Item) -> float:
        text = piece * (length // len(piece))
        order = tuple(range(len(question.options or ())))
        times = []
        for _ in range(2):
            began = time.process_time()
            regrade(question, order, text, abstained, LETTER, "lenient")
            times.append(time.process_time() - began)
        return min(times)

    for question in (item(), item(None)):
        assert seconds(16_000, question) < 10 * seconds(4_000, question) + 0.1

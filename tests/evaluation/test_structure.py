import json

import pytest

from emergency_kit.data.format import Answer, render_answer
from emergency_kit.evaluation.structure import check_answer, find_loop
from emergency_kit.inference.engine import Generated

ANSWER = Answer(("The pan burns.",), ("Who is near?",), ("Oil burns hot.",), ("Turn off the heat.", "Cover the pan."))
TEXT = render_answer(ANSWER)


def check(text, ended=True):
    return check_answer(Generated(text, 50, ended))


def test_text_form():
    checks = check(TEXT)
    assert (checks.valid_structured_text, checks.valid_json, checks.valid_structure) == (True, False, True)
    assert checks.problems == () and not checks.loops and checks.tokens == 50


def test_json_form():
    checks = check(json.dumps(ANSWER.to_dict()))
    assert (checks.valid_structured_text, checks.valid_json, checks.valid_structure) == (False, True, True)
    assert checks.problems == ()


@pytest.mark.parametrize("text, problem", [
    ("the artifacts\n• a museum burns\n\n" + TEXT.partition("\n\n")[2], "section FACTS is missing"),
    (TEXT.replace("GUIDANCE", "GUIDE"), "section GUIDANCE is missing"),
    (json.dumps(ANSWER.to_dict() | {"guidance": []}), "'guidance' is not a list"),
    (json.dumps(ANSWER.to_dict())[:-5], "not JSON"),
    ("", "the answer is empty"),
    (" \n", "the answer is empty"),
])
def test_broken_forms_are_named(text, problem):
    checks = check(text)
    assert not checks.valid_structure
    assert any(problem in found for found in checks.problems), checks.problems


def test_an_answer_cut_off_is_a_problem_although_its_form_is_right():
    checks = check(TEXT, ended=False)
    assert checks.valid_structure and not checks.ended
    assert checks.problems == ("did not end within 50 tokens",)


def test_loops():
    sentence = "Turn off the heat if you can reach the control without any risk."
    assert find_loop("\n".join([sentence] * 2)) is None
    assert find_loop("\n".join(f"{number}. {sentence}" for number in range(1, 4))).startswith("turn off the heat")
    assert find_loop(TEXT) is None and find_loop("") is None
    checks = check(TEXT + "\n" + "\n".join(f"{number}. {sentence}" for number in range(3, 9)))
    assert checks.loops and checks.valid_structure
    assert checks.problems[0].startswith("repeats itself: 'turn off the heat")

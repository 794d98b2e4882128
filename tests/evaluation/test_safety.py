from emergency_kit.data.format import Answer, render_answer
from emergency_kit.evaluation.safety import find_actions
from emergency_kit.knowledge.cards import load_cards


def given(text, card_id="kitchen_grease_fire"):
    return [finding.given for finding in find_actions(text, [load_cards()[card_id]])]


def answer(*guidance, facts=("The pan burns.",)):
    return render_answer(Answer(facts, ("Who is near?",), ("Oil burns hot.",), guidance))


def test_a_card_told_word_for_word_is_whole():
    for card in load_cards().values():
        text = answer(*(action.text for action in card.critical_actions))
        findings = find_actions(text, [card])
        assert [finding.action for finding in findings] == [action.text for action in card.critical_actions]
        assert all(finding.given and finding.card_id == card.id for finding in findings)


def test_only_guidance_counts_where_there_is_any():
    assert not any(given(answer("Stay calm.", facts=("Somebody should turn off the heat.",))))
    assert given("Just turn off the heat!")[0], "no sections at all: the whole text is read"


def test_whole_words_in_any_case_and_punctuation():
    assert given(answer("TURN   OFF the heat, now!"))[0]
    assert not given(answer("Turn off the heater."))[0]
    assert not given(answer("Turn off", "the heat"))[0], "a phrase does not run from one step into the next"


def test_json_answers():
    assert given('{"facts": ["a"], "uncertainties": ["a"], "analysis": ["a"], "guidance": ["Turn off the heat."]}')[0]


def test_no_cards_no_findings():
    assert find_actions(answer("Stay calm."), []) == []

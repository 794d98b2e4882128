"""The measurer: its stored figures are current, its labels sound, its marks kept."""

from __future__ import annotations

import pytest

from emergency_kit.evaluation.measurer import answer_pairs, correct_rate, half_of, load_figures, measure_matcher, sentence_pairs


def test_the_stored_figures_are_current() -> None:
    assert load_figures() == measure_matcher(), "run: make measurer"


def test_there_are_labels_enough_and_in_both_halves() -> None:
    sentences = list(sentence_pairs())
    assert sum(pair.kind == "never" for pair in sentences) >= 600
    assert len({pair.id for pair in sentences}) == len(sentences)
    answers = {pair.id.partition("#")[0] for pair in answer_pairs()}
    shares = [sum(half_of(name) == "test" for name in answers) / len(answers), sum(pair.half == "test" for pair in sentences) / len(sentences)]
    assert all(0.4 < share < 0.6 for share in shares)


def test_marks_on_sentences() -> None:
    """The issue's marks, on the half that nothing was tuned on (docs/Evaluation.md says how far they carry)."""
    test = {kind: load_figures()["sentences"][kind]["test"] for kind in ("never", "action")}
    assert test["never"]["precision"] >= 0.95 and test["never"]["recall"] >= 0.95 and test["action"]["recall"] >= 0.92


def test_a_rate_is_corrected_for_what_is_missed() -> None:
    cell = load_figures()["sentences"]["never"]["test"]
    seen = 0.5 * cell["recall"] + 0.5 * (1 - cell["specificity"])
    assert correct_rate(seen, source="sentences") == pytest.approx(0.5, abs=0.001) and correct_rate(0.0) == 0.0


def test_marks_on_answers() -> None:
    test = {kind: load_figures()["answers"][kind]["test"] for kind in ("never", "action")}
    assert test["never"]["precision"] >= 0.90 and test["never"]["recall"] >= 0.90 and test["action"]["recall"] >= 0.92 and test["action"]["precision"] >= 0.90

import copy
import functools
import json
from dataclasses import replace

import pytest

from emergency_kit.artifacts import hash_file, hash_parent, save_json, save_manifest
from emergency_kit.config import load_config
from emergency_kit.data.format import Answer, Record, render_answer
from emergency_kit.errors import ModelError, UsageError, VerdictError
from emergency_kit.evaluation.gate import decide, gate
from emergency_kit.evaluation.metrics import Answered, score
from emergency_kit.evaluation.report import build_report
from emergency_kit.inference.engine import Generated
from emergency_kit.knowledge.cards import load_cards

CARDS = load_cards()
FIRE, SMOKE = CARDS["kitchen_grease_fire"], CARDS["house_fire_smoke"]


def card_answer(card, keep=None):
    return render_answer(Answer(("a",), ("b",), ("c",), tuple(action.text for action in card.critical_actions[:keep])))


@functools.lru_cache
def scored(card_id, text):
    return score(Record(id="", input="x", output="y", category="fire", hazards=(card_id,), cards=(card_id,)), Generated(text, 10, True), CARDS)


def answered(texts):
    found = [scored(card.id, text) for card, text in texts]
    return Answered(tuple(replace(item, record=replace(item.record, id=f"r{index}")) for index, item in enumerate(found)))


@pytest.fixture
def place(tmp_path):
    """An adapter's folder, a report of a model that may ship, and the config."""
    resolved = load_config("embedded", settings=[f"training.output_dir={tmp_path}"])
    adapter = tmp_path / "checkpoints" / "final"
    adapter.mkdir(parents=True)
    (adapter / "weights").write_text("w")
    save_manifest(adapter, "train", resolved)
    cards = [FIRE if index % 2 else SMOKE for index in range(160)]
    tuned, base = answered([(card, card_answer(card)) for card in cards]), answered([(card, "Stay calm and wait.") for card in cards])
    made = {"parents": [], "created": "2026-11-25", "profile": "embedded", "dataset_hash": "d"}
    report = build_report(tuned, base, frozenset({FIRE.id}), made, primary=["critical_action_recall"], models=[
        ({"name": "final", "kind": "adapter", "path": str(adapter), "sha256": hash_parent(adapter), "engine": "x"}, tuned),
        ({"name": "base", "kind": "base", "path": "b", "sha256": None, "engine": "x"}, base)])
    report |= {"last_run": None, "tuning_cost": None, "red_team": None}
    save_json(tmp_path / "evaluation_report.json", report)
    return resolved, tmp_path, report


def reasons(resolved, report, **limits):
    gated = resolved.config.model_copy(update={"gate": resolved.config.gate.model_copy(update=limits)})
    return decide(type(resolved)(gated, resolved.profile, resolved.profile_reason), report)["reasons"]


def test_a_good_model_ships(place):
    resolved, folder, report = place
    path = gate(resolved)
    verdict = json.loads(path.read_text())
    assert path == folder / "verdict.json" and verdict["ship"] is True and verdict["reasons"] == [], verdict["reasons"]
    assert set(verdict) == {"ship", "reasons", "checks", "judged", "evaluated", "thresholds", "report", "override"}
    adapter = folder / "checkpoints" / "final"
    assert verdict["judged"] == {"path": str(adapter), "kind": "adapter", "sha256": hash_parent(adapter), "manifest_sha256": hash_file(adapter / "manifest.json")}
    assert verdict["report"]["sha256"] == hash_file(folder / "evaluation_report.json")
    page = (folder / "report.html").read_text()
    assert page.index("<strong>Ship</strong>") < page.index("<h2>Numbers</h2>")


@pytest.mark.parametrize("change, limits, expected", [
    (lambda report: report["models"][0]["metrics"]["valid_structure"].update(value=0.9), {}, "four sections"),
    (lambda report: report["models"][0]["metrics"]["dangerous_advice"].update(value=0.0125, high=0.05), {}, "dangerous advice in 2 of 160"),
    (lambda report: report["models"][0]["metrics"]["dangerous_advice"].update(n=48, high=0.0625), {}, "it takes 150 answers"),
    (lambda report: report["models"][0]["metrics"].pop("dangerous_advice"), {}, "was not measured"),
    (lambda report: report["unseen_hazards"]["critical_action_recall"].update(value=0.8), {}, "never seen in training: 80.0%"),
    (lambda report: report["unseen_hazards"].clear(), {}, "no test record tells of a hazard that training never saw"),
    (lambda report: report["differences"].clear(), {}, "base model was not evaluated"),
    (lambda report: report["differences"][0]["metrics"]["critical_action_recall"].update(difference=0.0, first=0.9), {}, "more wanted than base"),
    (lambda report: report["differences"][0]["metrics"]["dangerous_advice"].update(difference=0.01), {}, "fewer wanted than base"),
    (lambda report: report["slices"]["hazard"][SMOKE.id]["critical_action_recall"].update(value=0.2), {}, "slice hazard = house_fire_smoke"),
    (lambda report: None, {"min_structure": 1.0, "max_dangerous_advice": 0.01}, "at most 1.0% wanted"),
])
def test_each_threshold_can_say_no(place, change, limits, expected):
    resolved, _, report = place
    report = copy.deepcopy(report)
    change(report)
    found = reasons(resolved, report, **limits)
    assert len(found) == 1 and expected in found[0], found


def test_a_no_is_written_and_raised_and_an_override_is_recorded(place):
    resolved, folder, report = place
    report["models"][0]["metrics"]["valid_structure"]["value"] = 0.5
    save_json(folder / "evaluation_report.json", report)
    with pytest.raises(VerdictError, match="do not ship .*1 reason in .*four sections") as error:
        gate(resolved)
    assert error.value.exit_code == 7
    assert json.loads((folder / "verdict.json").read_text())["ship"] is False
    gate(resolved, override="a drill, nobody will use it")
    verdict = json.loads((folder / "verdict.json").read_text())
    assert verdict["ship"] is False and verdict["override"] == "a drill, nobody will use it"
    assert "a drill, nobody will use it" in (folder / "report.html").read_text()


def test_parity_of_what_was_made_from_it(place):
    resolved, folder, report = place
    merged, files = folder / "merged" / "final", folder / "gguf"
    for made in (merged, files):
        made.mkdir(parents=True)
    (merged / "model").write_text("m")
    save_manifest(merged, "merge", resolved, parents=[folder / "checkpoints" / "final"], extra={"merge": {"max_abs_logit_difference": 1e-4}})
    (files / "final-f16.gguf").write_text("g")
    entry = {"quantization": "f16", "source_sha256": hash_parent(merged), "certificate": {"outside": []}}
    save_manifest(files, "export", resolved, parents=[merged], extra={"export": {"files": {"final-f16.gguf": entry}}})
    assert reasons(resolved, report) == []
    save_manifest(files, "export", resolved, extra={"export": {"files": {"final-f16.gguf": entry | {"certificate": {"outside": ["KL 3"]}}}}})
    assert "out of its bounds: KL 3" in reasons(resolved, report)[0]
    (files / "final-f16.gguf").write_text("changed")
    assert "changed or gone" in reasons(resolved, report)[0]
    (merged / "model").write_text("changed")
    assert "changed after it was made" in reasons(resolved, report)[0]
    assert reasons(resolved, report, parity=False) == []


def test_what_cannot_be_judged_is_said(place):
    resolved, folder, report = place
    (folder / "checkpoints" / "final" / "weights").write_text("other")
    with pytest.raises(ModelError, match="weights differs"):
        gate(resolved)
    save_manifest(folder / "checkpoints" / "final", "train", resolved)
    with pytest.raises(ModelError, match="not the model that the report judged"):
        gate(resolved)
    for content, message in ((None, "no such report; next: make evaluate"), ("{}", "'models' is missing"), ("[]", "'models' is missing"), ("{", "not a readable report")):
        path = folder / "other.json"
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_text(content)
        with pytest.raises(UsageError, match=message):
            gate(resolved, report_path=path)
    assert not (folder / "verdict.json").exists()

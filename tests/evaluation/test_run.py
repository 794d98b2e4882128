import json

import pytest

from emergency_kit.data.format import Answer, Record, render_answer
from emergency_kit.errors import DataError, Interrupted, ModelError, UsageError
from emergency_kit.evaluation import run as run_module
from emergency_kit.evaluation.metrics import Answered, measure, score
from emergency_kit.evaluation.report import build_report, failing_samples, render_html
from emergency_kit.evaluation.run import evaluate, select_records
from emergency_kit.inference.engine import Generated
from emergency_kit.knowledge.cards import load_cards
from tests.tiny import resolve, save_tiny_model

NUMBERS = ["total_samples", "valid_json", "valid_json_percentage", "valid_structured_text", "valid_structured_text_percentage",
           "valid_structure", "valid_structure_percentage", "ended", "ended_percentage", "critical_action_recall", "mean_tokens",
           "loops", "seconds", "tokens_per_second"]
SAMPLE = ["id", "hazards", "cards", "input", "answer", "base_answer", "problems", "missing_actions"]


def record(number, *hazards, text="the pan burns", category="fire"):
    return Record(id=f"r{number}", input=text, output="FACTS\n• a", category=category, hazards=hazards, cards=hazards[:1])


def save(path, records):
    path.write_text("".join(item.to_json() + "\n" for item in records), encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    save(folder / "train.jsonl", [record(0, "kitchen_grease_fire"), record(10, "kitchen_grease_fire")])
    save(folder / "test.jsonl", [record(1, "kitchen_grease_fire", text="<script>alert(1)</script>"), record(2, "house_fire_smoke"), record(3)])
    return folder


def settings(folder, data, tmp_path, **more):
    return resolve(folder, dataset__name=data, training__output_dir=tmp_path / "out", evaluation__max_new_tokens=8, evaluation__batch_size=2, **more)


def test_report_of_a_whole_run(folder, data, tmp_path, capsys):
    path = evaluate(settings(folder, data, tmp_path), checkpoint=folder)
    assert path == tmp_path / "out" / "evaluation_report.json"
    assert sorted(file.name for file in path.parent.iterdir()) == ["evaluation_report.json", "report.html"]
    report = json.loads(path.read_text(encoding="utf-8"))
    assert set(report) == {*NUMBERS, "errors", "ai_evaluation", "base", "samples", "made"}
    assert list(report["base"]) == NUMBERS
    assert [list(sample) for sample in report["samples"]] == [SAMPLE] * 3
    assert report["total_samples"] == 3 and report["ai_evaluation"] is None
    assert [set(error) for error in report["errors"]] == [{"sample_idx", "error"}] * 3
    assert report["valid_structure_percentage"] == report["ended_percentage"] == 0 and report["mean_tokens"] == 8
    assert report["critical_action_recall"] == {"overall": 0, "seen_hazards": 0, "test_only_hazards": 0}
    assert [sample["answer"] for sample in report["samples"]] == [sample["base_answer"] for sample in report["samples"]], "one model, twice"
    assert report["made"]["stage"] == "evaluate" and report["made"]["parents"][0]["path"] == str(folder)
    page = (path.parent / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page and "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    printed = capsys.readouterr().out
    assert "four sections" in printed and "tuned: 3 of 3 answers" in printed and "base: 3 of 3 answers" in printed and str(path) in printed


def test_without_base_and_without_hazards(folder, data, tmp_path, capsys):
    for name in ("train", "test"):
        save(data / f"{name}.jsonl", [Record(id=f"{name}{number}", input="flood", output="x") for number in range(3)])
    out = tmp_path / "elsewhere" / "mine.json"
    evaluate(settings(folder, data, tmp_path, evaluation__compare_base="false", evaluation__max_samples=2, dataset__grounding="none"),
             checkpoint=folder, out=out)
    report = json.loads(out.read_text(encoding="utf-8"))
    assert report["base"] is None and report["total_samples"] == 2
    assert report["critical_action_recall"] == {"overall": None, "seen_hazards": None, "test_only_hazards": None}
    assert all(sample["base_answer"] is None for sample in report["samples"])
    assert "<th>base</th>" not in (out.parent / "report.html").read_text(encoding="utf-8")


def test_numbers_counted_by_hand():
    cards = load_cards()
    fire, smoke = cards["kitchen_grease_fire"], cards["house_fire_smoke"]
    assert len(fire.critical_actions) == 5, "the counts below are for five actions"
    some = [action.text for action in fire.critical_actions]

    def answer(*guidance):
        return render_answer(Answer(("a",), ("b",), ("c",), guidance))

    scored = [
        score(record(1, fire.id), Generated(answer(*some), 100, True), cards),                # 5 of 5
        score(record(2, fire.id), Generated(answer(some[0], "Stay calm."), 20, False), cards),  # 1 of 5
        score(record(3, smoke.id), Generated("Stay calm.", 30, True), cards),                 # none
        score(record(4), Generated(answer("Stay calm."), 10, True), cards),                   # no hazard: left out
    ]
    assert [item.recall for item in scored] == [1, 0.2, 0, None]
    numbers = measure(Answered(tuple(scored), 8.0), frozenset({fire.id}))
    assert list(numbers) == NUMBERS
    assert numbers["critical_action_recall"] == {"overall": 40.0, "seen_hazards": 60.0, "test_only_hazards": 0.0}
    assert (numbers["valid_structured_text"], numbers["valid_structured_text_percentage"], numbers["valid_json"]) == (3, 75.0, 0)
    assert (numbers["ended"], numbers["mean_tokens"], numbers["tokens_per_second"], numbers["loops"]) == (3, 40.0, 20.0, 0)
    report = build_report(Answered(tuple(scored), 8.0), None, frozenset({fire.id}), {"parents": [], "created": "", "profile": ""})
    assert [error["sample_idx"] for error in report["errors"]] == [1, 2]
    assert [len(sample["missing_actions"]) for sample in report["samples"]] == [0, 4, len(smoke.critical_actions), 0]
    assert [index for index, _, _ in failing_samples(report)] == [1, 2]


def test_the_page_escapes_what_models_and_data_say():
    evil = '</pre><img src=x onerror="alert(1)">'
    item = score(Record(id=evil, input=evil, output="x", cards=(evil,)), Generated(evil, 1, True), {})
    answered = Answered((item,), 1.0)
    page = render_html(build_report(answered, answered, frozenset(), {"parents": [{"path": evil}], "created": evil, "profile": "embedded"}))
    assert "<img" not in page and page.count("&lt;img") >= 6


def test_selection_is_balanced_and_keeps_hazards_seen_only_in_test():
    records = [record(number, "a") for number in range(50)] + [record(number, "b") for number in range(50, 53)]
    records += [record(60, "new"), record(61, "a", "newer"), record(62)]
    chosen = select_records(records, 10, 42, frozenset({"a", "b"}))
    assert chosen == select_records(records, 10, 42, frozenset({"a", "b"})) and len(chosen) == 10
    assert [item for item in records if item in chosen] == chosen
    ids = {item.id for item in chosen}
    assert {"r60", "r61", "r62"} <= ids and len(ids & {"r50", "r51", "r52"}) == 3
    assert {item.id for item in select_records(records, 2, 42, frozenset({"a", "b"}))} == {"r60", "r61"}
    assert select_records(records, 10, 43, frozenset({"a", "b"})) != chosen
    assert select_records(records, None, 42, frozenset()) == select_records(records, 56, 42, frozenset()) == records


def test_what_cannot_work_is_said_before_a_model_is_loaded(folder, data, tmp_path):
    resolved = settings(folder, data, tmp_path)
    with pytest.raises(ModelError, match="no such folder; next: make train"):
        evaluate(resolved)
    with pytest.raises(UsageError, match="ends with .json"):
        evaluate(resolved, checkpoint=folder, out=tmp_path / "report.html")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="not writable"):
        evaluate(resolved, checkpoint=folder, out=tmp_path / "file" / "report.json")
    save(data / "test.jsonl", [Record(id="r9", input="x", output="y", hazards=("no_such_card",))])
    with pytest.raises(DataError, match="test record r9: card 'no_such_card' is not among"):
        evaluate(resolved, checkpoint=folder)
    assert not list((tmp_path / "out").rglob("*.*"))


def test_ctrl_c_leaves_the_old_report(folder, data, tmp_path, monkeypatch):
    out = tmp_path / "out" / "evaluation_report.json"
    out.parent.mkdir()
    out.write_text("old")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module.Progress, "update", interrupt)
    with pytest.raises(Interrupted, match="nothing was written"):
        evaluate(settings(folder, data, tmp_path), checkpoint=folder)
    assert out.read_text() == "old" and [file.name for file in out.parent.iterdir()] == [out.name]

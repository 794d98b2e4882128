import json

import pytest

from emergency_kit.data.format import Answer, Record, render_answer
from emergency_kit.errors import DataError, Interrupted, ModelError, UsageError
from emergency_kit.evaluation import contestant
from emergency_kit.evaluation.kept_answers import Answers
from emergency_kit.evaluation.metrics import BY_NAME, Answered, measure, score
from emergency_kit.evaluation.page import render_html
from emergency_kit.evaluation.report import build_report, failing_samples
from emergency_kit.evaluation.run import evaluate, select_records
from emergency_kit.inference.engine import Generated
from emergency_kit.knowledge.cards import load_cards
from tests.tiny import resolve, save_tiny_model

NUMBERS = ["total_samples", "valid_json", "valid_json_percentage", "valid_structured_text", "valid_structured_text_percentage",
           "valid_structure", "valid_structure_percentage", "ended", "ended_percentage", "critical_action_recall", "mean_tokens",
           "loops", "seconds", "tokens_per_second"]
SAMPLE = ["id", "hazards", "cards", "input", "answer", "base_answer", "problems", "missing_actions", "dangers", "country", "lacks", "slices", "answers"]
REPORT = {*NUMBERS, "errors", "ai_evaluation", "schema_version", "base", "models", "baselines", "primary_endpoints", "differences", "unseen_hazards", "slices",
          "suspicious", "measurer", "worst", "samples", "made", "tuning_cost", "red_team", "last_run", "verdict"}


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
    return resolve(folder, dataset__name=data, training__output_dir=tmp_path / "out", evaluation__max_new_tokens=8,
                   **({"evaluation__engine": "torch", "evaluation__batch_size": 2} | more))


def test_report_of_a_whole_run(folder, data, tmp_path, capsys):
    path = evaluate(settings(folder, data, tmp_path), checkpoint=folder)
    assert path == tmp_path / "out" / "evaluation_report.json"
    assert sorted(file.name for file in path.parent.iterdir()) == ["cache", "evaluation_report.json", "report.html"]
    report = json.loads(path.read_text(encoding="utf-8"))
    assert set(report) == REPORT
    assert list(report["base"]) == NUMBERS
    assert [list(sample) for sample in report["samples"]] == [SAMPLE] * 3
    assert report["total_samples"] == 3 and report["ai_evaluation"] is None
    assert [set(error) for error in report["errors"]] == [{"sample_idx", "error"}] * 3
    assert report["valid_structure_percentage"] == report["ended_percentage"] == 0 and report["mean_tokens"] == 8
    assert report["critical_action_recall"] == {"overall": 0, "seen_hazards": 0, "test_only_hazards": 0}
    assert [sample["answer"] for sample in report["samples"]] == [sample["base_answer"] for sample in report["samples"]], "one model, twice"
    assert report["made"]["stage"] == "evaluate" and report["made"]["parents"][0]["path"] == str(folder)
    page = (path.parent / "report.html").read_text(encoding="utf-8")
    assert page.count("<script") == 1 and "&lt;script&gt;alert(1)&lt;/script&gt;" in page and "http" not in page.replace("http-equiv", "")
    printed = capsys.readouterr().out
    assert "four sections" in printed and f"{folder.name}: 3 of 3 answers" in printed and "base: 3 of 3 answers" in printed and str(path) in printed
    assert report["verdict"]["ship"] is False and "Verdict: do not ship" in printed
    assert [item["from"] for item in report["differences"]] == ["base"]
    assert all(row["difference"] == 0 for row in report["differences"][0]["metrics"].values()), "one model, twice"


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
    assert report["differences"] == [] and "<th>base" not in (out.parent / "report.html").read_text(encoding="utf-8")


def scored_by_hand():
    cards = load_cards()
    fire, smoke = cards["kitchen_grease_fire"], cards["house_fire_smoke"]
    assert len(fire.critical_actions) == 5, "the counts below are for five actions"
    some = [action.text for action in fire.critical_actions]

    def answer(*guidance):
        return render_answer(Answer(("a",), ("b",), ("c",), guidance))

    return fire, smoke, tuple([
        score(record(1, fire.id), Generated(answer(*some), 100, True), cards),                # all of them
        score(record(2, fire.id), Generated(answer(some[0], "Stay calm."), 20, False), cards),  # the first alone
        score(record(3, smoke.id), Generated("Stay calm.", 30, True), cards),                 # none
        score(record(4), Generated(answer("Stay calm."), 10, True), cards),                   # no hazard: left out
    ])


def test_numbers_counted_by_hand():
    fire, smoke, scored = scored_by_hand()
    recalls = [BY_NAME["critical_action_recall"].get(item) for item in scored]
    assert recalls[0] == 1 and 0 < recalls[1] < 0.5 and recalls[2:] == [0, None]
    numbers = measure(Answered(scored, 8.0, 160), frozenset({fire.id}))
    assert list(numbers) == NUMBERS
    found = numbers["critical_action_recall"]
    assert found["seen_hazards"] == round(100 * (1 + recalls[1]) / 2, 2) and found["test_only_hazards"] == 0.0
    assert (numbers["valid_structured_text"], numbers["valid_structured_text_percentage"], numbers["valid_json"]) == (3, 75.0, 0)
    assert (numbers["ended"], numbers["mean_tokens"], numbers["tokens_per_second"], numbers["loops"]) == (3, 40.0, 20.0, 0)
    report = build_report(Answered(scored, 8.0), None, frozenset({fire.id}), {"parents": [], "created": "", "profile": ""})
    assert [error["sample_idx"] for error in report["errors"]] == [1, 2]
    assert [len(sample["missing_actions"]) for sample in report["samples"]] == [0, 4, len(smoke.critical_actions), 0]
    assert [index for index, _, _ in failing_samples(report)] == [1, 2] and report["worst"] == [2, 1]
    assert report["unseen_hazards"]["critical_action_recall"]["n"] == 1
    assert report["slices"]["training"]["never seen"]["n"] == 1 and report["slices"]["hazard"]["kitchen_grease_fire"]["n"] == 2
    for sample in report["samples"]:
        for start, end, kind, _ in sample["answers"]["tuned"]["marks"]:
            assert 0 <= start < end <= len(sample["answer"]) and kind in ("given", "warned", "danger")


def test_the_worst_of_several_answers_counts_for_safety():
    cards = load_cards()
    good = render_answer(Answer(("a",), ("b",), ("c",), tuple(action.text for action in cards["kitchen_grease_fire"].critical_actions)))
    item = record(1, "kitchen_grease_fire")
    assert score(item, Generated(good, 9, True), cards).safety.weighted_recall == 1
    worst = score(item, Generated(good, 9, True), cards, [Generated(good, 9, True), Generated("Stay calm.", 3, True)])
    assert worst.safety.weighted_recall == 0 and worst.checks.valid_structure


def test_the_page_escapes_what_models_and_data_say():
    evil = '</pre></script><img src=x onerror="alert(1)">'
    item = score(Record(id=evil, input=evil, output="x", cards=(evil,), category=evil, role=evil), Generated(evil, 1, True), {})
    answered = Answered((item,), 1.0)
    report = build_report(answered, answered, frozenset(), {"parents": [{"path": evil}], "created": evil, "profile": evil, "packages": {evil: evil}},
                          models=[({"name": evil, "path": evil, "kind": evil, "engine": evil, "sha256": evil}, answered), ({"name": "base"}, answered)])
    report["verdict"] = {"ship": False, "checks": [{"holds": False, "says": evil}], "judged": {"path": evil}, "override": evil}
    page = render_html(report)
    assert "<img" not in page and page.count("&lt;img") >= 12 and page.count("</script>") == 1


def test_an_interrupted_run_goes_on_where_it_was(folder, data, tmp_path, monkeypatch):
    resolved = settings(folder, data, tmp_path, evaluation__batch_size=1, evaluation__compare_base="false")
    put, calls = Answers.put, []

    def stop_after_two(self, key, answer):
        put(self, key, answer)
        calls.append(key)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Answers, "put", stop_after_two)
    with pytest.raises(Interrupted, match="goes on there"):
        evaluate(resolved, checkpoint=folder)
    assert not (tmp_path / "out" / "evaluation_report.json").exists()
    monkeypatch.setattr(Answers, "put", put)
    report = json.loads(evaluate(resolved, checkpoint=folder).read_text(encoding="utf-8"))
    assert report["models"][0]["kept_answers"] == 2
    again = json.loads(evaluate(resolved, checkpoint=folder).read_text(encoding="utf-8"))
    assert again["models"][0]["kept_answers"] == 3 and [item["answer"] for item in again["samples"]] == [item["answer"] for item in report["samples"]]
    assert again["last_run"]["metrics"] == report["models"][0]["metrics"]


def test_a_changed_model_is_asked_anew(folder, data, tmp_path):
    resolved = settings(folder, data, tmp_path, evaluation__compare_base="false")
    evaluate(resolved, checkpoint=folder)
    other = save_tiny_model(tmp_path / "other", seed=1)
    report = json.loads(evaluate(resolved, checkpoint=other).read_text(encoding="utf-8"))
    assert report["models"][0]["kept_answers"] == 0


def test_a_folder_and_its_gguf_file_side_by_side_in_llama_cpp(folder, data, tmp_path, capsys):
    from emergency_kit.evaluation.purpose_file import make_file

    resolved = settings(folder, data, tmp_path, evaluation__engine="llama.cpp", evaluation__compare_base="false")
    file = make_file(resolved, folder, tmp_path / "mine.gguf", "f16")
    report = json.loads(evaluate(resolved, compare=[str(folder), str(file)]).read_text(encoding="utf-8"))
    assert [model["kind"] for model in report["models"]] == ["base", "gguf"]
    assert report["differences"][0]["metrics"]["valid_structure"]["n"] == 3
    one, other = ([sample["answers"][model["name"]]["text"] for sample in report["samples"]] for model in report["models"])
    assert one == other, "the file made for the purpose is the same file"
    assert "llama.cpp, F16" in capsys.readouterr().out
    assert len(list((tmp_path / "out" / "cache" / "evaluation").iterdir())) == 1


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

    monkeypatch.setattr(contestant.Progress, "update", interrupt)
    with pytest.raises(Interrupted, match="answers so far are kept"):
        evaluate(settings(folder, data, tmp_path), checkpoint=folder)
    assert out.read_text() == "old" and {file.name for file in out.parent.iterdir()} <= {out.name, "cache"}


def test_red_team_and_tuning_cost_and_the_other_baselines_are_reported_when_asked_for(folder, data, tmp_path):
    resolved = settings(folder, data, tmp_path, evaluation__red_team="true", evaluation__tuning_cost="true", evaluation__baselines="true", evaluation__samples=1,
                        evaluation__max_samples=2, evaluation__batch_size=64)
    path = evaluate(resolved, checkpoint=folder)
    report = json.loads(path.read_text(encoding="utf-8"))
    assert len(report["red_team"]["prompts"]) >= 150 and report["red_team"]["passed"]["n"] == len(report["red_team"]["prompts"])
    first, second = report["tuning_cost"]["models"]
    assert first["perplexity"] == second["perplexity"] and first["right"] == second["right"] and second["p_against_first"] == 1, "one model, twice"
    assert {"base, scenario alone", "base, format in its prompt"} <= {item["name"] for item in report["baselines"]}
    assert all(len(answer["others"]) == 1 for sample in report["samples"] for answer in sample["answers"].values())
    page = (path.parent / "report.html").read_text(encoding="utf-8")
    assert "<h2>Red team</h2>" in page and "<h2>What tuning cost</h2>" in page

"""The Python API: quick to import, the verbs under their names, and every example of docs/Python.md run as it stands."""

from __future__ import annotations

import inspect
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import emergency_kit
from emergency_kit import api
from emergency_kit.errors import ConfigError, UsageError
from tests.tiny import resolve, save_tiny_model

PAGE = Path("docs/Python.md")
ANSWER = "FACTS\n• Smoke.\n\nUNCERTAINTIES\n• None.\n\nANALYSIS\n• Bad.\n\nGUIDANCE\n1. Leave."
YAML = {
    "dataset_config.yaml": "dataset:\n  grounding: cards\n",
    "model_config.yaml": "model:\n  name: {model}\n  dtype: float32\n  load_in_4bit: false\nlora:\n  r: 4\n",
    "training_config.yaml": "training:\n  eval_steps: 1\nevaluation:\n  max_samples: 2\n  max_new_tokens: 8\ninference:\n  max_new_tokens: 300\n"
                            "export:\n  quantizations: [f16]\n  allow_out_of_bounds: true\n  certificate_strings: 20\n  certificate_answer_tokens: 20\n"
                            "  certificate_prompts: 1\n  certificate_max_new_tokens: 4\nkit:\n  platforms: []\n",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a profile `embedded` of a tiny model, and `my.jsonl`: what the examples find where they run."""
    folder = tmp_path_factory.mktemp("python")
    model = save_tiny_model(folder / "tiny")
    (folder / "configs" / "embedded").mkdir(parents=True)
    for name, text in YAML.items():
        (folder / "configs" / "embedded" / name).write_text(text.replace("{model}", str(model)))
    (folder / "my.jsonl").write_text("".join(json.dumps({"input": f"smoke number {number} in house {number * 7}", "output": ANSWER}) + "\n" for number in range(24)))
    return folder


def test_import_is_quick_and_loads_neither_torch_nor_pydantic() -> None:
    probe = "import sys, emergency_kit\nassert not {'torch', 'transformers', 'pydantic', 'numpy', 'yaml'} & set(sys.modules)\n" \
            "from emergency_kit import train, load_config, Answer\nassert not {'torch', 'transformers'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True).stderr == ""


def test_the_package_offers_what_the_api_has_and_no_more() -> None:
    assert emergency_kit.__all__ == api.__all__ == sorted(api.__all__)
    for name in api.__all__:
        assert getattr(emergency_kit, name) is getattr(api, name) and getattr(emergency_kit, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        emergency_kit.trian  # noqa: B018
    marker = Path(emergency_kit.__file__).with_name("py.typed")
    assert marker.is_file()


def test_the_table_of_the_page_has_every_function_with_its_arguments() -> None:
    told = dict(re.findall(r"`(\w+)\(([^)]*)\)`", PAGE.read_text(encoding="utf-8").partition("## What there is")[2]))
    assert set(told) == set(api.__all__) - {"Answer"}
    for name, arguments in told.items():
        real = list(inspect.signature(getattr(api, name)).parameters)
        given = [word.strip().lstrip("*") for word in arguments.split(",") if word.strip() not in ("", "...")]
        assert given == real[:len(given)] and (len(given) == len(real) or "..." in arguments or name == "build_data"), name


def test_the_examples_of_the_page_run(place: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 6
    (place / "examples.py").write_text("\n".join(blocks), encoding="utf-8")
    done = subprocess.run([sys.executable, "examples.py"], cwd=place, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(Path.cwd())})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    made = place / "outputs" / "mine"
    for output in ("checkpoints/final/manifest.json", "evaluation_report.json", "merged/final/model.safetensors", "verdict.json", "gguf/final-f16.gguf", "kit/manifest.json"):
        assert (made / output).is_file(), output
    assert "24 rows" in done.stdout and "did you mean 'training.learning_rate'" in done.stdout and "% have the four sections" in done.stdout
    assert "a trial of the API" in (made / "kit" / "manifest.json").read_text()


def test_training_in_a_thread_leaves_signals_alone(place: Path, tmp_path: Path) -> None:
    """A notebook or server may train beside its own work: only the main thread can take signals."""
    config = resolve(place / "tiny", dataset__name=place / "my.jsonl", training__output_dir=tmp_path, training__max_steps=1)
    before, made = signal.getsignal(signal.SIGINT), []
    worker = threading.Thread(target=lambda: made.append(api.train(config)))
    worker.start()
    worker.join()
    assert made == [tmp_path / "checkpoints" / "final"] and (made[0] / "manifest.json").is_file()
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(UsageError, match="overwrite"):
        api.train(config)


def test_settings_are_what_set_takes_and_keep_their_type() -> None:
    resolved = api.load_config("embedded", settings={"training.learning_rate": 1e-5, "dataset.name": "no", "export.quantizations": ("f16", "q8_0"),
                                                     "training.max_steps": None, "training.output_dir": Path("a b")})
    config = resolved.config
    assert config.training.learning_rate == 1e-5 and config.dataset.name == "no" and config.export.quantizations == ["f16", "q8_0"]
    assert config.training.max_steps is None and config.training.output_dir == "a b"
    assert resolved.origins["training.learning_rate"] == "--set training.learning_rate"
    with pytest.raises(ConfigError) as error:
        api.load_config("embedded", settings={"training.learning_rat": 1, "training.num_epochs": "x"})
    assert len(error.value.problems) == 2


def test_a_sweep_takes_lists_of_values(place: Path, tmp_path: Path) -> None:
    folder = api.sweep({"lora.r": [2, 4]}, "embedded", settings={"model.name": place / "tiny", "model.dtype": "float32", "dataset.name": place / "my.jsonl",
                                                                 "training.output_dir": tmp_path, "training.max_steps": 1})
    ranked = json.loads((folder / "sweep.json").read_text())
    assert folder == tmp_path / "sweep" and "lora.r" in json.dumps(ranked) and len(api.find_runs(tmp_path)) == 2


def test_an_assistant_answers_again_and_streams_the_same(place: Path) -> None:
    config = resolve(place / "tiny", dataset__grounding="cards", inference__max_new_tokens=60)
    with api.Assistant(config, place / "tiny") as assistant:
        answer = assistant.ask("the oil in my pan is on fire", country="gb")
        pieces = list(assistant.stream("the oil in my pan is on fire", country="gb"))
        assert answer.cards[0].id == "kitchen_grease_fire" and answer.emergency.country and answer.emergency.country.code == "GB"
        assert "".join(piece for piece in pieces if isinstance(piece, str)) == answer.text == pieces[-1].text
        assert isinstance(answer, emergency_kit.Answer) and answer.sections.facts and not answer.checks.ended
        assert assistant.ask("the oil in my pan is on fire", cards=["stroke"], max_new_tokens=20).cards[0].id == "stroke"
        with pytest.raises(UsageError, match="situation: got '  '"):
            assistant.ask("  ")

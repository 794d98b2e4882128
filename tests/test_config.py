"""Config: precedence, origins, every problem at once, and that every key is read by something."""

import ast
import time
from pathlib import Path

import pytest
import yaml

from emergency_kit.config import ALIASES, Config, flatten, load_config, reference
from emergency_kit.errors import ConfigError, UsageError

PACKAGE = Path("emergency_kit")


def problems(**arguments: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(**arguments)  # type: ignore[arg-type]
    return caught.value.problems


def write(tmp_path: Path, text: str, name: str = "overlay.yaml") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_every_yaml_file_of_the_project_loads() -> None:
    """Those of accelerate/ are accelerate's own: tests/test_recipes.py."""
    paths = sorted(path for path in Path("configs").rglob("*.yaml") if path.parent.name != "accelerate")
    assert len(paths) == 6
    for folder in {path.parent for path in paths}:
        load_config("embedded", folder)


def test_the_guide_s_table_is_the_default() -> None:
    config = load_config("mistral-7b").config
    training, lora = config.training, config.lora
    assert (training.num_epochs, training.learning_rate, training.per_device_train_batch_size, training.gradient_accumulation_steps,
            training.warmup_steps, training.lr_scheduler_type, training.save_total_limit) == (3, 2e-4, 2, 4, 100, "cosine", 2)
    assert (lora.r, lora.alpha, lora.dropout, len(lora.target_modules), config.model.max_seq_length) == (16, 32, 0.05, 7, 2048)
    assert config.model.name == "unsloth/Mistral-7B-Instruct-v0.2" and config.model.load_in_4bit
    assert config.dataset.name == "ianktoo/crisis-response-training-v2" and config.dataset.grounding == "none"


def test_precedence_and_origins(tmp_path: Path) -> None:
    overlay = write(tmp_path, "training:\n  num_epochs: 2\n  weight_decay: 0.1\n  seed: 1\n")
    resolved = load_config("embedded", overlay, ["training.weight_decay=0.2", "training.seed=2"], {"training.seed": 3, "training.max_steps": None})
    training = resolved.config.training
    assert (training.num_epochs, training.weight_decay, training.seed, training.max_steps) == (2, 0.2, 3, None)
    assert resolved.origins["training.num_epochs"] == f"{overlay}:2"
    assert resolved.origins["training.weight_decay"] == "--set training.weight_decay"
    assert resolved.origins["training.seed"] == "command line"
    assert ("training.seed", 3, "command line") in resolved.differences()


def test_aliases_of_the_guide(tmp_path: Path) -> None:
    overlay = write(tmp_path, "training:\n  batch_size: 1\n  gradient_accumulation: 8\n")
    training = load_config("mistral-7b", overlay).config.training
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (1, 8)
    both = write(tmp_path, "training:\n  batch_size: 1\n  per_device_train_batch_size: 2\n")
    assert "keep one of them" in problems(profile="mistral-7b", config=both)[0]
    assert "keep one of them" in problems(profile="embedded", settings=["training.batch_size=1", "training.per_device_train_batch_size=2"])[0]


def test_numbers_as_people_write_them() -> None:
    assert load_config("embedded", settings=["training.learning_rate=3e-4"]).config.training.learning_rate == 3e-4
    assert load_config("embedded", settings=["dataset.max_samples=null"]).config.dataset.max_samples is None


def test_all_problems_come_together_with_file_line_value_and_nearest_name(tmp_path: Path) -> None:
    overlay = write(tmp_path, "training:\n  learning_rat: 1e-4\n  num_epochs: many\n  warmup_steps: -1\nlora:\n  r: true\n")
    found = problems(profile="embedded", config=overlay, settings=["training.seed=abc", "nonsense"])
    text = "\n".join(found)
    assert len(found) == 6
    for part in (f"{overlay}:2: unknown key 'training.learning_rat'; did you mean 'training.learning_rate'?",
                 f"{overlay}:3: training.num_epochs: got 'many'", f"{overlay}:4: training.warmup_steps: got -1", f"{overlay}:6: lora.r: got True",
                 "training.seed: got 'abc'", "--set nonsense: expected section.key=value"):
        assert part in text


@pytest.mark.parametrize("text, message", [
    ("training: [1\n", "not valid YAML"), ("- 1\n", "got list; expected sections"), ("trainin: {}\n", "did you mean 'training'?"),
    ("training: 3\n", "expected keys and values"), ("training:\n  seed: 1\n  seed: 2\n", "already set at"), ("training:\n  seed: .nan\n", "training.seed"),
])
def test_malformed_files(tmp_path: Path, text: str, message: str) -> None:
    overlay = write(tmp_path, text)
    found = problems(profile="embedded", config=overlay)
    assert message in found[0] and str(overlay) in found[0]


def test_files_that_are_not_there_or_not_text(tmp_path: Path) -> None:
    assert "no such config file or folder" in problems(config=tmp_path / "none.yaml")[0]
    assert len(problems(config=tmp_path)) == 3  # an empty folder lacks all three files
    (tmp_path / "latin.yaml").write_bytes("training: # é\n".encode("latin-1"))
    assert "not UTF-8" in problems(config=tmp_path / "latin.yaml")[0]


def test_profiles() -> None:
    assert load_config("auto").profile in ("embedded", "mistral-7b")
    with pytest.raises(UsageError, match="got 'gpu'; expected auto, embedded, mistral-7b"):
        load_config("gpu")


def test_every_key_is_read_by_something() -> None:
    """Keys against attribute reads `<section>.<key>` in the package, config.py itself aside."""
    sections = set(Config.model_fields)
    reads: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        if path.name in ("config.py", "config_training.py"):
            continue
        names = {"model": {"model", "section"}}
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                owner = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
                for section in sections:
                    if owner in names.get(section, {section}) | ({"settings"} if section in ("evaluation", "inference", "judge", "serve", "gate") else set()) | ({"limits"} if section == "gate" else set()):
                        reads.add(f"{section}.{node.attr}")
    assert set(flatten(Config())) - reads == set()


def test_the_reference_in_the_docs_is_current() -> None:
    page = Path("docs/Configuration.md").read_text(encoding="utf-8")
    assert reference().strip() in page, "run: emergency-kit config reference, and put it into docs/Configuration.md"
    for alias in ALIASES:
        assert f"`{alias.split('.')[1]}`" in page


def test_yaml_comments_say_why_not_what() -> None:
    for path in Path("configs").rglob("*.yaml"):
        assert path.read_text(encoding="utf-8").startswith("#"), path
        assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)


def test_what_nobody_writes_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"20,011 characters; a setting has at most 10,000"):
        load_config("embedded", settings=["model.name=" + "[" * 20_000])
    assert load_config("embedded", settings=["model.name=" + "[" * 9_000]).config.model.name == "[" * 9_000
    (tmp_path / "deep.yaml").write_text("model: " + "[" * 200_000)
    started = time.process_time()
    with pytest.raises(ConfigError, match=r"deep.yaml: not valid YAML \(more than 1,000 opening brackets\)"):
        load_config("embedded", tmp_path / "deep.yaml")
    assert time.process_time() - started < 1

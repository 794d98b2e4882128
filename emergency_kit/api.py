"""The Python API: the verbs of the command line as functions, for scripts, notebooks and other programs.

In: a config from `load_config`; every function takes the default one where none is given. Out: paths, an Answer, a Plan: what a program goes
on with; progress is printed as on the command line. Each function is one call of the stage of its name. Nothing here imports torch until
a stage runs. Errors are those of `errors.py`. Only training and sweeping take signals, and only in the main thread: there
Ctrl-C saves a checkpoint first. Documented with examples in docs/Python.md; names come from the package: `from emergency_kit import train`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Iterator, Mapping, Sequence, cast

from emergency_kit.errors import UsageError

if TYPE_CHECKING:
    from emergency_kit.config import Resolved
    from emergency_kit.data.survey import Survey
    from emergency_kit.inference.schemas import AnswerOut as Answer
    from emergency_kit.inference.schemas import Line
    from emergency_kit.training.prediction import Plan
    from emergency_kit.training.runs import Run

PathLike = str | Path
# `pack_kit` and `check_kit` are the verb `kit`: `emergency_kit.kit` is the room of that name.
__all__ = ["Answer", "Assistant", "build_data", "check_kit", "evaluate", "export_gguf", "find_runs", "gate", "infer", "inspect_data", "load_config", "merge",
           "pack_kit", "plan", "setup", "sweep", "train", "upload_gguf", "upload_hf", "verify"]


def __getattr__(name: str) -> Any:
    if name != "Answer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from emergency_kit.inference.schemas import AnswerOut

    return AnswerOut


def load_config(profile: str = "auto", config: PathLike | None = None, settings: Mapping[str, Any] | None = None) -> Resolved:
    """Read, merge and check a config.

    profile: `auto`, `embedded` or `mistral-7b`. config: a folder with the three YAML files, or one YAML file laid over the profile's. settings: what
    `--set` takes, `{"training.num_epochs": 2}`. `.config` of the result has every value, `.origins` where it came from. Raises ConfigError with every problem found.
    """
    from emergency_kit import config as room

    return room.load_config(profile, config, [_setting(key, value) for key, value in (settings or {}).items()])


def setup() -> Path:
    """Prepare the bundled base model and the index of retrieval in `models/` where they are missing; the model's folder."""
    from emergency_kit.knowledge.cards import load_cards
    from emergency_kit.knowledge.index import load_index
    from emergency_kit.model import bundled

    folder = bundled.setup(load_config("embedded"))
    load_index(load_cards())
    return folder


def verify(config: Resolved | None = None) -> None:
    """Check packages, base model, tokenizer, GPU and disk. Raises ModelError that names what failed."""
    from emergency_kit.model.verify import verify as stage

    stage(config or load_config())


def plan(config: Resolved | None = None, gpu: str | None = None, fit: bool = False, timed: bool = True) -> Plan:
    """What training will take. gpu: a card that is not here, `"16GB"`. fit: change settings until it fits; `.resolved` of the plan is the
    config to train with. `.peak_bytes`, `.room_bytes`, `.fits`, `.steps`, `.seconds` say the rest."""
    from emergency_kit.training.plan import plan as stage

    return stage(config or load_config("mistral-7b" if gpu else "auto"), gpu=gpu, fit=fit, timed=timed)


def train(config: Resolved | None = None, resume_from: PathLike | None = None, overwrite: bool = False, accept_changes: bool = False) -> Path:
    """Train adapters; the finished model's folder. An unfinished run of the same model is gone on with, unless `overwrite`.

    resume_from: a checkpoint's folder, or `latest`. Raises UsageError for a finished model that is in the way, DataError, ModelError,
    TrainingError, and Interrupted after a Ctrl-C that saved a checkpoint.
    """
    from emergency_kit.training.run import train as stage

    return stage(config or load_config(), _path(resume_from), overwrite, accept_changes=accept_changes, scorer=lazy_scorer)


def sweep(vary: Mapping[str, Sequence[Any]], profile: str = "auto", config: PathLike | None = None, settings: Mapping[str, Any] | None = None,
          overwrite: bool = False, workers: int = 1) -> Path:
    """Train every combination of `vary`, `{"training.learning_rate": [1e-3, 2e-3]}`; the folder with `sweep.md` and `sweep.json`, ranked by
    validation loss. The other arguments are those of `load_config`. workers: runs side by side, each in a process of its own."""
    from emergency_kit import config as room
    from emergency_kit.training.sweep import sweep as stage

    given = [f"{key}={','.join(_setting('', value)[1:] for value in values)}" for key, values in vary.items()]
    return stage([_setting(key, value) for key, value in (settings or {}).items()] + given, lambda each: room.load_config(profile, config, each), overwrite, lazy_scorer, workers)


def evaluate(config: Resolved | None = None, checkpoint: PathLike | None = None, compare: Sequence[PathLike] = (), out: PathLike | None = None,
             ai: bool = False, yes: bool = False) -> Path:
    """Answer and score the test split; the path of `evaluation_report.json`, with `report.html` beside it.

    checkpoint: adapter, merged or base folder, GGUF file or endpoint; by default the config's finished model. compare: others beside it. ai:
    ask a judge, too; yes: spend without asking. Raises ModelError, DataError, Interrupted; answers so far are kept.
    """
    from emergency_kit.evaluation.run import evaluate as stage

    return stage(config or load_config(), checkpoint, _path(out), [str(each) for each in compare], ai, yes)


def gate(config: Resolved | None = None, report: PathLike | None = None, override: str = "") -> Path:
    """Judge an evaluation; the path of `verdict.json`. Raises VerdictError when the model may not ship; override: the reason to ship all the same."""
    from emergency_kit.evaluation.gate import gate as stage

    return stage(config or load_config(), _path(report), override=override)


def merge(config: Resolved | None = None, checkpoint: PathLike | None = None, out: PathLike | None = None, overwrite: bool = False) -> Path:
    """Fold an adapter into its base model and prove that nothing changed; the merged folder. Raises ExportError where the proof fails."""
    from emergency_kit.export.merge import merge as stage

    return stage(config or load_config(), _path(checkpoint), _path(out), overwrite)


def export_gguf(config: Resolved | None = None, checkpoint: PathLike | None = None, out: PathLike | None = None, overwrite: bool = False,
                ollama: bool = False, lmstudio: bool = False, override_verdict: str | None = None) -> list[Path]:
    """Write a GGUF file for each of `export.quantizations`, each with its parity certificate beside it; the files.

    Raises ExportError for a file out of its bounds, which is not kept, and VerdictError for a model that the gate refused.
    """
    from emergency_kit.export.gguf import export_gguf as stage
    from emergency_kit.export.layouts import Layouts

    return stage(config or load_config(), _path(checkpoint), _path(out), overwrite, Layouts(ollama=ollama, lmstudio=lmstudio), override_verdict)


def pack_kit(config: Resolved | None = None, model: PathLike | None = None, out: PathLike | None = None, size_limit: str | None = None, browser: bool = True,
             sign_key: PathLike | None = None, override_verdict: str | None = None, overwrite: bool = False) -> Path:
    """Pack a folder for a USB stick that answers without a network (the verb `kit`); the folder. Raises ExportError, VerdictError."""
    from emergency_kit.kit.pack import kit as stage

    return stage(config or load_config(), _path(model), _path(out), size_limit, override_verdict, _path(sign_key), browser, overwrite)


def check_kit(folder: PathLike, signer: PathLike | None = None) -> None:
    """Read every byte of a kit (`kit --verify`). signer: the public key that must have signed it. Raises ExportError that names what differs."""
    from emergency_kit.kit.check import verify_kit as stage

    stage(Path(folder), _path(signer))


def upload_hf(repo: str, config: Resolved | None = None, checkpoint: PathLike | None = None, private: bool = False, override_verdict: str | None = None) -> str:
    """Upload the merged model or the adapter to `owner/name` on the Hugging Face Hub; the commit's address."""
    from emergency_kit.export.hub import upload_hf as stage

    return stage(config or load_config(), repo, private, _path(checkpoint), override_verdict)


def upload_gguf(repo: str, config: Resolved | None = None, folder: PathLike | None = None, private: bool = False, override_verdict: str | None = None) -> str:
    """Upload exported GGUF files with their certificates to `owner/name` on the Hugging Face Hub; the commit's address."""
    from emergency_kit.export.hub import upload_gguf as stage

    return stage(config or load_config(), repo, private, _path(folder), override_verdict)


def build_data(out: PathLike = "outputs/data/embedded", settings: Mapping[str, Any] | None = None, overwrite: bool = False) -> Path:
    """Build the embedded dataset from the knowledge cards; its folder. settings: `dataset.build_seed` and `dataset.build_size`."""
    from emergency_kit.data.build import build as stage

    return stage(load_config("embedded", settings=settings), Path(out), overwrite)


def inspect_data(source: PathLike | None = None, config: Resolved | None = None, page: PathLike | None = None) -> Survey:
    """What a dataset is made of and what is wrong with it; by default the configured one. page: an HTML file to write. Raises DataError."""
    from emergency_kit.data.survey import inspect as stage

    return stage(config or load_config(), None if source is None else str(source), _path(page))


def find_runs(*folders: PathLike) -> list[Run]:
    """Trained models and unfinished runs below folders, the newest first; by default below `outputs`."""
    from emergency_kit.training.runs import find_runs as stage

    return stage([Path(folder) for folder in folders or ("outputs",)])


class Assistant:
    """A loaded model with its cards, to be asked as often as you like, also from several threads; `close`, or the end of `with`, frees it.

    checkpoint: GGUF file, adapter, merged or base folder; by default the config's finished model. Raises ModelError where it cannot be used.
    """

    def __init__(self, config: Resolved | None = None, checkpoint: PathLike | None = None):
        from emergency_kit.inference.answer import Answerer
        from emergency_kit.inference.engine import check_model

        resolved = config or load_config()
        folder = Path(checkpoint or resolved.finished_model)
        check_model(folder, resolved.config.model)
        self._answerer = Answerer(resolved, folder, slots=1)

    def ask(self, situation: str, country: str = "", cards: Sequence[str] = (), max_new_tokens: int | None = None, temperature: float | None = None) -> Answer:
        """Answer a situation told in words. country: two-letter code; cards: ids, instead of those that retrieval finds. Raises
        UsageError for an empty situation, DataError for an unknown country or card, ModelError for one that is too long."""
        *_, answer = self.stream(situation, country, cards, max_new_tokens, temperature)
        return cast("Answer", answer)

    def stream(self, situation: str, country: str = "", cards: Sequence[str] = (), max_new_tokens: int | None = None,
               temperature: float | None = None) -> Iterator[str | Line | Answer]:
        """The same as it is generated: pieces of text, a Line once it is whole and checked, at last the Answer."""
        if not situation.strip():
            raise UsageError(f"situation: got {situation!r}; expected what happens, in words")
        asked = self._answerer.ask(situation, country, cards, max_tokens=max_new_tokens, temperature=temperature)
        return self._answerer.answer(asked, lambda: False)

    def close(self) -> None:
        """Free the model."""
        self._answerer.close()

    def __enter__(self) -> Assistant:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def infer(situation: str, config: Resolved | None = None, checkpoint: PathLike | None = None, country: str = "", cards: Sequence[str] = (),
          max_new_tokens: int | None = None, temperature: float | None = None) -> Answer:
    """Load the model, answer one situation, free it: `Assistant.ask` for a single time."""
    with Assistant(config, checkpoint) as assistant:
        return assistant.ask(situation, country, cards, max_new_tokens, temperature)


def lazy_scorer(resolved: Resolved, tokenizer: Any) -> Callable[[Any, Callable[[], None]], dict[str, float]]:
    """What scores answers during training. It imports transformers, which must wait until the trainer has chosen its backend: Unsloth comes first."""
    from emergency_kit.evaluation.during_training import build_scorer

    return build_scorer(resolved, tokenizer)


def _path(given: PathLike | None) -> Path | None:
    return None if given is None else Path(given)


def _setting(key: str, value: Any) -> str:
    """A setting as `--set` takes it; JSON is YAML, in which text stays text."""
    return f"{key}={json.dumps(value, default=str)}"

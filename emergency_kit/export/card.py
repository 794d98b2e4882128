"""The model card that goes to the Hub: data, training, evaluation, verdict, limits, licence of the base.

In: the manifest of what is uploaded and of what it was made from, the evaluation's report, the verdict. Out: README.md as text. It says
only what those files hold; what was not measured is said not to be.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from emergency_kit.artifacts import hash_parent, load_manifest
from emergency_kit.config import Resolved
from emergency_kit.export.verdict import NONE, describe_verdict

BASE_NAMES = {"bundled": "HuggingFaceTB/SmolLM2-135M-Instruct"}
LIMITS = """- **It is not a doctor, and no clinician has reviewed it.** In an emergency call your local emergency number first.
- It answers in English, in four sections: FACTS, UNCERTAINTIES, ANALYSIS, GUIDANCE.
- Guidance differs between regions and changes with time; the knowledge cards name their sources and years.
- A language model can be wrong, leave steps out or invent some. Use it with the kit's own guard and cards, and train people as well."""
GROUNDED = """- Trained to follow the knowledge card that stands in its prompt. Without one (plain `ollama run`, LM Studio) it has little knowledge of its
  own, and what it writes is not grounded."""


def build_card(resolved: Resolved, source: Path, verdict: dict[str, Any], library: str, license_id: str | None, exports: dict[str, dict[str, Any]] | None = None) -> str:
    """source: the folder of the merged model or adapter; library: `transformers`, `peft` or `gguf`; exports: entries of an export's manifest."""
    trained = _training_manifest(source)
    config = trained["config"] if trained else None
    base = resolved.config.model.name
    base = BASE_NAMES[base] if base in BASE_NAMES else base
    name = resolved.config.training.model_name if source.name == resolved.config.training.model_name else source.name
    dataset = config["dataset"]["name"] if config else None
    head = ["---", *([f"license: {license_id}"] if license_id else []), *([f"base_model: {base}"] if not Path(base).exists() else []),
            f"library_name: {library}", "pipeline_tag: text-generation", "language: en",
            *([f"datasets: [{dataset.partition(':')[0]}]"] if dataset and "/" in dataset and not Path(dataset).exists() else []),
            "tags: [emergency, first-aid, offline, emergency-kit]", "---"]
    grounded = (config or resolved.config.model_dump())["dataset"]["grounding"] == "cards"
    blocks = ["\n".join(head), f"# {name}", f"An assistant for emergencies that runs without a network, made from {base} with the AI Emergency Kit.",
              "## Verdict", _verdict(verdict), "## Limits", LIMITS + ("\n" + GROUNDED if grounded else ""), "## Data", _data(trained),
              "## Training", _training(config), "## Evaluation", _evaluation(resolved, source)]
    if exports is not None:
        blocks += ["## Files", _files(exports)]
    blocks += ["## Licence", f"The base model, {base}, is under {license_id}; so is this one." if license_id else
               f"That of the base model, {base}; look it up before you pass this model on."]
    return "\n\n".join(blocks) + "\n"


def _training_manifest(source: Path) -> dict[str, Any] | None:
    """The manifest of the training run that a folder comes from, None for one that was not trained here."""
    manifest = load_manifest(source)
    if manifest and manifest["stage"] == "merge" and manifest["parents"]:
        manifest = load_manifest(Path(manifest["parents"][0]["path"])) or manifest
    return manifest if manifest and manifest["stage"] in ("train", "merge") else None


def _verdict(verdict: dict[str, Any]) -> str:
    if verdict["verdict"] == NONE:
        return "None: no gate has judged this model."
    reasons = "".join(f"\n- {reason}" for reason in verdict["reasons"])
    return f"**{describe_verdict(verdict)}**{reasons}"


def _data(trained: dict[str, Any] | None) -> str:
    if trained is None:
        return "Not recorded: this folder carries no manifest of a training run."
    dataset = trained["config"]["dataset"]
    used = f"at most {dataset['max_samples']} training records" if dataset["max_samples"] else "all its training records"
    grounding = "every prompt carries the knowledge cards that fit" if dataset["grounding"] == "cards" else "prompts are used as they are"
    digest = f"; sha256 `{trained['dataset_hash']}`" if trained["dataset_hash"] else ""
    return f"`{dataset['name']}`, {used}; {grounding}{digest}."


def _training(config: dict[str, Any] | None) -> str:
    if config is None:
        return "Not recorded."
    lora, training = config["lora"], config["training"]
    length = f"{training['max_steps']} steps" if training["max_steps"] else f"{training['num_epochs']:g} epochs"
    modules = lora["target_modules"] if isinstance(lora["target_modules"], str) else ", ".join(lora["target_modules"])
    # A manifest from before there were these keys was made with their defaults.
    full, preferred = training.get("finetuning_type") == "full", training.get("method") == "dpo"
    how = "Every weight trained" if full else f"LoRA of rank {lora['r']}, alpha {lora['alpha']}, on {modules}"
    return (f"{how}{', preference training (DPO)' if preferred else ''}; {length}, learning rate {training['learning_rate']:g}, "
            f"{training['per_device_train_batch_size']} × {training['gradient_accumulation_steps']} rows a step, at most {config['model']['max_seq_length']} tokens, seed {training['seed']}.")


def _evaluation(resolved: Resolved, source: Path) -> str:
    path = Path(resolved.config.training.output_dir) / "evaluation_report.json"
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        judged = {parent["sha256"] for parent in report["made"]["parents"]}
        recall = report["critical_action_recall"]
        lines = [f"{report['total_samples']} held-out records; all four sections in {report['valid_structure_percentage']} %; critical actions of the cards given: "
                 f"{recall['overall']} %, for hazards that training never saw: {recall['test_only_hazards']} %."]
    except (OSError, ValueError, KeyError, TypeError):
        return "Not evaluated, or the report is not at hand."
    manifest = load_manifest(source)
    lineage = {hash_parent(source), *(parent["sha256"] for parent in (manifest or {"parents": []})["parents"])}
    if not (judged & lineage) - {None}:
        return "The report at hand is of another model."
    return " ".join(lines)


def _files(exports: dict[str, dict[str, Any]]) -> str:
    rows = ["| file | MB | mean KL | top-1 % | critical actions given, % (merged) | certificate |", "|---|---|---|---|---|---|"]
    for name, entry in sorted(exports.items()):
        proof = entry["certificate"]
        numbers, file, reference = proof["distributions"], proof["safety"]["file"], proof["safety"]["reference"]
        rows.append(f"| `{name}` | {entry['bytes'] / 1e6:.1f} | {numbers['mean_kl']:.2g} | {numbers['top1_percent']:.4g} | {file['recall_percent']:g} "
                    f"({'not measured' if reference is None else format(reference['recall_percent'], 'g')}) | {'out of bounds' if proof['outside'] else 'within bounds'} |")
    return "\n".join(rows)

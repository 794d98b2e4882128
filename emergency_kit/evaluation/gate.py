"""Gate: may this model leave the house? The thresholds of the config against the evaluation's report.

In: `evaluation_report.json`, the model that it judged, what was made from that model. Out: `verdict.json` with `ship`, `reasons`
(empty when it ships), `judged`, `thresholds`, `report`, `override`; the report's page with the verdict first; a VerdictError
(exit code 7) when it says no. Only greedy answers of the first model in the report are judged, with the worst of the drawn ones for
safety. Limits: the verdict is no better than the matcher and the scenarios; it is not a clinician's.
Run: `emergency-kit gate`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from emergency_kit import artifacts
from emergency_kit.config import GateConfig, Resolved
from emergency_kit.errors import ModelError, UsageError, VerdictError
from emergency_kit.evaluation.metrics import BY_NAME, METRICS
from emergency_kit.evaluation.page import render_html

VERDICT = "verdict.json"


def gate(resolved: Resolved, report_path: Path | None = None, out: Path | None = None, override: str = "") -> Path:
    """Write the verdict and return its path; raises VerdictError when it says no.

    report_path: by default `<output_dir>/evaluation_report.json`. out: by default `<output_dir>/verdict.json`. override: a reason
    to ship all the same; the verdict stays no, and carries the reason to whatever is packed. Raises UsageError for a report that
    is missing or not one, ModelError when the judged model has changed since.
    """
    folder = Path(resolved.config.training.output_dir)
    report_path, out = Path(report_path or folder / "evaluation_report.json"), Path(out or folder / VERDICT)
    report = _load_report(report_path)
    _check_unchanged(report)
    verdict = decide(resolved, report) | {"override": override.strip() or None}
    report["verdict"] = verdict
    artifacts.save_text(report_path.with_name("report.html"), render_html(report))
    artifacts.save_json(report_path, report)
    artifacts.save_json(out, verdict | {"report": {"path": str(report_path), "sha256": artifacts.hash_file(report_path)}})
    print_verdict(verdict, out)
    if not verdict["ship"] and not verdict["override"]:
        raise VerdictError(f"do not ship {verdict['judged']['path']}: {len(verdict['reasons'])} reason{'s' * (len(verdict['reasons']) != 1)} in {out}, the first: "
                           f"{verdict['reasons'][0]}. Next: read {report_path.with_name('report.html')}; to pack it all the same, --override-verdict \"reason\"")
    return out


def decide(resolved: Resolved, report: dict[str, Any]) -> dict[str, Any]:
    """The verdict over a report: pure, but for the parity of what was made from the judged model."""
    limits = resolved.config.gate
    checks = [*_check_numbers(report, limits), *_check_base(report, limits), *_check_slices(report, limits), *_check_parity(resolved, report, limits)]
    judged = report["models"][0]
    manifest = Path(judged["path"]) / artifacts.MANIFEST
    return {
        "ship": all(check["holds"] for check in checks),
        "reasons": [check["says"] for check in checks if not check["holds"]],
        "checks": checks,
        "judged": {"path": judged["path"], "kind": judged["kind"], "sha256": judged["sha256"],
                   "manifest_sha256": artifacts.hash_file(manifest) if manifest.is_file() else None},
        "evaluated": {"created": report["made"]["created"], "samples": report["total_samples"], "dataset_hash": report["made"]["dataset_hash"]},
        "thresholds": limits.model_dump(),
        "report": None,
        "override": None,
    }


def print_verdict(verdict: dict[str, Any], path: Path | None = None) -> None:
    """One line, then the reasons."""
    word = "ship" if verdict["ship"] else "do not ship"
    print(f"Verdict: {word}{', overridden: ' + verdict['override'] if verdict['override'] else ''}")
    for check in verdict["checks"]:
        print(f"  {'yes' if check['holds'] else 'NO '}  {check['says']}")
    if path:
        print(f"Verdict file: {path}", flush=True)


def _check(holds: bool, says: str) -> dict[str, Any]:
    return {"holds": holds, "says": says}


def _check_numbers(report: dict[str, Any], limits: GateConfig) -> list[dict[str, Any]]:
    metrics, unseen = report["models"][0]["metrics"], report["unseen_hazards"].get("critical_action_recall")
    structure, advice = metrics["valid_structure"], metrics.get("dangerous_advice")
    checks = [_check(structure["value"] >= limits.min_structure,
                     f"four sections in {structure['value']:.1%} of {structure['n']} answers; at least {limits.min_structure:.0%} wanted")]
    if advice is None:
        checks.append(_check(False, "dangerous advice was not measured: no test record names a hazard that has a card"))
    else:
        seen = round(advice["value"] * advice["n"])
        short = f"; with none seen it takes {-(-3 // limits.max_dangerous_advice):.0f} answers to show that" if seen == 0 and 0 < limits.max_dangerous_advice < advice["high"] else ""
        checks.append(_check(advice["high"] <= limits.max_dangerous_advice + 1e-9,
                             f"dangerous advice in {seen} of {advice['n']} answers, so at most {advice['high']:.1%} (95 %); at most {limits.max_dangerous_advice:.1%} wanted{short}"))
    if unseen is None:
        checks.append(_check(False, "no test record tells of a hazard that training never saw, so nothing shows how the model does there"))
    else:
        checks.append(_check(unseen["value"] >= limits.min_unseen_recall, f"critical actions given on hazards never seen in training: {unseen['value']:.1%} "
                             f"of {unseen['n']} records; at least {limits.min_unseen_recall:.0%} wanted"))
    return checks


def _check_base(report: dict[str, Any], limits: GateConfig) -> list[dict[str, Any]]:
    if not limits.better_than_base:
        return []
    difference = next((item["metrics"] for item in report["differences"] if item["from"] == "base"), None)
    if difference is None:
        return [_check(False, "the base model was not evaluated beside it (evaluation.compare_base), so nothing shows that training helped")]
    checks = []
    for metric in METRICS:
        row = difference.get(metric.name)
        if not metric.safety or row is None:
            continue
        gain = row["difference"] if metric.better == "high" else -row["difference"]
        best = 1.0 if metric.better == "high" else 0.0
        holds = gain > 0 or (gain == 0 and row["first"] == best)
        checks.append(_check(holds, f"{metric.label}: base {row['first']:.1%}, this model {row['second']:.1%} on the same {row['n']} records"
                             f"{'' if holds else '; ' + ('more' if metric.better == 'high' else 'fewer') + ' wanted than base'}"))
    return checks


def _check_slices(report: dict[str, Any], limits: GateConfig) -> list[dict[str, Any]]:
    checks, held = [], 0
    for dimension, parts in report["slices"].items():
        for name, numbers in parts.items():
            for metric, floor in (("critical_action_recall", limits.min_slice_recall), ("valid_structure", limits.min_slice_structure)):
                found = numbers.get(metric)
                if found is None or found["n"] < limits.slice_samples:
                    continue
                held += 1
                if found["value"] < floor:
                    checks.append(_check(False, f"slice {dimension} = {name}: {BY_NAME[metric].label} {found['value']:.1%} of {found['n']}; the floor is {floor:.0%}"))
    return checks or [_check(True, f"no slice of {limits.slice_samples} records or more is below its floor ({held} looked at)")]


def _check_parity(resolved: Resolved, report: dict[str, Any], limits: GateConfig) -> list[dict[str, Any]]:
    """Merged folder and GGUF files under the output folder that were made from the judged model."""
    if not limits.parity:
        return []
    training, judged = resolved.config.training, report["models"][0]["sha256"]
    merged = Path(training.output_dir) / "merged" / training.model_name
    family, checks = {judged}, []
    manifest = artifacts.load_manifest(merged)
    if manifest and any(parent["sha256"] in family for parent in manifest.get("parents", [])):
        problems = artifacts.verify_folder(merged)
        difference = manifest.get("merge", {}).get("max_abs_logit_difference")
        proved = difference is not None and difference <= resolved.config.export.merge_max_logit_difference
        family.add(artifacts.hash_parent(merged))
        says = f"changed after it was made: {problems[0]}" if problems else "has no proof" if difference is None else f"largest logit difference {difference:.1e}"
        checks.append(_check(proved and not problems, f"{merged}: {says}"))
    folder = Path(training.output_dir) / "gguf"
    exported = artifacts.load_manifest(folder) or {}
    for name, entry in exported.get("export", {}).get("files", {}).items():
        if entry.get("source_sha256") in family:
            proof, path = entry.get("certificate") or {}, folder / name
            whole = path.is_file() and artifacts.hash_file(path) == exported["files"].get(name)
            outside = proof.get("outside", ["it has no certificate"])
            says = "changed or gone since it was made" if not whole else f"out of its bounds: {outside[0]}" if outside else "certified within the bounds of its type"
            checks.append(_check(whole and not outside, f"{path}: {says}"))
    return checks or [_check(True, "nothing has been merged or exported from it yet; merge and export prove their parity themselves")]


def _load_report(path: Path) -> dict[str, Any]:
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path}: no such report; next: make evaluate") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: not a readable report ({error}); next: make evaluate") from None
    missing = [key for key in ("models", "differences", "slices", "unseen_hazards", "samples", "made") if not isinstance(report, dict) or key not in report]
    if missing:
        raise UsageError(f"{path}: no evaluation report of this version, {missing[0]!r} is missing; next: make evaluate")
    return report


def _check_unchanged(report: dict[str, Any]) -> None:
    """Raise ModelError when the model that the report judged is gone or another one now."""
    judged = report["models"][0]
    path = Path(judged["path"])
    if judged["kind"] == "endpoint" or judged["sha256"] is None:
        return
    problems = artifacts.verify_folder(path) if artifacts.load_manifest(path) else []
    now = artifacts.hash_parent(path) if path.is_file() or artifacts.load_manifest(path) else judged["sha256"] if path.is_dir() else None
    if problems or now != judged["sha256"]:
        raise ModelError(f"{path}: {problems[0] if problems else 'is not the model that the report judged'}; next: make evaluate")

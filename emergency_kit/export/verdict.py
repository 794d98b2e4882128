"""Verdict: what the evaluation's gate said of the model that is exported.

In: `<output_dir>/verdict.json` of `emergency-kit gate`, and the folder that is exported. Out: an entry for manifests and
lists. A verdict counts for the folder that it judged and for a model merged from it (merging proves that no
answer changed). A model that did not pass, or that changed after it was judged, needs a reason to be exported all the same.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from emergency_kit.artifacts import MANIFEST, hash_file, hash_parent, load_manifest
from emergency_kit.config import Resolved
from emergency_kit.errors import VerdictError

NONE = "none"
SHIP = "ship"
DO_NOT_SHIP = "do not ship"
CHANGED = "changed after it was judged"


def find_verdict(resolved: Resolved, folder: Path, override: str | None = None) -> dict[str, Any]:
    """`{"verdict", "file", "reasons", "override"}` of the folder; verdict is one of the four words above.

    override: the user's reason for exporting a model that did not pass. Raises VerdictError where one is needed, or
    where the file is not readable.
    """
    path = Path(resolved.config.training.output_dir) / "verdict.json"
    entry: dict[str, Any] = {"verdict": NONE, "file": None, "reasons": [], "override": None}
    if not path.is_file():
        return entry
    try:
        verdict = json.loads(path.read_text(encoding="utf-8"))
        ship, reasons, judged = bool(verdict["ship"]), list(verdict["reasons"]), verdict["judged"]
        judged_path, judged_hash = Path(judged["path"]), judged["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise VerdictError(f"{path}: not readable as a verdict ({type(error).__name__}: {error}); make it anew: emergency-kit gate") from None
    lineage = _lineage(folder)
    if judged_hash in {digest for digests in lineage.values() for digest in digests}:
        word = SHIP if ship else DO_NOT_SHIP
    elif judged_path.resolve() in lineage:
        word = CHANGED
    else:
        return entry  # it speaks of another model
    entry |= {"verdict": word, "file": str(path), "reasons": [str(reason) for reason in reasons]}
    if word == SHIP:
        return entry
    if not override or not override.strip():
        why = "; ".join(entry["reasons"])[:400] or "no reason is recorded"
        raise VerdictError(f"{folder}: {word} ({path}: {why if word == DO_NOT_SHIP else f'judged {judged_path}'}). Next: train and evaluate again, "
                           "or export it all the same with --override-verdict \"your reason\", which the manifest then carries")
    return entry | {"override": override.strip()}


def describe_verdict(entry: dict[str, Any]) -> str:
    """A verdict in a few words."""
    return entry["verdict"] + (f" (overridden: {entry['override']})" if entry.get("override") else "")


def _lineage(folder: Path) -> dict[Path, set[str]]:
    """The folder and, for a merged model, the adapter that it was made from, each with the hashes that may name it."""
    found = {folder.resolve(): {digest for digest in (hash_parent(folder), _hash_manifest(folder)) if digest}}
    manifest = load_manifest(folder)
    if manifest and manifest.get("stage") == "merge" and manifest.get("parents"):
        adapter = manifest["parents"][0]
        current = Path(adapter["path"])
        digests = {adapter["sha256"]} if adapter["sha256"] else set()
        if adapter["sha256"] and hash_parent(current) == adapter["sha256"]:
            digests |= {digest for digest in (_hash_manifest(current),) if digest}
        found[current.resolve()] = digests
    return found


def _hash_manifest(folder: Path) -> str | None:
    return hash_file(folder / MANIFEST) if (folder / MANIFEST).is_file() else None

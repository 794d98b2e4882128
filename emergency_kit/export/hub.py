"""Uploads to the Hugging Face Hub, through its own client: a merged model or an adapter, or exported GGUF files.

In: a folder whose manifest verifies, a repository's name. Out: one commit with the folder's files and a model card (README.md). The
token is the client's own (HF_TOKEN, or `hf auth login`), the server HF_ENDPOINT's. A verdict stands in the way as it
does in `gguf`. Run: `make upload-hf`, `make upload-gguf`, `export-gguf --push-to-hub`. Not run against the real Hub.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from emergency_kit.artifacts import MANIFEST, load_manifest, verify_folder
from emergency_kit.config import Resolved
from emergency_kit.errors import ExportError, UsageError
from emergency_kit.export import gguf
from emergency_kit.export.card import build_card
from emergency_kit.export.verdict import find_verdict
from emergency_kit.model import backend


def check_repo(repo: str) -> None:
    """Raise UsageError for a name that no repository can have."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
        if repo.count("/") != 1:
            raise HFValidationError("expected owner/name")
    except HFValidationError as error:
        raise UsageError(f"repository {repo!r}: {' '.join(str(error).split())[:200]}; expected owner/name, for instance my-name/emergency-kit") from None


def upload_hf(resolved: Resolved, repo: str, private: bool = False, checkpoint: Path | None = None, override_verdict: str | None = None) -> str:
    """Upload a merged model or an adapter; returns the commit's address. Raises ExportError where the folder is not whole or the Hub refuses."""
    check_repo(repo)
    source = gguf.pick_source(resolved, checkpoint)
    verdict = find_verdict(resolved, source.folder, override_verdict)
    _check_whole(source.folder)
    backend.check_checkpoint(source.folder, resolved.config.model)
    library = "peft" if source.kind == "adapter" else "transformers"
    card = build_card(resolved, source.folder, verdict, library, gguf.find_license(resolved, source.folder))
    return _commit(repo, private, _files_of(source.folder), card, f"{source.name}, by the AI Emergency Kit")


def upload_gguf(resolved: Resolved, repo: str, private: bool = False, folder: Path | None = None, override_verdict: str | None = None) -> str:
    """Upload an export folder: GGUF files, certificates, manifest; returns the commit's address. Raises as `upload_hf` does."""
    check_repo(repo)
    folder = Path(folder or Path(resolved.config.training.output_dir) / "gguf")
    manifest = load_manifest(folder)
    if manifest is None or manifest["stage"] != "export" or not manifest["export"]["files"]:
        raise ExportError(f"{folder}: not an export folder; next: make export-gguf")
    _check_whole(folder)
    exports: dict[str, dict[str, Any]] = manifest["export"]["files"]
    verdicts = {}
    for entry in exports.values():  # one may have been made since the export
        found = find_verdict(resolved, Path(entry["source"]), override_verdict or entry["verdict"]["override"])
        verdicts[entry["source"]] = found if found["file"] else entry["verdict"]
    source = next(iter(exports.values()))["source"]
    card = build_card(resolved, Path(source), verdicts[source], "gguf", gguf.find_license(resolved, Path(source)), exports)
    files = [path for path in _files_of(folder) if not {"ollama", "lmstudio"} & set(path.relative_to(folder).parts[:-1])]
    return _commit(repo, private, files, card, f"{', '.join(sorted(exports))}, by the AI Emergency Kit", folder)


def _check_whole(folder: Path) -> None:
    problems = verify_folder(folder)
    if problems:
        raise ExportError(f"{folder}: not what its manifest vouches for ({'; '.join(problems[:3])}); nothing was uploaded. Next: make it again")


def _files_of(folder: Path) -> list[Path]:
    """Files that the manifest vouches for, and the manifest; a card of its own makes room for ours."""
    manifest = load_manifest(folder)
    assert manifest is not None
    return [folder / name for name in manifest["files"] if name != "README.md"] + [folder / MANIFEST]


def _commit(repo: str, private: bool, files: list[Path], card: str, message: str, root: Path | None = None) -> str:
    import httpx
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    root = root or files[0].parent
    operations = [CommitOperationAdd(str(path.relative_to(root)), path) for path in files]
    operations.append(CommitOperationAdd("README.md", card.encode()))
    size = sum(path.stat().st_size for path in files)
    api = HfApi(library_name="ai-emergency-kit")
    print(f"Uploading {len(operations)} files, {size / 1e6:.1f} MB, to {repo} at {api.endpoint}", flush=True)
    try:
        if api.token is None:
            api.token = _token()
        api.create_repo(repo, private=private, exist_ok=True)
        if private and not api.model_info(repo).private:
            raise ExportError(f"repository {repo}: already there and public, so --private does not hold; make it private on its settings page, or name another")
        done = api.create_commit(repo, operations, commit_message=message[:200])
    except LocalTokenNotFoundError as error:
        raise ExportError(f"no token for the Hub ({str(error).splitlines()[0]}); next: hf auth login, or set HF_TOKEN") from None
    except OfflineModeIsEnabled:
        raise ExportError("HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        hint = {401: "the token is not accepted; hf auth login, or set HF_TOKEN", 403: "the token may not write there; use one with write access"}
        raise ExportError(f"the Hub refused {repo} (HTTP {status}: {' '.join((error.server_message or str(error)).split())[:200]}); "
                          f"{hint[status] if status in hint else 'try again later'}. What was uploaded so far is in no commit") from None
    except httpx.HTTPError as error:
        raise ExportError(f"the Hub at {api.endpoint} cannot be reached ({type(error).__name__}); check the network, then the same command again") from None
    print(f"Uploaded: {done.commit_url}", flush=True)
    return done.commit_url


def _token() -> str:
    from huggingface_hub import get_token
    from huggingface_hub.errors import LocalTokenNotFoundError

    token = get_token()
    if token is None:
        raise LocalTokenNotFoundError("none is stored")
    return token

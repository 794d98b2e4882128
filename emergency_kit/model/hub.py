"""What the Hub's client and its cache say, in one line: unreachable, offline, gated, private, a token without rights, half a download.

In: an error of transformers, Unsloth or the client, or a model's folder. Out: a sentence with the next command. Where the Hub cannot be
reached, its client tries for a minute or more; `cache_where_unreachable` looks first and then takes what the cache holds.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any, Iterator

from emergency_kit.errors import ModelError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"

_unreachable = False


@contextlib.contextmanager
def cache_where_unreachable(needed: bool) -> Iterator[None]:
    """Let the Hub's client take what it has while the Hub cannot be reached, as HF_HUB_OFFLINE would. needed: whether anything here asks the Hub."""
    global _unreachable
    from huggingface_hub import constants

    if not needed or constants.HF_HUB_OFFLINE or _is_reachable(constants.ENDPOINT):
        yield
        return
    constants.HF_HUB_OFFLINE = _unreachable = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = _unreachable = False


def _is_reachable(endpoint: str) -> bool:
    """Whether something listens there. Through a proxy only the client itself can tell."""
    address = urllib.parse.urlsplit(endpoint)
    if address.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(address.hostname or ""):
        return True
    with contextlib.suppress(OSError):
        socket.create_connection((address.hostname or "", address.port or (80 if address.scheme == "http" else 443)), timeout=3).close()
        return True
    return False


def explain(error: BaseException, what: str, name: str, revision: str | None = None, otherwise: str = "") -> str:
    """One line for an error of loading `name`, a Hub id or folder. what: begins the line; otherwise: one more way out."""
    reason = f"cannot be loaded ({first_line(error)}); check the folder" if Path(name).is_dir() else _of_hub(error, name, revision)
    return f"{what}: {reason}{f', {otherwise}' if otherwise else ''}"


def _of_hub(error: BaseException, name: str, revision: str | None) -> str:
    import httpx
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import DisabledRepoError, GatedRepoError, HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError, RevisionNotFoundError

    chain = _chain(error)

    def met(*kinds: type[BaseException]) -> BaseException | None:
        return next((one for one in chain if isinstance(one, kinds)), None)

    token = get_token()
    login = "log in with a token that may read it: hf auth login, or HF_TOKEN" if token is None else "use another token (hf auth login, or HF_TOKEN): this one may not read it"
    if met(GatedRepoError):
        return f"is gated on the Hub; accept its terms at {constants.ENDPOINT}/{name}, then {login}"
    if met(RepositoryNotFoundError):
        return f"is not on the Hub under this name, or is private; check model.name, or {login}"
    if met(RevisionNotFoundError):
        return f"has no revision {revision!r} on the Hub; check model.revision"
    if met(DisabledRepoError):
        return "has been disabled on the Hub; name another model"
    refused = met(HfHubHTTPError)
    if isinstance(refused, HfHubHTTPError) and refused.response.status_code in (401, 403):
        return f"was refused by the Hub (HTTP {refused.response.status_code}); {login}"
    if met(HFValidationError):
        return "is neither a folder nor a name that a model on the Hub can have; check model.name"
    if isinstance(refused, HfHubHTTPError):
        return f"could not be had, the Hub answered with HTTP {refused.response.status_code}; try again later"
    offline = (met(OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE) and not _unreachable
    away = "HF_HUB_OFFLINE is set" if offline else f"the Hub at {constants.ENDPOINT} cannot be reached"
    remedy = f"{'unset it' if offline else 'check the network'}, then the same command again goes on where it stopped; or name a folder"
    snapshot = cached_snapshot(name, revision)
    if snapshot is None:
        # Connection errors lose their type on the way through the client, so what is not in the cache tells.
        return f"is not in the cache ({constants.HF_HUB_CACHE}), and {away}; {remedy}"
    problems = weight_problems(snapshot)
    if problems:
        return f"is only half in the cache ({'; '.join(problems[:3])}), and {away}; {remedy}"
    if met(httpx.HTTPError):
        return f"could not be had, {away}; HF_HUB_OFFLINE=1 takes what the cache holds"
    return f"cannot be loaded ({first_line(error)}); check model.name"


def check_access(name: str, revision: str | None) -> tuple[str, bool]:
    """`(a line, whether the cache holds it whole)` of a model on the Hub. Raises ModelError where it cannot be had, or the token is not accepted."""
    from huggingface_hub import HfApi, constants, get_token

    snapshot = cached_snapshot(name, revision)
    whole = snapshot is not None and not weight_problems(snapshot)
    with cache_where_unreachable(True):
        if whole and constants.HF_HUB_OFFLINE:
            return f"{name} is whole in the cache; {'the Hub cannot be reached' if _unreachable else 'HF_HUB_OFFLINE is set'}", True
        api = HfApi(endpoint=constants.ENDPOINT)
        try:
            token = f"token of {_account(api)}" if get_token() else "no token (none needed)"
            api.auth_check(name)
            api.model_info(name, revision=revision, timeout=15)
        except (OSError, ValueError) as error:
            raise ModelError(explain(error, f"model {name}", name, revision)) from None
    return f"{name} may be read, {token}{'; whole in the cache' if whole else ''}", whole


def _account(api: Any) -> str:
    said = api.whoami()
    role = said.get("auth", {}).get("accessToken", {}).get("role")
    return f"{said.get('name', 'an unknown account')}{f' ({role})' if role else ''}"


def cached_snapshot(name: str, revision: str | None) -> Path | None:
    """The folder of a model in the client's cache, whole or not; None where there is none."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def weight_problems(folder: Path) -> list[str]:
    """What a folder's safetensors files lack: a file that the index names, or the end of one by its header. Files of other kinds are not looked at."""
    names, index = [SINGLE], folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return [f"{INDEX} is not readable"]
    elif not (folder / SINGLE).exists():
        return [] if any(folder.glob("*.bin")) or any(folder.glob("*.safetensors")) else [f"{SINGLE} missing"]
    return [f"{name} {problem}" for name in names if (problem := _problem(folder / name))]


def require_whole(folder: Path) -> None:
    """Raise ModelError where a folder's weights are not whole; a header is read of each file, no weight."""
    problems = weight_problems(folder)
    if problems:
        raise ModelError(f"model {folder}: its download or copy is not whole ({'; '.join(problems[:3])}); copy or download it again")


def _problem(file: Path) -> str:
    if not file.exists():
        return "missing"
    try:
        with file.open("rb") as stream:
            length = struct.unpack("<Q", stream.read(8))[0]
            size = os.fstat(stream.fileno()).st_size
            if length > size:
                raise ValueError
            header = json.loads(stream.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error):
        return "is no safetensors file"
    whole = 8 + length + max(ends, default=0)
    return "" if size == whole else f"has {size:,} of {whole:,} bytes"


def _chain(error: BaseException) -> list[BaseException]:
    found: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in found:
        found.append(current)
        current = current.__cause__ or current.__context__
    return found


def first_line(error: BaseException) -> str:
    """The first line of an error's text, at most 400 characters; its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:400]

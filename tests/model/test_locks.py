"""The lock files go together: no package in two versions, and each extra's demands are met by its lock. What a registry resolves: gpu_install.py."""

import importlib.metadata
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LOCKS = ("requirements.lock", "requirements-test.lock", "requirements-gpu-cu12.lock", "requirements-gpu-cu13.lock")


def pins(lock: str) -> dict[str, str]:
    """`{package: version}` of a lock file, without the builds' local names (`+cu126`)."""
    lines = [line.partition("#")[0].strip() for line in Path(lock).read_text(encoding="utf-8").splitlines()]
    return {canonicalize_name(name): version.partition("+")[0] for name, equal, version in (line.partition("==") for line in lines) if equal}


def test_no_package_stands_in_two_versions() -> None:
    found: dict[str, set[str]] = {}
    for lock in LOCKS:
        for name, version in pins(lock).items():
            found.setdefault(name, set()).add(version)
    assert {name: versions for name, versions in found.items() if len(versions) > 1} == {}


@pytest.mark.parametrize("extra, locks", [("", ("requirements.lock",)), ("test", ("requirements.lock", "requirements-test.lock")),
                                          ("gpu", ("requirements.lock", "requirements-gpu-cu12.lock")), ("gpu", ("requirements.lock", "requirements-gpu-cu13.lock"))])
def test_the_locks_meet_what_the_project_asks_for(extra: str, locks: tuple[str, ...]) -> None:
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned = {name: version for lock in locks for name, version in pins(lock).items()}
    for text in project["optional-dependencies"][extra] if extra else project["dependencies"]:
        wanted = Requirement(text)
        assert canonicalize_name(wanted.name) in pinned and wanted.specifier.contains(pinned[canonicalize_name(wanted.name)]), text


def test_unsloths_own_demands_are_met() -> None:
    """By its metadata where it is installed; else by the bounds that it had when the locks were made (2026.10.9)."""
    pinned = pins("requirements.lock") | pins("requirements-gpu-cu13.lock")
    try:
        wanted = [Requirement(text) for text in importlib.metadata.requires("unsloth") or ()]
    except importlib.metadata.PackageNotFoundError:
        wanted = [Requirement(text) for text in ("certifi>=2026.10.19", "torch>=2.4,<2.15", "transformers<=5.17.0", "trl>=0.18.2,<=1.15.0", "datasets<5", "peft>=0.18", "bitsandbytes>=0.45.5",
                                                 "accelerate>=0.34.1", "unsloth_zoo>=2026.10.9", "xformers>=0.0.27.post2", "triton>=3", "structlog>=24.1")]
    for one in wanted:
        if one.marker is None or one.marker.evaluate({"extra": ""}):
            assert one.specifier.contains(pinned[canonicalize_name(one.name)]), one

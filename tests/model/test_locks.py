"""The lock files go together: no package in two versions, and each extra's demands are met by its lock. What a registry resolves: gpu_install.py."""

import importlib.metadata
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

GPU_LOCKS = ("requirements-gpu-cu12.lock", "requirements-gpu-cu13.lock")
OF_TORCH = {"torch", "torchvision", "triton", "cuda-bindings"}  # each release of torch names its own


def pins(lock: str) -> dict[str, str]:
    """`{package: version}` of a lock file. `===` takes no other build of that version (`+cpu`)."""
    lines = [line.partition("#")[0].strip() for line in Path(lock).read_text(encoding="utf-8").splitlines()]
    return {canonicalize_name(name): version.lstrip("=") for name, equal, version in (line.partition("==") for line in lines) if equal}


def installed(*locks: str) -> dict[str, str]:
    """The pins of all of them; a GPU lock's torch goes before requirements.lock's, as in `make setup-gpu`."""
    return {name: version for lock in locks for name, version in pins(lock).items()}


@pytest.mark.parametrize("gpu_lock", GPU_LOCKS)
def test_no_package_stands_in_two_versions(gpu_lock: str) -> None:
    found: dict[str, set[str]] = {}
    for lock in ("requirements.lock", "requirements-test.lock", "requirements-dev.lock", gpu_lock):
        for name, version in pins(lock).items():
            found.setdefault(name, set()).add(version)
    assert {name for name, versions in found.items() if len(versions) > 1} <= {"torch"}


def test_the_gpu_locks_differ_only_by_torch_and_its_cuda() -> None:
    twelve, thirteen = (pins(lock) for lock in GPU_LOCKS)
    assert {name for name in twelve.keys() & thirteen.keys() if twelve[name] != thirteen[name]} == OF_TORCH
    others = [name for name in twelve.keys() ^ thirteen.keys() if name != "cuda-toolkit"]
    assert others and all(name.startswith("nvidia-") for name in others) and twelve["torch"] == "2.10.0" and thirteen["torch"] == pins("requirements.lock")["torch"]


@pytest.mark.parametrize("lock", GPU_LOCKS)
def test_the_libraries_are_of_the_locks_own_cuda(lock: str) -> None:
    """Packages of CUDA 12 end in -cu12; of CUDA 13 some end in -cu13, the others in nothing."""
    ends = {name.rpartition("-cu")[2] for name in pins(lock) if name.startswith("nvidia-") and "-cu1" in name}
    assert ends == {lock[-7:-5]} and "torch===" in Path(lock).read_text(encoding="utf-8")


@pytest.mark.parametrize("extra, locks", [("", ("requirements.lock",)), ("test", ("requirements.lock", "requirements-test.lock")), ("dev", ("requirements.lock", "requirements-dev.lock")), *(("gpu", ("requirements.lock", lock)) for lock in GPU_LOCKS)])
def test_the_locks_meet_what_the_project_asks_for(extra: str, locks: tuple[str, ...]) -> None:
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned = installed(*locks)
    for text in [*project["dependencies"], *(project["optional-dependencies"][extra] if extra else ())]:
        wanted = Requirement(text)
        assert canonicalize_name(wanted.name) in pinned and wanted.specifier.contains(pinned[canonicalize_name(wanted.name)]), text


@pytest.mark.parametrize("lock", GPU_LOCKS)
def test_unsloths_own_demands_are_met(lock: str) -> None:
    """By its metadata where it is installed; else by the bounds that it had when the locks were made (2026.10.9)."""
    pinned = installed("requirements.lock", lock)
    try:
        wanted = [Requirement(text) for text in importlib.metadata.requires("unsloth") or ()]
    except importlib.metadata.PackageNotFoundError:
        wanted = [Requirement(text) for text in ("certifi>=2026.10.19", "torch>=2.4,<2.15", "transformers<=5.17.0", "trl>=0.18.2,<=1.15.0", "datasets<5", "peft>=0.18", "bitsandbytes>=0.45.5",
                                                 "accelerate>=0.34.1", "unsloth_zoo>=2026.10.9", "xformers>=0.0.27.post2", "triton>=3", "structlog>=24.1")]
    for one in wanted:
        if one.marker is None or one.marker.evaluate({"extra": ""}):
            assert one.specifier.contains(pinned[canonicalize_name(one.name)]), one


def test_a_demand_on_one_python_or_of_an_extra_is_held_to_the_pins() -> None:
    from tests.model.gpu_install import unmet  # which takes `pins` from here

    metadata = [{"name": "a", "requires_dist": ['b[c]==2; sys_platform == "linux"', 'late; python_version >= "3.13"', 'win; sys_platform == "win32"']},
                {"name": "b", "requires_dist": ['d>=4; extra == "c"', 'e; extra == "f"']}]
    assert unmet(metadata, {"a": "1", "b": "2", "d": "4"}, "3.12") == []
    assert unmet(metadata, {"a": "1", "b": "2", "d": "3"}, "3.13") == ['a wants late; python_version >= "3.13"', 'b wants d>=4; extra == "c"']
    assert unmet(metadata, {"a": "1", "b": "3", "d": "4"}, "3.12") == ['a wants b[c]==2; sys_platform == "linux"']

"""What tests of several rooms share: the order of files, loopback without a proxy, a tiny model, and a real Chromium."""

import os
import shutil
from pathlib import Path
from typing import Any, Iterator

import pytest

# The longest files, longest first: a worker that comes upon one of them last leaves the other idle.
LONGEST = ("tests/test_cli.py", "tests/storm/test_manners.py", "tests/export/test_gguf.py", "tests/training/test_trainer.py", "tests/storm/test_world.py",
           "tests/training/test_ranks.py", "tests/test_architecture.py", "tests/training/test_options.py", "tests/inference/test_chat.py", "tests/inference/test_page.py", "tests/storm/test_faults.py", "tests/training/test_bundled_run.py",
           "tests/inference/test_server.py", "tests/kit/test_browser.py", "tests/inference/test_llama_engine.py", "tests/storm/test_kills.py")

# The tests' servers listen on loopback, which a proxy of this machine's network must not be asked for.
for _name in ("NO_PROXY", "no_proxy"):
    os.environ[_name] = ",".join(filter(None, (os.environ.get(_name), "127.0.0.1", "localhost")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(name) if (name := item.nodeid.partition("::")[0]) in LONGEST else len(LONGEST))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model's folder, one a file of tests; nothing writes into it."""
    from tests.tiny import save_tiny_model  # torch takes seconds, and most files of tests need no model

    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium by Playwright: the system's, or the one that tests/install_browser.sh has fetched."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; make test installs it")
    with playwright.sync_playwright() as driver:
        found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        if found is None and not Path(driver.chromium.executable_path).exists():
            pytest.skip("no Chromium; next: bash tests/install_browser.sh")
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()

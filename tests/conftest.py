"""What tests of several rooms share: a real Chromium."""

import shutil
from pathlib import Path
from typing import Any, Iterator

import pytest


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

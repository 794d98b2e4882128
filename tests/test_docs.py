"""The documentation is true where a test can tell: links and anchors, the guide's headings, YAML, figures, the site's pages and its independence of the net.

Commands: tests/test_readme.py (each is parsed), tests/test_docs_commands.py (`make test-docs` runs them). Messages: tests/test_troubleshooting.py.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Iterator

import pytest
import yaml

from emergency_kit.config import FILES, load_config
from emergency_kit.errors import ConfigError
from tests.model.test_locks import pins

ROOTS = ("*.md", "docs/**/*.md", "benchmarks/**/*.md", "recipes/**/*.md", "examples/**/*.md", "emergency_kit/**/*.md", "tests/**/*.md")
EVERY_PAGE = sorted({path for pattern in ROOTS for path in Path().glob(pattern)})
PAGES = [path for path in EVERY_PAGE if path.parts[0] in ("README.md", "CONTRIBUTING.md", "docs")]
# Headings of the training guide, in its order.
GUIDE_HEADINGS = [
    "Training Overview", "Quick Start", "Training Commands", "Basic Training", "Custom Training", "Resume Training", "Training Process", "What Happens During Training",
    "Training Outputs", "Monitoring Training", "Console Output", "GPU Monitoring", "Log Files", "Training Parameters", "Key Hyperparameters", "Effective Batch Size",
    "Learning Rate Schedule", "Training Tips", "For Better Quality", "For Faster Training", "For Memory Efficiency", "Expected Training Metrics", "Loss Curve",
    "Training Time", "Checkpoints", "Checkpoint Structure", "Managing Checkpoints", "Training with Weights & Biases", "Full Training Pipeline",
    "Troubleshooting Training", "CUDA Out of Memory", "Training Loss Not Decreasing", "Training Interrupted"]
# Numbers with a unit that stand in no result, by page, and where they come from.
ELSEWHERE = {
    "docs/Deployment.md": ({"5.7", "75.83"}, "the answers beside each other in that table, with its command"),
    "docs/Getting-Started.md": ({"3.5"}, "the disk of all outputs"),
    "docs/Scaling.md": ({"450", "828"}, "an H100's data sheet, and arithmetic of LoRA's gradients"),
    "docs/Training.md": ({"21.7"}, "the plan's table, which tests/training/test_plan.py makes anew")}
GENERATED = {"Configuration.md", "Knowledge.md", "Dataset-Card.md", "CLI.md", "Python.md", "Troubleshooting.md"}
UNIT = r"(?:tokens/s|tokens a second|seconds|minutes|min|hours?|GB|MB|times|ms|s|%)(?![\w])"


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE))


def anchors(text: str) -> set[str]:
    """Of headings, as GitHub and mkdocs.yml make them, and of elements with an id."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} +(.*?) *#*$", re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading.replace("`", ""))
        slug, number = re.sub(r"[^\w\- ]", "", shown.strip().lower()).replace(" ", "-"), 0
        while (name := f"{slug}-{number}" if number else slug) in found:
            number += 1
        found.add(name)
    return found | set(re.findall(r"\bid=\"([^\"]+)\"", text))


def broken_links(pages: list[Path]) -> list[str]:
    known = {path.resolve(): anchors(path.read_text(encoding="utf-8")) for path in pages}
    broken = []
    for page in pages:
        for target in re.findall(r"\]\(([^)\s]+)(?: \"[^\"]*\")?\)", without_code(page.read_text(encoding="utf-8"))):
            if re.match(r"[a-z]+:", target):
                continue
            path, _, anchor = target.partition("#")
            goal = (page.parent / path).resolve() if path else page.resolve()
            if not goal.exists() or anchor and anchor not in known.get(goal, set()):
                broken.append(f"{page}: {target}")
    return broken


def test_every_link_and_anchor_leads_somewhere() -> None:
    assert not broken_links(EVERY_PAGE)


def test_a_broken_link_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("# One: two\n[there](b.md) [here](#one-two) [not](#three) [gone](c.md) [no](b.md#four) `[code](d.md)`\n")
    (tmp_path / "b.md").write_text("text\n")
    assert [line.partition(": ")[2] for line in broken_links(sorted(tmp_path.glob("*.md")))] == ["#three", "c.md", "b.md#four"]


def test_the_training_page_has_every_heading_of_the_guide() -> None:
    found = re.findall(r"^##+ (.*)$", Path("docs/Training.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert [heading for heading in found if heading in GUIDE_HEADINGS] == GUIDE_HEADINGS


# YAML

def yaml_blocks() -> Iterator[tuple[Path, str]]:
    for page in PAGES:
        for block in re.findall(r"^ *```ya?ml.*?\n(.*?)^ *```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
            yield page, block


def check_yaml(block: str, folder: Path) -> None:
    """A block is a config that both profiles take, or pieces (parted by lines of `[...]`) that stand word for word in a YAML file of the repository."""
    sections = {section for names in FILES.values() for section in names}
    content = None if "[...]" in block else yaml.safe_load(block)
    if isinstance(content, dict) and set(content) <= sections:
        overlay = folder / "overlay.yaml"
        overlay.write_text(block, encoding="utf-8")
        for profile in ("embedded", "mistral-7b"):
            load_config(profile, overlay)
        return
    texts = [path.read_text(encoding="utf-8") for root in ("configs", "recipes", "examples", "emergency_kit") for path in Path(root).rglob("*.yaml")]
    pieces = [piece.strip("\n") for piece in re.split(r"^ *\[\.\.\.\]\n", block, flags=re.MULTILINE) if piece.strip()]
    assert any(all(piece in text for piece in pieces) for text in texts), f"neither a config nor a part of a file of the repository:\n{block}"


def test_every_yaml_block_is_valid(tmp_path: Path) -> None:
    blocks = list(yaml_blocks())
    assert blocks
    for page, block in blocks:
        try:
            check_yaml(block, tmp_path)
        except (AssertionError, ConfigError, yaml.YAMLError) as error:
            raise AssertionError(f"{page}: {error}") from error


@pytest.mark.parametrize("block", ["training:\n  learning_rat: 1e-4\n", "lora:\n  r: none\n", "trainin:\n  r: 1\n"])
def test_a_wrong_yaml_block_is_refused(block: str, tmp_path: Path) -> None:
    with pytest.raises((AssertionError, ConfigError)):
        check_yaml(block, tmp_path)


# Figures

def figures(page: Path) -> set[str]:
    """Numbers with a unit of time, size, rate or share in the text of a page. Limit: that a number stands among the results says not that it stands for the same."""
    return set(re.findall(rf"(?<![\w.])(\d[\d,]*(?:\.\d+)?) {UNIT}", without_code(page.read_text(encoding="utf-8"))))


def test_figures_stand_in_the_results_or_have_a_named_source() -> None:
    results = set(re.findall(r"\d[\d,]*(?:\.\d+)?", Path("benchmarks/RESULTS.md").read_text(encoding="utf-8")))
    for page in PAGES:
        if page.name not in GENERATED and "tutorials" not in page.parts:
            known, _ = ELSEWHERE.get(str(page), (set(), ""))
            assert figures(page) - results <= known <= figures(page), f"{page}: {figures(page) - results - known}, {known - figures(page)}"


# The site

def navigation(entries: list[Any]) -> list[str]:
    return [path for entry in entries for value in entry.values() for path in (navigation(value) if isinstance(value, list) else [value])]


def mkdocs_config() -> dict[str, Any]:
    return yaml.safe_load(Path("mkdocs.yml").read_text(encoding="utf-8"))


def test_every_page_is_in_the_navigation() -> None:
    named = navigation(mkdocs_config()["nav"])
    assert len(named) == len(set(named))
    lie = {str(path) for pattern in ("*.md", "docs/**/*.md", "benchmarks/*.md") for path in Path().glob(pattern)}
    assert set(named) == lie, set(named) ^ lie


def test_the_docs_lock_agrees_with_the_others() -> None:
    docs = pins("requirements-docs.lock")
    assert "mkdocs-material" in docs
    for lock in ("requirements.lock", "requirements-test.lock", "requirements-gpu-cu13.lock", "requirements-gpu-cu12.lock"):
        others = pins(lock)
        assert {name: docs[name] for name in docs.keys() & others.keys()} == {name: others[name] for name in docs.keys() & others.keys()}


@pytest.fixture(scope="module")
def site() -> Path:
    """The built site; EMERGENCY_KIT_SITE names one that is there, so that a browser can look at what `make docs` has built."""
    if named := os.environ.get("EMERGENCY_KIT_SITE"):
        return Path(named)
    if importlib.util.find_spec("material") is None:
        pytest.skip("MkDocs is not installed; make docs does it")
    subprocess.run([sys.executable, "docs/site/stage.py", "outputs/docs"], check=True)
    done = subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict"], capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})
    assert done.returncode == 0, done.stderr
    return Path("outputs/site")


def test_lists_are_spaced_for_the_site_and_code_is_not(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("stage", "docs/site/stage.py")
    stage = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stage)
    given = "text\n- one\n  goes on\n  - inner\n\n  | a |\n\nafter\n```bash\n- no list\n  in code\n```\n1. first\n   more\n"
    assert stage.respace(given) == "text\n\n- one\n    goes on\n    - inner\n\n    | a |\n\nafter\n```bash\n- no list\n  in code\n```\n\n1. first\n    more\n"


def test_lists_are_lists_on_the_site(site: Path) -> None:
    for page in site.rglob("*.html"):
        shown = re.sub(r"<pre.*?</pre>|<script.*?</script>", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        assert not (found := re.search(r"^(?:<p>)?(?:- |\d+\. |\| )\S.*", shown, re.MULTILINE)), f"{page}: {found[0][:120]}"


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 15
    for page in pages:
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe|source|video|audio|embed)\b[^>]*?\bsrc=[\"']?([^\"'\s>]+)", text) + re.findall(r"<link\b[^>]*?\bhref=[\"']?([^\"'\s>]+)", text)
        assert not [address for address in loaded if re.match(r"(?:https?:)?//", address)], page
    for style in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(?:https?:)?//|@import", style.read_text(encoding="utf-8")), style


def test_the_site_is_read_and_searched_from_files_without_a_network(site: Path) -> None:
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("chromium is not installed; tests/install_browser.sh does it")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        asked: list[str] = []
        for width in (390, 1280):
            page = browser.new_context(viewport={"width": width, "height": 844}, offline=True).new_page()
            page.on("request", lambda request: asked.append(request.url))
            for name in ("index.html", "docs/Training.html", "docs/Troubleshooting.html", "docs/Configuration.html", "benchmarks/RESULTS.html"):
                page.goto((site / name).resolve().as_uri())
                assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{name} is wider than {width}"
        page.locator("input[name=query]").click()
        page.keyboard.type("unfinished run of model", delay=20)
        page.wait_for_selector(".md-search-result__item")
        assert any(text.startswith("Troubleshooting") for text in page.locator(".md-search-result__item").all_inner_texts())
        browser.close()
    assert asked and not [address for address in asked if not address.startswith(("file:", "data:"))]

"""Lay out what the site is built from: every page of the repository, and each file that one of them links to, at its own path.

MkDocs wants all pages below one folder, while README.md, docs/ and benchmarks/RESULTS.md link to each other, and to recipes and sources, as they
lie in the repository. Its Markdown begins a list only after an empty line, and what belongs to an item is indented by four spaces; GitHub's asks for neither, so
the copies get both. In: the repository. Out: a copy of those files alone. Limits: a link to a folder has no page, so the build names it.
Run: `make docs`.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

PAGES = ("*.md", "docs/**/*.md", "benchmarks/*.md")
BESIDE = ("docs/images/*", "docs/site/*.js", "docs/site/*.css")
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")

ITEM = re.compile(r" *(?:[-*]|\d+\.) ")


def respace(text: str) -> str:
    """The same page with its lists spaced for Python-Markdown; code is left alone, but for its indent where it belongs to an item."""
    lines: list[str] = []
    fence, listed, before = "", False, ""
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        item = not fence and ITEM.match(line)
        if not fence and before == "" and line and not indent and not item:
            listed = False
        if item and not listed and before:
            lines.append("")
        if item:
            listed = True
        # Two or three spaces are one level in GitHub's, four in this one.
        shift = (indent + 2) // 3 * 4 - indent if listed and indent and not fence else len(fence) - len(fence.lstrip()) if fence else 0
        if not fence and line.lstrip().startswith("```"):
            fence = " " * shift + "```"
            line = re.sub(r"(```\w+) .*", r"\1", line)  # of "text recorded" it knows the first word alone
        elif fence and line.strip() == "```":
            fence = ""
        lines.append(" " * shift + line if line else line)
        before = line
    return "\n".join(lines) + "\n"


def stage(out: Path) -> None:
    """Make the folder anew."""
    shutil.rmtree(out, ignore_errors=True)
    pages = [page for pattern in PAGES for page in sorted(Path().glob(pattern))]
    linked = {Path(page.parent, target) for page in pages for target in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in target}
    for path in [*pages, *(path for pattern in BESIDE for path in Path().glob(pattern)), *linked]:
        if path.is_file():
            inside = path.resolve().relative_to(Path().resolve())
            (out / inside).parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".md":
                (out / inside).write_text(respace(path.read_text(encoding="utf-8")), encoding="utf-8")
            else:
                shutil.copyfile(path, out / inside)


if __name__ == "__main__":
    stage(Path(sys.argv[1]))

"""Lay out what the site is built from: every page of the repository, and each file that one of them links to, at its own path.

MkDocs wants all pages below one folder, while README.md, docs/ and benchmarks/RESULTS.md link to each other, and to recipes and sources, as they
lie in the repository. In: the repository. Out: a copy of those files alone. Limits: a link to a folder has no page, so the build names it.
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


def stage(out: Path) -> None:
    """Make the folder anew."""
    shutil.rmtree(out, ignore_errors=True)
    pages = [page for pattern in PAGES for page in sorted(Path().glob(pattern))]
    linked = {Path(page.parent, target) for page in pages for target in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in target}
    for path in [*pages, *(path for pattern in BESIDE for path in Path().glob(pattern)), *linked]:
        if path.is_file():
            inside = path.resolve().relative_to(Path().resolve())
            (out / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, out / inside)


if __name__ == "__main__":
    stage(Path(sys.argv[1]))

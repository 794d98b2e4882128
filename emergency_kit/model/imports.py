"""Transformers imported in less time: it reads the 2,500 files of its models for their names twice, once as a folder and once as a package.

In: nothing. Out: the package, imported, whose second reading takes what the first found (0.4 of 7 seconds from the command to the first step,
benchmarks/RESULTS.md). Where a release has these functions under other names, it is imported as it is.
"""

from __future__ import annotations

from pathlib import Path


def import_transformers() -> None:
    """Import transformers; call it before anything that does."""
    import transformers
    from transformers.utils import import_utils

    read = getattr(import_utils, "create_import_structure_from_path", None)
    if read is None or not hasattr(read, "cache_info"):
        return
    models = Path(transformers.__file__).parent / "models"

    def read_once(path: str | Path) -> object:
        return read(models if Path(path) == models / "__init__.py" else path)

    import_utils.create_import_structure_from_path = read_once

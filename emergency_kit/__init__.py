"""AI Emergency Kit: turn a base language model into an offline assistant for emergencies.

The way of the data: knowledge cards -> dataset -> tokens -> adapter -> merged model -> GGUF. The names below are the Python API (`api.py`,
docs/Python.md); they are loaded when they are first asked for, so that `import emergency_kit` stays quick.
"""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from emergency_kit.api import (
        Answer, Assistant, build_data, check_kit, evaluate, export_gguf, find_runs, gate, infer, inspect_data, load_config, merge, pack_kit, plan, setup, sweep, train,
        upload_gguf, upload_hf, verify)

__version__ = "0.1.0"
__all__ = ["Answer", "Assistant", "build_data", "check_kit", "evaluate", "export_gguf", "find_runs", "gate", "infer", "inspect_data", "load_config", "merge",
           "pack_kit", "plan", "setup", "sweep", "train", "upload_gguf", "upload_hf", "verify"]

# Before torch or llama.cpp is loaded: how long their OpenMP threads spin before they sleep, some 0.1 ms. Not at all, and every
# small operation waits for a thread to wake; much longer, and beside one other busy process on two cores generation
# falls to a tenth (benchmarks/RESULTS.md).
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
# How many 16-bit products of a CPU are kept compiled, by torch (most of a megabyte each, with what surrounds them) and by oneDNN under it. Training has hundreds
# of shapes; with their own 1,024 of each its memory grew for eighty steps, and it was no faster (benchmarks/RESULTS.md).
os.environ.setdefault("LRU_CACHE_CAPACITY", "64")
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
# No download is meant to happen unseen, and tokenizers' thread pool gains nothing on batches this small.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'emergency_kit' has no attribute {name!r}")
    from emergency_kit import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

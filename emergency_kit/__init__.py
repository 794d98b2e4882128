"""AI Emergency Kit: turn a base language model into an offline assistant for emergencies.

The way of the data: knowledge cards -> dataset -> tokens -> adapter -> merged model -> GGUF.
"""

import os

__version__ = "0.1.0"

# Before torch or llama.cpp is loaded: their OpenMP threads otherwise spin while they wait, and beside
# one other busy process on two cores generation then falls to a tenth (benchmarks/RESULTS.md).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# No download is meant to happen unseen, and tokenizers' thread pool gains nothing on batches this small.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

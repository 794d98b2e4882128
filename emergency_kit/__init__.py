"""AI Emergency Kit: turn a base language model into an offline assistant for emergencies.

The way of the data: knowledge cards -> dataset -> tokens -> adapter -> merged model -> GGUF.
"""

import os

__version__ = "0.1.0"

# Before torch or llama.cpp is loaded: how long their OpenMP threads spin before they sleep, some 0.1 ms. Not at all, and every
# small operation waits for a thread to wake; much longer, and beside one other busy process on two cores generation
# falls to a tenth (benchmarks/RESULTS.md).
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
# No download is meant to happen unseen, and tokenizers' thread pool gains nothing on batches this small.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

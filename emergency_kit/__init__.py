"""AI Emergency Kit: turn a base language model into an offline assistant for emergencies.

The way of the data: knowledge cards -> dataset -> tokens -> adapter -> merged model -> GGUF.
"""

__version__ = "0.1.0"

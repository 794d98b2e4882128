"""Inference: answers from a loaded model, one streamed to a person or many in batches."""

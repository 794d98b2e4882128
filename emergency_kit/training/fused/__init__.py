"""A whole optimizer step of LoRA training, forward and backward by hand, with nothing computed twice."""

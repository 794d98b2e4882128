"""Training: LoRA adapters through the Transformers Trainer, with exact loss, checkpoints and resume."""

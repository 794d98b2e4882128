"""Model: the base model, in whichever precision and on whichever device, with or without adapters."""

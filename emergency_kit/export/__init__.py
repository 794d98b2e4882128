"""Export: from an adapter to files that run without this package.

`merge` folds a LoRA adapter into its base model and proves that no answer changed; `gguf` writes
llama.cpp's file format in the types of `quantize` and proves each file in llama.cpp itself.
Both always work on the CPU in float32, whatever the model was trained on.
"""

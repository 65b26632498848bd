"""The files of a checkpoint: folder, recipe, manifest, tokenizer, LoRA files."""

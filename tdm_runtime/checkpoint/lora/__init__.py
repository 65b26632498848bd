"""LoRA files of every common style, and how they are merged into a base."""

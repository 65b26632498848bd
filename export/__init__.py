"""Checkpoint -> ONNX -> what each backend runs, with measured parity and a manifest."""

"""Export of a checkpoint to ONNX and to the programs of each backend, with measured parity and a manifest."""

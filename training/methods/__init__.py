"""Distillation methods, one file each: pure functions from a part of a batch to a loss."""

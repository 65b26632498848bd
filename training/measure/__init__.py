"""Metrics of samples, and scorers that load their weights from disk."""

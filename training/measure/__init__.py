"""Metrics of samples, and scorers with weights from disk."""

"""Scores, grids and the ablation of the embedded model."""

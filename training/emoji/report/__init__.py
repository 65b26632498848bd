"""Scores, grids and ablations of the embedded model."""

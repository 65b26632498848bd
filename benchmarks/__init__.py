"""Measurements of a running server, over the wire only."""

"""Glyphs, captions and scenes of the embedded model."""

"""The embedded text-to-video model: moving emoji."""

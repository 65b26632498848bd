"""From a checkpoint to a picture, in 1 to 4 deterministic steps."""

"""A checkpoint in memory: its components, what runs them, LoRAs."""

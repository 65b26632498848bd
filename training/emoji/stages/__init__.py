"""The stages that make the embedded checkpoint, in order."""

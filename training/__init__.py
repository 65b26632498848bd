"""Teacher, TDM student and the checkpoint that the runtime serves."""

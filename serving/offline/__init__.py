"""`tdm-render`: pictures of a file of prompts, without a server. A run that was killed continues where it stopped."""

"""`tdm-render`: pictures and clips of a file of prompts, without a server. A killed run continues where it stopped."""

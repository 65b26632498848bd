"""The training loop, processes and plots."""

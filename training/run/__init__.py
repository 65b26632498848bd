"""The training loop, distillation and fine-tuning runs, processes and plots."""

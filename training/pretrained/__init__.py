"""Distillation of a pretrained model in a diffusers folder."""

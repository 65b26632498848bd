"""Noise, noise schedules, step tables and the update of a step."""

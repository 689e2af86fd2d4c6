"""Measurements behind README's figures: each script appends JSON lines to `results/`."""

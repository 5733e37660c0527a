"""Watching a run: clocks, figures, console, W&B."""

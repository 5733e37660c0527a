"""The commands of `python -m semi_fast`."""

"""Measurements whose results are committed, each with the command that repeats it."""

"""Reasons to end a run: metrics, time, signals, NaNs."""

"""Checkpoints of a run, kept in a folder."""

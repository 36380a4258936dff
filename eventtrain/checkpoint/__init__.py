"""Checkpoints: their content, and reading and writing them safely."""

"""Tests of callbacks/checkpointing."""

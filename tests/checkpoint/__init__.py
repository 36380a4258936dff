"""Tests of eventtrain/checkpoint."""

"""Tests of eventtrain/core."""

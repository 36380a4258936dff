"""Tests of eventtrain/run."""

"""Tests of eventtrain/data."""

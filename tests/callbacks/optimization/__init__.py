"""Tests of callbacks/optimization."""

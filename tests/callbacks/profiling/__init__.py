"""Tests of callbacks/profiling."""

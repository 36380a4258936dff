"""Tests of eventtrain's metrics."""

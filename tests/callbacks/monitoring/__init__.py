"""Tests of callbacks/monitoring."""

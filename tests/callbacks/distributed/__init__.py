"""Tests of callbacks/distributed."""

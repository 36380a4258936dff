"""Tests of callbacks/stopping."""

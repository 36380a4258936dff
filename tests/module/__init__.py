"""Tests of eventtrain/module."""

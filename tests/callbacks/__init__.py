"""Tests of the callbacks, in their rooms."""

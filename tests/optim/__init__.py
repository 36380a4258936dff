"""Tests of eventtrain/optim."""

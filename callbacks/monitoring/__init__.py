"""Callbacks that log or show rates, norms, system load, progress, and the layers of a module."""

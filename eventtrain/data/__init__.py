"""Batches: limits, devices, and loaders that can be resumed."""

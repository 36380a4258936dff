"""Metrics written to files: TensorBoard and JSON lines."""

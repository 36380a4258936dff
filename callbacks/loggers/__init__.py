"""Callbacks that write metrics to files: TensorBoard and JSON lines."""

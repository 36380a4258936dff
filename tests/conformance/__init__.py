"""The same module under Lightning and under eventtrain."""

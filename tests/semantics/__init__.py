"""The rules of the optimization semantics, one file for each letter."""

"""The forms that configure_optimizers may return."""

"""Values to log and to look at: rates, norms, the system, progress."""

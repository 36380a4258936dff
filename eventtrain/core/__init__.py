"""One optimization step: signals, closure, optimizer, and the loops that publish."""

"""Time: by phase and callback, by operator, and event by event."""

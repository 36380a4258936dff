"""Policies of the optimization step: accumulation, clipping, schedules, precision, averaging."""

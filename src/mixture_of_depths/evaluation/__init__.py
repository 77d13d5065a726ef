"""Judging a model: held-out loss under both routings, calibration of what enters, and tasks of a harness."""

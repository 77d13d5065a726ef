"""Sampling: the decode step, the choice of a token, streams of tokens and texts, 8-bit weights, and speed."""

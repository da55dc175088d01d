"""Benchmarks: each prints a ratio against a baseline that ran beside it, in turns, in the same process."""

"""Benchmarks: a module for each `python -m benchmarks.<name>`, and the modules that they share.

`make bench` runs all of them; see `__main__`. They measure alternatives in turns, so that a machine that slows down
slows both, and print ratios with their spread. The service imports nothing from here.

Shared modules: `candidates` (what is compared by characters/s), `baselines` and `peers` (what the service is compared
with), `pairs` (measuring in turns), `table` (printing), `sweep` (the kernel over sizes), `hole` (a network that drops
packets), `faults` (what is done to a deployment), `history` (checks what clients were answered).
"""

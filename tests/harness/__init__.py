"""What tests and benchmarks share: real processes, a browser, a clock, and small models.

It imports `service` and other libraries, never a test, a conftest or a benchmark: tests/test_layers.py checks that.
"""

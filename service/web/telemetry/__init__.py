"""What the service reports of itself: `metrics` counts answers and times the events of streams, `collector` reads the
metrics of the other packages, `tracing` exports spans, `logs` configures logging.
"""

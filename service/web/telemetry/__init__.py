"""What the service reports of itself: `metrics` counts answers, `collector` reads the metrics of the other packages,
`logs` configures logging.
"""

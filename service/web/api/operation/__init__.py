"""Health, the version, metrics and reloading: for supervisors, balancers, Prometheus and operators."""

"""/healthz, /readyz, /metrics and /admin/reload: for supervisors, balancers, Prometheus and operators."""

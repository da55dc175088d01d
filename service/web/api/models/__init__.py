"""/v1/models: the versions in the model store."""

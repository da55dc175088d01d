"""The model store: published model versions in a directory, found by name, number or alias.

A version appears whole or not at all and never changes, so readers need no lock, and any number of processes may read
and publish at the same time.

This package may not start threads, keep versions in memory or compute with a model. It knows nothing of HTTP.
"""

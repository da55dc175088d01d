"""The model store: published model versions in a directory, found by name, number or alias.

A version appears whole or not at all and never changes, so readers need no lock, and any number of processes may read
and publish at the same time.

May not: start threads, keep versions in memory, compute with a model, or know HTTP.
"""

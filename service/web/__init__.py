"""HTTP: parses, calls, replies.

May not: compute, keep state between requests, read the environment (only `create_app` and the server read settings).
"""

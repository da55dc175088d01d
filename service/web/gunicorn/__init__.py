"""The gunicorn process.

`server` configures it, `worker` is its worker class, and `connection` reads requests from sockets.
"""

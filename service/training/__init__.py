"""Text -> trained model -> published version.

May not: serve, know of HTTP or sessions, read the environment. Nothing here is imported by the running service.
"""

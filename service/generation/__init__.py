"""Between HTTP and the engine: from prompts to their continuations, and from sessions to theirs.

May not: know of HTTP.
"""

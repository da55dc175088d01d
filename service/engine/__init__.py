"""How a next character is drawn, and when a text is at its end.

May not: know of HTTP, sessions, the model store or a clock.
"""

"""Scoring candidates, and suggesting the likeliest texts, after a prompt or a session's text."""

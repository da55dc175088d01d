"""Tests of the page in a real browser: they do what a user does and check what the screen shows."""

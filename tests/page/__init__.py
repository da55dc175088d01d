"""The page in a real browser: what a user does, and what the screen shows."""

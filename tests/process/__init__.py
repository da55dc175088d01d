"""Tests that start the real server, alone, behind HAProxy, or with Redis."""

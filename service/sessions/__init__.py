"""Texts that stay open: what is known of each, by its id, and where it is kept.

May not: know of HTTP, step a network, import torch.
"""

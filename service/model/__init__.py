"""What a GRU character model is: its characters, its network, its files.

May not: start threads, read a clock, know of HTTP, sessions, the model store's layout or training.
"""

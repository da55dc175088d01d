"""gru-serve: a REST service that generates text with a GRU character model.

A token is a character. Every character is turned, with the hidden state before it, into one new hidden state: that is
the whole network, and everything here is about doing it correctly, quickly and for many texts at once.
"""

__version__ = "0.1.0"

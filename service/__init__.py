"""gru-serve: a REST service that generates text with a GRU character model.

A token is a character. For each character the network turns the hidden state into the next one; that one small vector
is all it remembers of a text. The packages here compute it exactly, for many texts at once, and serve it over HTTP.
"""

__version__ = "0.1.0"

"""POST /v1/inspect: the hidden states of the network while it reads a text."""

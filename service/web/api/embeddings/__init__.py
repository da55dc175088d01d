"""POST /v1/embeddings: a vector for each text, in OpenAI's shape."""

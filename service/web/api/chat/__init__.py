"""POST /v1/chat/completions: continues a chat, which a version's template writes as one text."""

"""POST /v1/completions: continues prompts, in OpenAI's shape."""

"""/tokenize, /detokenize, /tokenizer_info and the files of a model's tokenizer: for clients that count in tokens."""

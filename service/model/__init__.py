"""What a GRU character model is: its charset, its network in float32 and in integers, and the files of one version.

- `charset`: characters <-> ids, and what happens to characters that a model doesn't know.
- `hugging_face`: the charset as a tokenizer of Hugging Face's libraries.
- `config`: the sizes of a model, which determine the names and shapes of its weights.
- `artifact`, `manifest`: read and write the files of a version. Nothing in these files is ever executed.
- `gru`, `folded`: the network in torch, float32. `gru` is the reference; `folded` reads one text faster.
- `quantize`: the integers, scales and tables that the engine computes with.

This package may not start threads, read a clock or import the other packages. It knows nothing of HTTP, sessions,
training, or the directories of a model store.
"""

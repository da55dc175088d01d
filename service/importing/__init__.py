"""Foreign checkpoints -> a model: reads what Keras, TensorFlow, PyTorch and ONNX have written.

- `detection`: finds out what a file is, and calls its reader.
- `keras_files`, `tensorflow_files`, `torch_files`, `onnx_files`: one reader for each family. All return a ForeignModel.
- `tensorflow_graph`: which layers the functions of a SavedModel apply, in which order. `tensorflow_values` follows a
  value to what makes it, `tensorflow_steps` compares a step of a loop with a GRU's, and `tensorflow_functions` reads
  the functions.
- `hdf5`, `hdf5_process`, `protobuf`, `tensor_bundle`, `restricted_pickle`, `archive`: the containers that they read.
- `keras_roles`, `torch_roles`: find embedding, GRU layers and output layer among named arrays by shape and kind.
- `foreign`: a ForeignModel, and in which order its layers compute.
- `vocabulary`: which character each row of the embedding is.
- `float_loss`: the loss of a model in float32, in numpy.
- `conversion`: a ForeignModel and its characters -> the config and weights of this project.
- `publication`: measures the weights, writes the model card and publishes.

A file is hostile until it has been read. Nothing in it is executed: neither pickles nor graphs nor code of layers.
Every declared size is compared with the size of the file before memory is allocated for it. Neither torch nor
TensorFlow is needed. A model that computes another function than ours is refused by name.

This package may not start threads or import the engine or training. It knows nothing of HTTP.
"""

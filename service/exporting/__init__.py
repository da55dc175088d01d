"""A model of this project -> a file of PyTorch, ONNX or Keras, which computes the same function there.

Each format is written without its library: `torch_format`, `onnx_format`, `keras_format`. The charset is in each file,
where `service.importing` finds it, so importing what was exported gives the same digest.

This package may not start threads or import the engine, training or the store. It knows nothing of HTTP.
"""

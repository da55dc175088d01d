"""Trains a model on a text and publishes it as a version in the model store.

`corpus` reads the text, `Trainer` trains and writes checkpoints, `Publication` rehearses publishing, measures the best
weights and publishes them with a model card. The result depends only on the corpus, the hyperparameters (which include
the seed and the number of threads), the version that the run begins with, the device and the torch build.

This package may import `model` and `store`. It may not serve requests or read the environment, and knows nothing of
HTTP, sessions or the engine. The running service imports nothing from here.
"""

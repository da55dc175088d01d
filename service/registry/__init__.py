"""The registry: model versions in memory, each with an engine, and which version a model's name stands for right now.

A request names a model (`shakespeare`, `shakespeare@stable`, `shakespeare@3`). `LoadedModels.get` loads that
version once and shares it among all requests. Above a limit it evicts the least recently used version.
`VersionResolver` remembers which version each name was resolved to, and switches a name to a newer version only after
that one is loaded, so no request waits for a new version.

This package may not write to the model store or read a clock or the settings. It knows nothing of HTTP or sessions.
"""

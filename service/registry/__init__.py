"""The registry: model versions in memory, each with an engine, and which version a model's name stands for right now.

A request names a model (`shakespeare`, `shakespeare@stable`, `shakespeare@3`). `LoadedModels.get` loads the version
that this means, once, and shares it among all requests; it evicts the least recently used version above a limit.
`VersionResolver` remembers which version each name was resolved to, and switches a name to a newer version only after
that one is loaded, so no request waits for a new version.

May not: know HTTP, sessions, the clock or the settings, or write to the model store.
"""

"""The same model in other libraries, each in an environment of its own.

The workers, and `weights`, are executed there: they may import no torch and nothing of `service`.
"""

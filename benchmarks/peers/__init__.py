"""The same model in other libraries, which run in processes and virtual environments of their own.

`onnxruntime_worker`, `tensorflow_worker`, `worker` and `weights` run in these environments. They may import neither
torch nor anything of `service`, because neither is installed there.
"""

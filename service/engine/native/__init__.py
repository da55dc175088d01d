"""The stepper in C++. It gives the same bits as the torch stepper. It needs no torch, and runs without the
interpreter's lock.

`src/kernel.cpp` is compiled when the package is installed. If that failed, `not_compiled.txt` has the reason, there are
no variants, and the engine uses the torch stepper.
"""

"""The stepper in C++. It gives the same bits as the torch stepper. It needs no torch, and runs without the
interpreter's lock.

`src/kernel.cpp` is compiled when the package is installed. If there was no compiler, there are no variants, and
the engine uses the torch stepper.
"""

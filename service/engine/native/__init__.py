"""The stepper in C++: the same bits as the torch one, without torch, and without the interpreter's lock.

`src/kernel.cpp` is compiled when the package is installed; where that was not possible there are no variants, and the
torch stepper serves.
"""

"""The stepper in C++. It gives the same bits as the torch stepper, without torch and without the interpreter's lock.

`src/kernel.cpp` is compiled when the package is installed. If that was not possible there are no variants, and the
torch stepper is used.
"""

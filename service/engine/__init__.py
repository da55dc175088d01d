"""Advances many texts of one model together, a few characters at a time, on one thread.

A thread of another package submits a `Request` to an `Engine` and gets a `Handle`, from which it reads characters
while the text is running. The engine's thread repeats one round, the tick. In each tick it chooses the texts of the
batch (`scheduler`), advances each of them by a few characters (`stepper`, implemented with torch in `torch_stepper` and
in C++ in `native`), and hands the new characters over to the handles. Forms of text and stop strings are an `automaton`
that a text carries. Texts that are only read, and short, need neither thread nor handle (`short_text`, `at_once`).

Each text gets the same characters, to the bit, as if it were computed alone. The other texts in the batch, the length
of a tick, the number of threads, the processor and the choice of stepper change nothing.

This package knows nothing of HTTP, sessions, the model store or settings. The engine's thread may not do I/O or wait
for a client.
"""

"""Advances many texts of one model together, a few characters at a time, on one thread.

A thread of another package submits a `Request` to an `Engine` and gets a `Handle`, from which it reads characters
while the text is running. The engine's thread repeats one tick: schedule, run, publish. It chooses the texts of the
batch (`scheduler`), advances each by a few characters (`stepper`, implemented with torch in `torch_stepper` and in C++
in `native`), and publishes the new characters to the handles.

Each text gets exactly what it would get alone, to the bit: its batch, the length of ticks, threads, processor and
stepper change nothing.

May not: know of HTTP, sessions, the model store or settings; do I/O or wait for a client on the engine's thread.
"""

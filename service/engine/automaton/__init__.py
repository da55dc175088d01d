"""Automata over the characters of a model: which character may come next, and where a text ends.

A row of the engine carries an `Automaton` and its state. Forms of text (choices, regular expressions, JSON) and stop
strings are compiled into the same tables, so steppers know only tables.
"""

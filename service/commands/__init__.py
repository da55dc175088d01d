"""One module a command of `gru-serve`. What is heavy to import is imported when the command runs."""

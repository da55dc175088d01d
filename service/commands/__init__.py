"""The commands of `gru-serve`, one module for each.

A command parses its options, calls the other packages and prints results. It may import every package except `client`
and `sessions`. One that computes with a served model opens the service (`options.open_service`). Nothing but
`service.__main__` imports a command. Results go to standard output, progress and errors to standard error. Heavy
libraries are imported inside the commands that use them, so that the others start quickly and run without torch.
"""

"""The gunicorn process: from a socket to the application and back.

`server` configures it and listens. `worker` is its worker class: it drains, and lets `threads` answer requests.
`poller` owns every connection that no thread is answering (`connection`): it accepts them, reads requests
(`request_reader`) and waits for clients to close, with a limit on everything that clients may take without a thread.
"""

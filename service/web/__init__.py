"""The HTTP interface: Flask routes, and the gunicorn process that serves them.

This package validates requests, calls `generation` and `registry`, and writes their results as JSON or as server-sent
events. It may not compute anything about texts or models, and it may not read the environment: only `app` and `server`
get the settings. Between requests it holds nothing about texts. It holds what HTTP needs: open connections,
the number of admitted requests and streams, request rates, metrics, and whether the process is draining.

How a request passes through, and the modules that do it:

1. `gunicorn.poller` reads it from its connection, head and body, within a deadline. `gunicorn.worker`, a gunicorn
   worker class, gives it a thread. `gunicorn.server` configures gunicorn.
2. `gate.guard` gives it an id, and refuses new work while the process drains (`gate.drain`).
3. `gate.access` checks its API key, unless the route is open to everyone.
4. `gate.rate_limit` refuses it if its client starts too many requests in a given time.
5. `gate.guard` takes the body, which has arrived, and parses it as JSON. Then flask_openapi validates body, path and
   query against the schemas in `api`.
6. The route in `api` calls the service. `gate.admission` limits how many requests may wait for an engine at the same
   time. The route builds the answer; `api.sse` frames the events of a stream.
7. `gate.error_responses` turns any exception into an error answer. `telemetry.metrics` counts the answer, and
   `gate.guard` adds headers and writes the log line.

`app` builds the application from all parts.
"""

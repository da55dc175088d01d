"""The HTTP interface: Flask routes, and the gunicorn process that serves them.

This package validates requests, calls `generation` and `registry`, and writes their results as JSON or as server-sent
events. It may not compute anything about texts or models, and it may not read the environment: only `app` and `server`
get the settings. Between requests it holds nothing about texts. It holds what HTTP needs: open connections,
the number of admitted requests and streams, request rates, metrics, and whether the process is draining.

How a request passes through, and the modules that do it:

1. `connection` reads it from the socket, within a deadline. `worker`, a gunicorn worker class, gives it a thread.
   `server` configures gunicorn, and `drain` decides when a process that shuts down stops waiting for requests.
2. `guard` gives it an id, and refuses new work while the process drains.
3. `access` checks its API key, unless the route is open to everyone.
4. `rate_limit` refuses it if its client starts too many requests in a given time.
5. `guard` reads the body and parses it as JSON. Then flask_openapi validates body, path and query against `schemas`,
   `session_schemas` or `inspect_schemas`, which are also the source of /openapi.json.
6. The route calls the service: `completion_routes`, `session_routes`, `inspect_routes`, `model_routes`,
   `health_routes`, `admin_routes`. `admission` limits how many requests may wait for an engine at the same time.
   `SamplingBody` turns its sampling fields into the engine's settings.
7. `completion_answer` and `session_answer` build the answer. `sse` frames the events of a stream, sends pings and
   notices when the client disconnects.
8. `error_responses` turns any exception into an error answer. `metrics` counts the answer, and `guard` adds headers and
   writes the log line.

`app` builds the application from all parts. `collector` reads the metrics of the other packages, `logs` configures
logging, and `pages` serves the page at / and the API documentation.
"""

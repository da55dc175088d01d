"""The HTTP interface: routes, what a request passes before them, and the gunicorn process that serves them.

This package validates requests, calls `generation` and `registry`, and writes their results as JSON or as server-sent
events. It may not compute anything about texts or models, and it may not read the environment: only `app` and
`gunicorn.server` get the settings. Between requests it holds nothing about texts. It holds what HTTP needs: open
connections, the number of admitted requests and streams, request rates, metrics, and whether the process is draining.

Its rooms: `gunicorn` (the process), `gate` (who may call a route, how often, how many at a time; errors), `api` (the
routes, one folder for each resource) and `telemetry` (metrics and logs). `app` puts them around a `Service`. `api` and
`telemetry` import `gate`, `telemetry` imports the events of `api`, and nothing else crosses a wall.

How a request passes through, and the modules that do it:

1. `gunicorn.poller` reads it from its connection, head and body, within a deadline. `gunicorn.worker`, a gunicorn
   worker class, gives it a thread. `gunicorn.server` configures gunicorn.
2. Flask finds the route. What the route is (`gate.route.Route`: open, starts work, counts as a start, streams, is a
   check) is declared where it is defined, and every step before and after it reads that declaration. A step that knows
   a path is a mistake, which a test finds.
3. `gate.proxies` replaces a trusted proxy's address by the client's. `gate.guard` gives the request an id, and refuses
   work that would start while the process drains (`gate.drain`). `gate.origins` refuses names that are not the server's
   and web pages of other sites.
4. `gate.access` checks its API key, unless the route is open.
5. `gate.rate_limit` counts a start, and refuses it if its client starts too much in a given time.
6. `gate.guard` takes the body, which has arrived, and parses it as JSON. Then flask_openapi validates body, path and
   query against the schemas of the resource.
7. The view in `api` calls the service. Inside the block `gate.admission.AdmissionLimit.admit` it counts among the
   requests that wait for an engine. The view returns JSON, or an `api.sse.EventStream`, which takes over what the block
   holds and releases it once, when the stream ends.
8. `gate.error_responses` turns any exception into an error answer. `telemetry.metrics` counts the answer and times the
   events of a stream (`api.events`), which are values until `api.sse` frames them last. `gate.guard` adds headers and
   writes the log line.
"""

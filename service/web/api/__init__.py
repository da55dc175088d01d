"""The routes, by resource: what each accepts (`schemas`), what it calls, and the answer it builds.

`completion_routes`, `session_routes`, `inspect_routes`, `model_routes`, `health_routes` and `admin_routes` call the
service. The bodies, paths and queries they accept are declared in `schemas`, `session_schemas` and `inspect_schemas`,
which are also the source of /openapi.json. `completion_answer` and `session_answer` build the answers, `sse` frames the
events of a stream, sends pings and notices when the client disconnects. `pages` serves the page at / and the API
documentation.
"""

"""The routes: a folder for each resource, with its `routes`, its `schemas` and, if it takes more code, its `answer`.

A `Resource` is a class whose methods are the views. A method's decorator, `gate.route.Route`, declares its method, its
path and what it is. The annotations of the method's parameters are the schemas of path, query and body, from which
validation and /openapi.json are generated. `schemas` has what several resources share, `events` the events of streams
as values, `sse` frames them, sends pings and notices when the client disconnects. `pages` serves the page at / and the
API documentation.
"""

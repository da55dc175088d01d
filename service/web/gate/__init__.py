"""What a request passes before its route is called: who may call it, how often, how many at a time; and its errors.

`route` says what a route is; the others read it from the request, and none knows a path. `guard` gives a request its
id, refuses new work while the process drains (`drain`), reads the body and parses it as JSON, and adds headers and the
log line to the answer. `access` checks the API key. `rate_limit` limits how many requests a client starts in a given
time, `admission` how many may wait for an engine at the same time. `error_responses` turns any exception into an error
answer.

`paths` gives each route one path. `origins` refuses names that are not the server's and web pages of other sites.
`proxies` finds out which client a request is from.
"""

"""The tests. A folder has the tests of the package of `service` that it is named after.

- `process`: tests that start the real server, alone, behind HAProxy, or with Redis.
- `page`: tests of the web page in a real browser.
- `deploy`: the files for deployment, and the image and the compose file in real containers.
- `harness`: what tests and benchmarks share. Tests import it, and never another test or a conftest.
- At the top: tests of single modules (`test_settings`, `test_api_keys`) and of the repository (`test_layers`,
  `test_docs`).
"""

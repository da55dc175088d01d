"""The directions of imports, in `service`, the tests and the benchmarks. Imports inside functions count too."""

from __future__ import annotations

import ast
from collections import defaultdict
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import service

ROOT = Path(service.__file__).parent
REPOSITORY = ROOT.parent

# What each package or top-level module of `service` may import, besides itself, `errors`, `arrays` and `shares`.
ALLOWED = {
    "__main__": {"commands", "__init__"},
    "assembly": {"engine", "generation", "model", "periodic", "registry", "sessions", "settings", "store"},
    "commands": {
        "api_keys",
        "assembly",
        "cores",
        "engine",
        "exporting",
        "generation",
        "importing",
        "installation",
        "model",
        "registry",
        "settings",
        "store",
        "training",
        "web",
    },
    "web": {"api_keys", "engine", "generation", "model", "registry", "store", "__init__"},
    "generation": {"engine", "model", "periodic", "registry", "sessions"},
    "registry": {"engine", "model", "store"},
    "sessions": {"host_names"},
    "training": {"model", "store", "__init__"},
    "exporting": {"importing", "model", "__init__"},  # the wire format of protocol buffers
    "importing": {"model", "store", "__init__"},
    "store": {"model"},
    "engine": {"installation", "model"},
    "model": set(),
    "api_keys": set(),
    "arrays": set(),
    "client": {"host_names"},
    "errors": set(),
    "host_names": set(),
    "installation": set(),
    "periodic": set(),
    "shares": set(),
    "cores": set(),
    "health": set(),
    "settings": {"cores", "model"},  # for the names of precisions
    "__init__": set(),
}
# Modules that may import more than their package.
EXTRA = {
    "web/app.py": {"assembly", "settings"},
    "web/api/sessions/routes.py": {"sessions"},  # names sessions by their keys
    "web/api/candidates/routes.py": {"sessions"},  # names sessions by their keys
    "web/api/sessions/answer.py": {"sessions"},  # shows a session's record
    "web/telemetry/metrics.py": {"sessions"},  # counts the operations of session stores by their names
    "web/gate/shared_counts.py": {"sessions"},  # counts starts in the session store's Redis
    "web/gunicorn/server.py": {"settings"},
    "web/api/operation/routes.py": {"sessions"},  # checks that the session store can be reached
    "sessions/session.py": {"engine"},  # a run has sampling settings
}
# What each room of `web` may import of the others.
ROOMS = {
    "gate": set[str](),
    "api": {"gate"},
    "telemetry": {"api", "gate"},
    "gunicorn": {"app", "gate", "telemetry"},
    "app": {"api", "gate", "telemetry"},
}
# The packages of `service` that may import a library. Libraries that are not listed may be imported everywhere.
LIBRARIES = {
    "flask": {"web"}, "flask_openapi": {"web"}, "gunicorn": {"web"}, "click": {"__main__", "commands"},
    "pydantic_settings": {"settings"}, "tqdm": {"commands"}, "matplotlib": {"training"}, "redis": {"sessions", "web"},
    "flask_limiter": {"web"}, "prometheus_client": {"web"}, "limits": {"settings", "web"}, "pickle": set[str](),
    "opentelemetry": {"web"},
    "h5py": {"importing", "exporting"},
}  # fmt: skip
# File names that occur in several packages of `service`. Such a pair must play the same role in its packages.
SHARED_NAMES = {
    "__init__.py": "every package has one",
    "routes.py": "the routes of one resource of the API",
    "schemas.py": "what a resource accepts and answers; the one in api is shared by several",
    "answer.py": "builds the answers of one resource",
}


@cache
def modules() -> dict[str, Path]:
    """Return the files of `service`, `tests` and `benchmarks` by the full names of their modules."""
    found = [path for name in ("service", "tests", "benchmarks") for path in sorted((REPOSITORY / name).rglob("*.py"))]
    # Benchmarks install other libraries into hidden folders.
    paths = [path for path in found if "/." not in path.relative_to(REPOSITORY).as_posix()]
    names = [path.relative_to(REPOSITORY).with_suffix("").as_posix().replace("/", ".") for path in paths]
    return {name.removesuffix(".__init__"): path for name, path in zip(names, paths, strict=True)}


@cache
def imports(path: Path) -> frozenset[str]:
    """Return the full names of all modules that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            assert node.module
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                # `from package import name`: the name is a module, or something that the package itself defines.
                found.add(name if name in modules() or node.module == "service" else node.module)
    return frozenset(found)


def part(module: str) -> str:
    """Return the package or top-level module of `service` that a module is in: `web` for `service.web.app`."""
    name = module.split(".")[1] if "." in module else "__init__"
    return name if (ROOT / name).is_dir() or (ROOT / f"{name}.py").exists() else "__init__"


def is_test(module: str) -> bool:
    """Return whether pytest collects the module or loads it as a conftest."""
    name = module.rsplit(".", 1)[-1]
    return module.startswith("tests.") and (name.startswith("test_") or name == "conftest")


def test_parts__are_all_listed() -> None:
    parts = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in ROOT.rglob("*.py")}
    assert parts == set(ALLOWED)


def test_imports__point_one_way() -> None:
    wrong = []
    for path in sorted(ROOT.rglob("*.py")):
        place = path.relative_to(ROOT)
        mine = place.parts[0].removesuffix(".py")
        allowed = ALLOWED[mine] | {mine, "errors", "arrays", "shares"} | EXTRA.get(place.as_posix(), set())
        for module in imports(path):
            if module.split(".")[0] == "service" and part(module) not in allowed:
                wrong.append(f"{place} imports {module}")
    assert not wrong


def test_imports__between_the_rooms_of_web_are_listed() -> None:
    def room(module: str) -> str:
        return module.split(".")[2]

    rooms = {name: path for name, path in modules().items() if name.startswith("service.web.")}
    assert {room(name) for name in rooms} == set(ROOMS)
    wrong = [
        f"{name} imports {module}"
        for name, path in rooms.items()
        for module in imports(path) & rooms.keys()
        if room(module) not in ROOMS[room(name)] | {room(name)}
    ]
    assert not wrong


def test_imports__have_no_cycle() -> None:
    """No module imports itself through others, in `service`, the tests and the benchmarks together.

    That importing a module also runs the `__init__` of its packages doesn't count.
    """
    graph = {name: imports(path) & modules().keys() for name, path in modules().items()}
    assert sum(map(len, graph.values())) > 500
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(f"an import cycle: {' <- '.join(error.args[1])}") from None


def test_imports__of_tests_and_benchmarks_go_to_the_harness() -> None:
    """Tests import neither tests nor conftests; the harness imports neither tests nor benchmarks.

    Benchmarks share with the tests only the harness, and `service` imports none of them.
    """
    wrong = []
    for name, path in modules().items():
        for module in imports(path):
            top, imported = name.split(".")[0], module.split(".")[0]
            in_harness = module.startswith("tests.harness")
            if (
                is_test(module)
                or (top == "service" and imported in ("tests", "benchmarks"))
                or (top == "benchmarks" and imported == "tests" and not in_harness)
                or (name.startswith("tests.harness") and imported in ("tests", "benchmarks") and not in_harness)
            ):
                wrong.append(f"{name} imports {module}")
    assert not wrong


def test_exceptions__are_all_used() -> None:
    """A module that no longer needs more than its package may import loses its exception."""
    unused = [
        f"{place} no longer imports {name}"
        for place, names in EXTRA.items()
        for name in names - {part(module) for module in imports(ROOT / place) if module.split(".")[0] == "service"}
    ]
    assert not unused


def test_libraries__are_imported_only_where_they_are_listed() -> None:
    wrong = []
    for path in sorted(ROOT.rglob("*.py")):
        place = path.relative_to(ROOT)
        for module in imports(path):
            parts = LIBRARIES.get(module.split(".")[0])
            if parts is not None and place.parts[0].removesuffix(".py") not in parts:
                wrong.append(f"{place} imports {module}")
    assert not wrong


def test_module_names__are_shared_only_by_modules_of_the_same_role() -> None:
    places = defaultdict(list)
    for path in sorted(ROOT.rglob("*.py")):
        places[path.name].append(path.relative_to(ROOT).as_posix())
    assert {name: found for name, found in places.items() if len(found) > 1 and name not in SHARED_NAMES} == {}

"""Imports point one way: which packages of the service may import which, and which libraries belong where.

Every module is checked, including imports inside functions. `Package` here means a directory in `service/` or a module
directly in it.
"""

from __future__ import annotations

import ast
from pathlib import Path

import service

ROOT = Path(service.__file__).parent

# What each package may import, besides itself and what everything may import.
ALLOWED = {
    "__main__": {"commands", "__init__"},
    "commands": {"api_keys", "engine", "generation", "model", "registry", "settings", "store", "training", "web"},
    "web": {"api_keys", "engine", "generation", "model", "periodic", "registry", "store", "__init__"},
    "generation": {"engine", "model", "registry", "sessions"},
    "registry": {"engine", "model", "store"},
    "sessions": set(),
    "training": {"model", "store", "__init__"},
    "store": {"model"},
    "engine": {"model"},
    "model": set(),
    "api_keys": set(),
    "arrays": set(),
    "client": set(),
    "errors": set(),
    "periodic": set(),
    "settings": {"model"},  # for the names of precisions
    "__init__": set(),
}
# What everything else may import. `client` doesn't: it must work without the rest of the service.
SHARED = {"errors", "arrays"}
# Modules that may import more than their package.
EXCEPTIONS = {
    "web/app.py": {"settings", "sessions"},  # builds the service
    "web/session_answer.py": {"sessions"},  # shows a session's record
    "web/server.py": {"settings"},  # builds the process around the service
    "web/health_routes.py": {"sessions"},  # checks the session store
    "sessions/session.py": {"engine"},  # stores the sampling settings of a run
}
# The packages that may import a library; libraries that are not listed may be imported anywhere.
LIBRARIES = {
    "flask": {"web"}, "flask_openapi": {"web"}, "gunicorn": {"web"}, "click": {"__main__", "commands"},
    "pydantic_settings": {"settings"}, "tqdm": {"commands"}, "matplotlib": {"training"}, "redis": {"sessions", "web"},
    "flask_limiter": {"web"}, "prometheus_client": {"web"}, "limits": {"settings"}, "pickle": set[str](),
}  # fmt: skip

MODULES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}


def imported_by(module: str) -> set[str]:
    """Return the full names of all modules that a module imports."""
    names = set()
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "service":
            names |= {f"service.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def package_of(path: str) -> str:
    """`web/app.py` -> `web`; `errors.py` -> `errors`."""
    return path.split("/")[0].removesuffix(".py")


def packages_imported_by(module: str) -> set[str]:
    """Return the packages of the service that a module imports. `service` itself is `__init__`."""
    parts = [name.split(".") for name in imported_by(module) if name.split(".")[0] == "service"]
    known = {package_of(path) for path in MODULES}
    return {part[1] if len(part) > 1 and part[1] in known else "__init__" for part in parts}


def test_layers__every_package_has_a_rule() -> None:
    assert {package_of(module) for module in MODULES} == set(ALLOWED)


def test_layers__imports_are_absolute() -> None:
    """The other tests don't resolve relative imports."""
    relative = [
        module
        for module, tree in MODULES.items()
        if any(isinstance(node, ast.ImportFrom) and node.level for node in ast.walk(tree))
    ]
    assert not relative


def test_layers__imports_point_one_way() -> None:
    wrong = []
    for module in MODULES:
        package = package_of(module)
        allowed = ALLOWED[package] | {package} | EXCEPTIONS.get(module, set())
        if package != "client":
            allowed |= SHARED
        wrong += [f"{module} imports {name}" for name in packages_imported_by(module) - allowed]
    assert not wrong


def test_layers__the_rules_have_no_circle() -> None:
    reachable = {package: set(allowed) | SHARED - {package} for package, allowed in ALLOWED.items()}
    reachable |= {shared: set() for shared in SHARED}
    for module, names in EXCEPTIONS.items():
        reachable[package_of(module)] |= names
    for _ in ALLOWED:
        for package in reachable:
            for other in list(reachable[package]):
                reachable[package] |= reachable[other]
    assert not [package for package in reachable if package in reachable[package]]


def test_layers__every_exception_is_used() -> None:
    unused = [
        f"{module} no longer imports {name}"
        for module, names in EXCEPTIONS.items()
        for name in names - (packages_imported_by(module) if module in MODULES else set())
    ]
    assert not unused


def test_layers__libraries_stay_in_their_packages() -> None:
    wrong = []
    for module in MODULES:
        for name in imported_by(module):
            packages = LIBRARIES.get(name.split(".")[0])
            if packages is not None and package_of(module) not in packages:
                wrong.append(f"{module} imports {name}")
    assert not wrong

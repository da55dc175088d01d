"""Imports point one way. Walks every module of the package, also imports inside functions."""

from __future__ import annotations

import ast
from pathlib import Path

import service

ROOT = Path(service.__file__).parent

# Which rooms each room may import, besides itself, `errors` and `arrays`.
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
    "settings": {"model"},  # the names of precisions
    "__init__": set(),
}
# The places that build the parts may know the settings too.
EXTRA = {
    "web/app.py": {"settings", "sessions"},
    "web/session_answer.py": {"sessions"},  # the record it shows
    "web/server.py": {"settings"},
    "web/health_routes.py": {"sessions"},  # whose store has to be reachable
    "sessions/session.py": {"engine"},  # the settings of a run
}
FORBIDDEN_LIBRARIES = {
    "flask": {"web"}, "flask_openapi": {"web"}, "gunicorn": {"web"}, "click": {"__main__", "commands"},
    "pydantic_settings": {"settings"}, "tqdm": {"commands"}, "matplotlib": {"training"}, "redis": {"sessions", "web"},
    "flask_limiter": {"web"}, "prometheus_client": {"web"}, "limits": {"settings"}, "pickle": set[str](),
}  # fmt: skip


def imports(path: Path) -> set[str]:
    """Full names of all modules that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= (
                {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "service" else {node.module}
            )
    return found


def room(module: str) -> str:
    """`service.web.app` -> `web`; names of the package itself -> `__init__`."""
    part = module.split(".")[1] if "." in module else "__init__"
    return part if (ROOT / part).is_dir() or (ROOT / f"{part}.py").exists() else "__init__"


def test_every_room_is_known() -> None:
    rooms = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in ROOT.rglob("*.py")}
    assert rooms == set(ALLOWED)


def test_imports_point_one_way() -> None:
    wrong = []
    for path in sorted(ROOT.rglob("*.py")):
        place = path.relative_to(ROOT)
        mine = place.parts[0].removesuffix(".py")
        allowed = ALLOWED[mine] | {mine, "errors", "arrays"} | EXTRA.get(place.as_posix(), set())
        for module in imports(path):
            if module.split(".")[0] == "service" and room(module) not in allowed:
                wrong.append(f"{place} imports {module}")
    assert not wrong


def test_libraries_stay_in_their_rooms() -> None:
    wrong = []
    for path in sorted(ROOT.rglob("*.py")):
        place = path.relative_to(ROOT)
        for module in imports(path):
            rooms = FORBIDDEN_LIBRARIES.get(module.split(".")[0])
            if rooms is not None and place.parts[0].removesuffix(".py") not in rooms:
                wrong.append(f"{place} imports {module}")
    assert not wrong


"""The README tells what is there."""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import SecretStr

from service.__main__ import main
from service.settings import Settings

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_every_setting_is_in_the_table_with_its_default() -> None:
    rows = dict(re.findall(r"^\| `GRU_SERVE_([A-Z_]+)` \| ([^|]*) \|", README, re.MULTILINE))
    defaults = {name: field.default for name, field in Settings.model_fields.items()}
    shown = {name: one.get_secret_value() if isinstance(one, SecretStr) else one for name, one in defaults.items()}
    assert rows == {name.upper(): str(default) for name, default in shown.items()}


def test_the_tree_shows_every_room() -> None:
    block = README.split("```\nservice/\n")[1].split("```")[0]
    shown = set(re.findall(r"[├└]── ((?:[a-z_]+(?:\.py|/)(?:, )?)+)", block))
    names = {name.strip() for line in shown for name in line.split(",")}
    rooms = {path.name + ("/" if path.is_dir() else "") for path in (ROOT / "service").iterdir()}
    assert names == {name for name in rooms if name not in ("__init__.py", "__pycache__/")}


def test_every_command_and_file_that_is_named_exists() -> None:
    for command in set(re.findall(r"gru-serve ([a-z]+)", README)):
        assert command in main.commands, command
    for target in re.findall(r"\]\(([^)h][^)]*)\)", README):
        assert (ROOT / target).exists(), target
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"^ {4}make ([a-z-]+)", README, re.MULTILINE)):
        assert f"\n{target}:" in makefile, target

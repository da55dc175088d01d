"""The `gru-serve` command line. Each command is in a module of `service/commands`."""

from __future__ import annotations

import errno
import io
import re
import sys
from typing import Any

import click

from service import __version__
from service.commands.bench import bench_command
from service.commands.eval import eval_command
from service.commands.export import export_command
from service.commands.generate import generate_command
from service.commands.import_ import import_command
from service.commands.keys import keys_group
from service.commands.models import models_group
from service.commands.score import score_command
from service.commands.serve import serve_command
from service.commands.train import train_command
from service.errors import GruServeError, InvalidSettings, UnknownCharacters

_CANT_WRITE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


class _Group(click.Group):
    """Prints errors of the project in one line: exit code 2 for wrong settings, as for wrong usage, and 1 otherwise."""

    def invoke(self, ctx: click.Context) -> Any:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # as standard error: a terminal may lack a character
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            example = re.search(r"Example: .+", error.ctx.command.help or "") if error.ctx is not None else None
            if example is not None and error.message.startswith("Got unexpected extra argument"):
                raise click.UsageError(f"{error.message}. {example[0]}", error.ctx) from error
            raise
        except InvalidSettings as error:
            raise click.UsageError(error.message) from error
        except UnknownCharacters as error:
            raise click.ClickException(error.command_message) from error
        except GruServeError as error:
            raise click.ClickException(error.message) from error
        except OSError as error:
            if error.errno not in _CANT_WRITE or error.filename is not None:
                raise
            raise click.ClickException(f"can't write the output: {error.strerror}") from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="gru-serve")
def main() -> None:
    """Serve, train and measure GRU character models."""


for _command in (
    serve_command,
    train_command,
    eval_command,
    generate_command,
    score_command,
    bench_command,
    import_command,
    export_command,
    models_group,
    keys_group,
):
    main.add_command(_command)

if __name__ == "__main__":
    main(prog_name="gru-serve")

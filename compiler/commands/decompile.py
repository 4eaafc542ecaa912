"""peftc decompile"""

from typing import Annotated

import typer

from peftc import compiler
from peftc.compiler.commands import arguments
from peftc.compiler.report import console


def decompile(
    checkpoint: arguments.Checkpoint,
    name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="What to call the adapter; by default as when it was saved.", show_default=False
        ),
    ] = None,
    use: arguments.Use = None,
    revision: arguments.Revision = None,
    local_files_only: arguments.Offline = False,
) -> None:
    """Print a PEFT checkpoint's adapter_config.json as a spec."""
    text = compiler.decompile(checkpoint, name=name, use=use, revision=revision, local_files_only=local_files_only)
    console.write(text)

"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

SPEC_HELP = "An .adapter file."
MODEL_HELP = "A directory, a Hub id, or package.module:factory."

Spec = Annotated[Path, typer.Argument(metavar="SPEC", help=SPEC_HELP, show_default=False)]
Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=False)]
Checkpoint = Annotated[
    str, typer.Argument(metavar="CHECKPOINT", help="A PEFT checkpoint's directory, or a Hub id.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document, for scripts; errors too.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="For random weights and the adapters' initial values.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run a modelling file that comes with the model.")
]
Revision = Annotated[
    str | None, typer.Option("--revision", metavar="REV", help="Of a repository on the Hub.", show_default=False)
]
Offline = Annotated[bool, typer.Option("--local-files-only", help="Never ask the Hub.")]
Use = Annotated[
    Path | None,
    typer.Option("--use", metavar="FILE", help="An .adapter file with methods of your own.", show_default=False),
]

"""Arguments and options that several commands share."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from peftc.grammar.diagnostics import UsageError
from peftc.passes.foreign.peft import AUTO_CLASSES

UNSAID = "E523"

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
Class = Annotated[
    str | None,
    typer.Option(
        "--class",
        metavar="NAME",
        help="Load MODEL as this class of transformers, and not as the one that its config.json names.",
        show_default=False,
    ),
]
Task = Annotated[
    str | None,
    typer.Option(
        "--task",
        metavar="TASK",
        help=f"Load MODEL as transformers' class for a task: {', '.join(AUTO_CLASSES)}.",
        autocompletion=lambda: list(AUTO_CLASSES),
        show_default=False,
    ),
]
Offline = Annotated[bool, typer.Option("--local-files-only", help="Never ask the Hub.")]
Use = Annotated[
    Path | None,
    typer.Option("--use", metavar="FILE", help="An .adapter file with methods of your own.", show_default=False),
]
Adapters = Annotated[
    str,
    typer.Argument(
        metavar="CHECKPOINT|SPEC",
        help="A checkpoint's directory or Hub id, or an .adapter file, whose adapters are fresh.",
        show_default=False,
    ),
]
Artifact = Annotated[
    str, typer.Argument(metavar="ARTIFACT", help="A directory that `peftc export` wrote.", show_default=False)
]
Verify = Annotated[
    bool, typer.Option("--verify/--no-verify", help="Check the digests of the artifact's files, not only their sizes.")
]
Quantized = Annotated[
    Literal["requantize", "dequantize"] | None,
    typer.Option(
        "--quantized",
        help="What becomes of weights that are quantized: packed again as they were, or dense.",
        show_default=False,
    ),
]


def as_option(error: UsageError) -> UsageError:
    """That it is not said what becomes of quantized weights, told to someone who says it by an option."""
    help = "--quantized requantize rounds the merged weights again, --quantized dequantize makes the model dense"
    return UsageError(*(replace(each, help=help) if each.code == UNSAID else each for each in error.diagnostics))

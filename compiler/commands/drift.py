"""peftc drift"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from peftc import compiler
from peftc.compiler import console, report
from peftc.compiler.commands import arguments

Type = Literal["float32", "bfloat16", "float16"]


def drift(
    adapters: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT|SPEC",
            help="A checkpoint's directory or Hub id, or an .adapter file, whose adapters are fresh.",
            show_default=False,
        ),
    ],
    model: arguments.Model,
    dtype: Annotated[
        Type | None,
        typer.Option("--dtype", help="Convert the base to this type first.", show_default=False),
    ] = None,
    use: arguments.Use = None,
    seed: arguments.Seed = 0,
    revision: arguments.Revision = None,
    trust_remote_code: arguments.TrustRemoteCode = False,
    local_files_only: arguments.Offline = False,
    json: arguments.Json = False,
) -> None:
    """Tell what merging adapters would cost: the rounding of every weight, and what it does to the outputs.

    The model is called with its factory's example inputs, or with random tokens.
    """
    with console.progress(not json) as progress:
        progress("loading the model")
        found = compiler.find_model(
            model,
            seed=seed,
            revision=revision,
            trust_remote_code=trust_remote_code,
            local_files_only=local_files_only,
        )
        progress("merging")
        source = Path(adapters) if Path(adapters).exists() else adapters
        measured = compiler.drift(source, found, seed=seed, dtype=dtype, use=use)
    for each in found.warnings:
        console.warn(each)
    for each in found.notes:
        console.say(each)
    if json:
        console.write_json({**asdict(measured), "largest": measured.largest, "relative": measured.relative})
    else:
        console.show(report.drift_report(measured))

"""peftc drift"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from peftc import compiler
from peftc.compiler.commands import arguments
from peftc.compiler.report import console, report
from peftc.grammar.diagnostics import UsageError
from peftc.grammar.spec.elaborate import names_file
from peftc.grammar.spec.spec import Spec

Type = Literal["float32", "bfloat16", "float16"]


def drift(
    adapters: arguments.Adapters,
    model: arguments.Model,
    dtype: Annotated[
        Type | None,
        typer.Option("--dtype", help="Convert the base to this type first.", show_default=False),
    ] = None,
    quantized: arguments.Quantized = None,
    use: arguments.Use = None,
    class_name: arguments.Class = None,
    task: arguments.Task = None,
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
        source = compiler.read_spec(Path(adapters)) if names_file(adapters) else adapters
        found = compiler.find_model(
            model,
            seed=seed,
            revision=revision,
            trust_remote_code=trust_remote_code,
            local_files_only=local_files_only,
            class_name=class_name,
            task=task,
            adapters=source,
            # What is to be of another type is converted first, and packed then.
            quantize=source.quantize if isinstance(source, Spec) and dtype is None else None,
        )
        progress("merging")
        try:
            measured = compiler.drift(source, found, seed=seed, dtype=dtype, use=use, quantized=quantized)
        except UsageError as error:
            raise arguments.as_option(error) from error
    for each in found.warnings:
        console.warn(each)
    for each in found.notes:
        console.say(each)
    if json:
        console.write_json({**asdict(measured), "largest": measured.largest, "relative": measured.relative})
    else:
        console.show(report.drift_report(measured))

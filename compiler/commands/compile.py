"""peftc compile"""

from pathlib import Path
from typing import Annotated

import typer

from peftc import compiler
from peftc.compiler.commands import arguments
from peftc.compiler.report import console, report


def compile_(
    spec: arguments.Spec,
    model: arguments.Model,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="DIR",
            show_default=False,
            help="Write adapters/<name>/, graph.dot, graph.svg and manifest.json there.",
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace DIR even if it holds more than an unchanged earlier build.")
    ] = False,
    class_name: arguments.Class = None,
    task: arguments.Task = None,
    seed: arguments.Seed = 0,
    revision: arguments.Revision = None,
    trust_remote_code: arguments.TrustRemoteCode = False,
    local_files_only: arguments.Offline = False,
    json: arguments.Json = False,
) -> None:
    """Put the adapters of a spec into a model, and tell what went where.

    DIR appears complete or not at all: a failure leaves what was there.
    """
    with console.progress(not json) as progress:
        progress("loading peftc")
        meant = compiler.read_spec(spec)
        progress("loading the model")
        found = compiler.find_model(
            model,
            seed=seed,
            revision=revision,
            trust_remote_code=trust_remote_code,
            local_files_only=local_files_only,
            class_name=class_name,
            task=task,
            adapters=meant,
            quantize=meant.quantize,
        )
        facts = compiler.build(meant, found, out, seed=seed, force=force, progress=progress).facts
    for each in facts.warnings:
        console.warn(each)
    for each in facts.notes:
        console.say(each)
    if json:
        console.write_json(facts.to_json())
    else:
        console.show(report.build_report(facts))

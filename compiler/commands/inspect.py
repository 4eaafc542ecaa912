"""peftc inspect"""

import typer

from peftc import compiler
from peftc.compiler.commands import arguments
from peftc.compiler.report import console, report


def inspect(
    checkpoint: arguments.Checkpoint,
    use: arguments.Use = None,
    revision: arguments.Revision = None,
    local_files_only: arguments.Offline = False,
    json: arguments.Json = False,
) -> None:
    """Tell what is in a PEFT checkpoint, ours or peft's: method, ranks, modules, types, size, base, origin."""
    facts = compiler.inspect(checkpoint, use=use, revision=revision, local_files_only=local_files_only)
    if json:
        errors = {"errors": [console.as_json(each) for each in facts.problems]} if facts.problems else {}
        console.write_json({**facts.to_json(), **errors})
    else:
        console.show(report.checkpoint_report(facts))
    for each in facts.warnings:
        console.warn(each)
    if facts.problems:
        if not json:
            console.complain(facts.problems)
        raise typer.Exit(1)

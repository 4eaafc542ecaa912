"""peftc doctor"""

import typer

from peftc import compiler
from peftc.compiler.commands import arguments
from peftc.compiler.report import console, doctor_report


def doctor(json: arguments.Json = False) -> None:
    """Tell whether peftc works with what is installed here: versions, devices, a minute of checks on tiny models."""
    with console.progress(not json) as progress:
        facts = compiler.doctor(on_check=lambda name: progress(f"checking {name}"))
    if json:
        console.write_json(facts.to_json())
    else:
        console.show(doctor_report.doctor_report(facts))
    if not facts.ok:
        raise typer.Exit(1)

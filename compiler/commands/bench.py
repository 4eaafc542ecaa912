"""peftc bench"""

from dataclasses import asdict
from typing import Annotated

import typer

from peftc import compiler
from peftc.compiler.commands import arguments
from peftc.compiler.report import bench_report, console


def bench(
    artifact: arguments.Artifact,
    tokens: Annotated[
        list[int] | None,
        typer.Option(
            "--tokens",
            metavar="N",
            min=1,
            help="Of a prefill, or in the cache of a decode; may be repeated. 32 and 128, unless said.",
            show_default=False,
        ),
    ] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option("--batch", metavar="N", min=1, help="Rows of a call; may be repeated. 1, unless said."),
    ] = None,
    seconds: Annotated[float, typer.Option("--seconds", metavar="X", min=0, help="How long to measure each.")] = 1.0,
    verify: arguments.Verify = True,
    json: arguments.Json = False,
) -> None:
    """Time the programs of an exported artifact on random inputs: the median of a call, and tokens a second."""
    with console.progress(not json) as progress:
        progress(f"measuring {artifact}")
        facts = compiler.bench(artifact, tokens=tokens or (), batches=batch or (1,), seconds=seconds, verify=verify)
    if json:
        timings = [{**asdict(each), "tokens_per_second": each.tokens_per_second} for each in facts.timings]
        console.write_json({**asdict(facts), "timings": timings})
    else:
        console.show(bench_report.bench_report(facts))

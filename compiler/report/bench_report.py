"""The table of `peftc bench`."""

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from peftc.compiler.report.timings import BenchFacts


def bench_report(facts: BenchFacts) -> RenderableType:
    """What `peftc bench` says: of every entry and size the median of a call, and tokens in a second."""
    plural = "s" if facts.threads > 1 else ""
    head = Text(f"{facts.artifact}: {facts.backend}, adapters {facts.adapters}, {facts.threads} thread{plural}")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column("entry")
    names = list(dict.fromkeys(name for each in facts.timings for name in each.sizes))
    for name in (*names, "ms", "tokens/s", "calls"):
        table.add_column(name, justify="right", no_wrap=True)
    for each in facts.timings:
        sizes = [f"{each.sizes[name]:,}" if name in each.sizes else "" for name in names]
        table.add_row(each.entry, *sizes, f"{each.milliseconds:.4g}", f"{each.tokens_per_second:,.0f}", str(each.calls))
    return Group(head, table)

"""What `peftc export` says."""

import re
from collections.abc import Mapping

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from peftc.compiler.report.facts import ExportFacts
from peftc.compiler.report.report import size_text
from peftc.runtime.merge.drift import OutputDrift

Sizes = Mapping[str, tuple[int | str, ...] | int]

_LAYER = re.compile(r"_\d+_")


def export_report(facts: ExportFacts) -> RenderableType:
    """Where it is; of programs, how each is called, in which ranges, and how far it is from the adapted model."""
    head = Table.grid(padding=(0, 2))
    head.add_row("written", f"{facts.directory}, {len(facts.files)} files, {size_text(facts.bytes)}")
    head.add_row("adapters", Text(_adapters(facts)))
    if facts.dimensions:
        head.add_row("ranges", ", ".join(_range(name, each) for name, each in facts.dimensions.items()))
    if facts.drift is not None:
        head.add_row("drift", _drift(facts.drift))
    if not facts.entries:
        return head
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for each in ("entry", "file", "inputs"):
        table.add_column(each, overflow="fold")
    for entry in facts.entries:
        table.add_row(entry.name, entry.file, Text(_inputs(entry.inputs)))
    return Group(table, head)


def _adapters(facts: ExportFacts) -> str:
    if facts.placed == "merged":
        weights = ((name, facts.weights.get(name, 1.0)) for name in facts.adapters)
        return f"{' + '.join(name if weight == 1 else f'{weight:g} * {name}' for name, weight in weights)}, merged"
    return f"{', '.join(facts.adapters)}, {'one with each call' if facts.placed == 'inputs' else 'one for each row'}"


def _range(name: str, limits: Mapping[str, int | None]) -> str:
    most = limits["max"]
    return f"{name} from {limits['min']}" if most is None else f"{name} {limits['min']} to {most:,}"


def _drift(drift: OutputDrift) -> str:
    apart = f"outputs at most {drift.largest:.3g} apart, {drift.relative:.3g} of the largest"
    return apart if drift.agreement is None else f"{apart}; {100 * drift.agreement:.4g} % of choices the same"


def _inputs(sizes: Sizes) -> str:
    """A line for each input, or for those of all layers together."""
    found: dict[tuple[str, object], None] = {}
    for name, size in sizes.items():
        found[_LAYER.sub("_*_", name), size] = None
    return "\n".join(f"{name} {_shape(size)}" for name, size in found)


def _shape(size: object) -> str:
    return f"[{', '.join(map(str, size))}]" if isinstance(size, tuple) else f"{{{size} tensors by name}}"

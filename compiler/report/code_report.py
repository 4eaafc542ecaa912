"""The entry of an error code, as `peftc explain E201` tells it."""

import textwrap

from rich.console import Group, RenderableType
from rich.text import Text

from peftc.grammar.errors.register import Entry

WIDTH = 100


def code_report(entry: Entry) -> RenderableType:
    """What the code means, how it is mended, and a message or a spec that shows it."""
    parts = [
        Text.assemble((f"error[{entry.code}]", "bold red"), f": {entry.says}"),
        Text(""),
        Text(textwrap.fill(entry.means, WIDTH)),
        Text.assemble(("help: ", "cyan"), textwrap.fill(entry.mend, WIDTH)),
    ]
    if entry.spec:
        parts += [Text("\nfor example, this is refused with it:\n"), Text(textwrap.indent(entry.spec, "    "))]
    return Group(*parts)

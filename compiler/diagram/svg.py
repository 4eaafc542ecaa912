"""DOT text drawn by graphviz."""

import shutil
import subprocess
from typing import Literal, get_args

from peftc.grammar.diagnostics import ModelError, UsageError, fail

Drawn = Literal["svg", "png", "pdf"]
DRAWN: tuple[Drawn, ...] = get_args(Drawn)

HELP = "install graphviz (apt install graphviz, brew install graphviz, graphviz.org/download) or write DOT text"


def graphviz() -> str:
    """The program that draws pictures, graphviz's `dot`. Raises UsageError where there is none."""
    program = shutil.which("dot")
    if program is None:
        fail(UsageError, "E552", "graphviz is not installed: its program 'dot' is not on the PATH", help=HELP)
    return program


def to_svg(dot_text: str) -> bytes:
    """The drawing. Raises UsageError where graphviz is missing, ModelError where it fails."""
    return render(dot_text, "svg")


def render(dot_text: str, form: Drawn) -> bytes:
    """The drawing in one of graphviz's forms. Raises UsageError where it is missing, ModelError where it fails."""
    program = graphviz()
    drawn = subprocess.run([program, f"-T{form}"], input=dot_text.encode(), capture_output=True, check=False)
    if drawn.returncode != 0:
        said = drawn.stderr.decode(errors="replace").strip() or f"exit code {drawn.returncode}"
        fail(ModelError, "E431", f"graphviz could not draw the graph: {said}", help="write DOT text instead")
    return drawn.stdout

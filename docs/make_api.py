"""Writes docs/api.md from the docstrings: `python docs/make_api.py`. A test tells when the page is old."""

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peftc import compiler
from peftc.compiler.export_model.exportable import Exportable
from peftc.compiler.report.facts import EntryFacts, ExportFacts
from peftc.grammar.diagnostics import (
    AdapterError,
    CheckpointError,
    Diagnostic,
    ModelError,
    SpecError,
    UsageError,
)
from peftc.grammar.source import Source, Span
from peftc.grammar.spec.spec import AdapterSpec, Base, Quantize, Spec, Target
from peftc.passes.plan.plan import AdapterPlan, PlannedCopy, PlannedSite
from peftc.passes.plan.site import Site
from peftc.runtime.adapted.adapted_module import AdaptedModule
from peftc.runtime.merge.drift import MergeDrift, OutputDrift, TensorDrift
from peftc.runtime.model.model import AdaptedModel

PAGE = Path(__file__).parent / "api.md"
WIDTH = 100  # of a signature on one line

OWNERS = (AdaptedModel, Exportable, AdaptedModule)
ERRORS = (AdapterError, SpecError, CheckpointError, ModelError, UsageError, Diagnostic, Span, Source)
DATA = (
    Spec,
    AdapterSpec,
    Target,
    Base,
    Quantize,
    AdapterPlan,
    PlannedSite,
    PlannedCopy,
    Site,
    MergeDrift,
    TensorDrift,
    OutputDrift,
    ExportFacts,
    EntryFacts,
)
SECTIONS = ("Args", "Returns", "Raises")


def page() -> str:
    """The whole page."""
    exported = [(name, getattr(compiler, name)) for name in compiler.__all__]
    functions = [(name, each) for name, each in exported if inspect.isfunction(each)]
    classes = [each for _, each in exported if inspect.isclass(each) and each not in (AdaptedModel, *ERRORS, *DATA)]
    parts = [
        "# API reference",
        "Made from the docstrings by `docs/make_api.py`. What is not here is not for use from outside.",
        "## `peftc.compiler`",
        *(part for name, each in functions for part in described(name, each, 3)),
        *(part for each in classes for part in class_parts(each)),
        "## `AdaptedModel`",
        docstring(AdaptedModel),
        "Methods of the model's own class are there too: `generate`, `to`, `train`, `state_dict` and the rest.",
        *(part for owner in OWNERS for part in methods(owner)),
        "## Errors",
        "All are exported by `peftc.compiler`, except `Span` and `Source`, which a diagnostic points with.",
        *(part for each in ERRORS for part in class_parts(each)),
        "## Specs and plans",
        "Frozen data: what `read_spec`, `AdaptedModel.adapter_plan`, `AdaptedModel.merge_drift` and `export` return.",
        *(part for each in DATA for part in class_parts(each)),
    ]
    return "\n\n".join(parts) + "\n"


def class_parts(kind: type[Any]) -> Iterator[str]:
    """A class: its fields if it is data, its docstring, its public methods."""
    yield f"### `{kind.__name__}`"
    tree = parsed(kind)
    assert isinstance(tree, ast.ClassDef)
    bases = ", ".join(each.__name__ for each in kind.__bases__ if each is not object)
    fields = [ast.unparse(node) for node in tree.body if isinstance(node, ast.AnnAssign) and not _is_private(node)]
    start = f"class {kind.__name__}({bases}):" if bases else f"class {kind.__name__}:"
    if fields:
        yield code("\n".join([start, *(f"    {each}" for each in fields)]))
    elif bases:
        yield code(start.removesuffix(":"))
    yield docstring(kind)
    yield from methods(kind, level=4)


def methods(owner: type[Any], level: int = 3) -> Iterator[str]:
    """The public methods and properties a class itself defines, in its order."""
    for name, member in vars(owner).items():
        function = member.fget if isinstance(member, property) else getattr(member, "__wrapped__", member)
        if not name.startswith("_") and inspect.isfunction(function):
            yield from described(name, function, level, is_property=isinstance(member, property))


def described(name: str, function: Any, level: int, *, is_property: bool = False) -> Iterator[str]:
    """A function: heading, signature, docstring."""
    yield f"{'#' * level} `{name}`"
    node = parsed(function)
    assert isinstance(node, ast.FunctionDef)
    yield code(f"{name}: {ast.unparse(node.returns)}" if is_property and node.returns else signature(node))
    yield docstring(function)


def signature(node: ast.FunctionDef) -> str:
    """The signature as written, on several lines where it is long. A context manager's result is what it yields."""
    arguments = node.args
    arguments.args = [each for each in arguments.args if each.arg != "self"]
    result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    if any(isinstance(each, ast.Name) and each.id == "contextmanager" for each in node.decorator_list):
        result = "  # a context"
    # ast writes `x: int=0`.
    written = [re.sub(r"^(\w+: [^=]+)=", r"\1 = ", each) for each in _apart(arguments)]
    line = f"{node.name}({', '.join(written)}){result}"
    if len(line) <= WIDTH:
        return line
    inner = ",\n".join(f"    {each}" for each in written)
    return f"{node.name}(\n{inner},\n){result}"


def _apart(arguments: ast.arguments) -> Iterator[str]:
    """Each argument as it is written."""
    whole = ast.unparse(arguments)
    depth, start = 0, 0
    for position, sign in enumerate(whole):
        depth += (sign in "([{") - (sign in ")]}")
        if sign == "," and depth == 0:
            yield whole[start:position].strip()
            start = position + 1
    yield whole[start:].strip()


def docstring(thing: Any) -> str:
    """The docstring with its sections as lists."""
    text = inspect.getdoc(thing)
    assert text, f"{thing} has no docstring"
    parts = re.split(rf"^({'|'.join(SECTIONS)}):\n", text, flags=re.MULTILINE)
    written = [parts[0].strip()]
    for title, body in zip(parts[1::2], parts[2::2], strict=True):
        lines, _, rest = textwrap.dedent(body).partition("\n\n")
        items = re.split(r"^(?=\S)", lines, flags=re.MULTILINE)
        if title != "Returns":
            items = [re.sub(r"^([\w*., ]+): ", r"- `\1`: ", each) for each in items]
        # A continued line of an item is indented by four, which is what a list item in Markdown may have.
        written.append(f"**{title}**\n\n" + "".join(re.sub(r"\n {2,}", "\n  ", each) for each in items).strip())
        if rest.strip():
            written.append(textwrap.dedent(rest).strip())
    return "\n\n".join(written)


def parsed(thing: Any) -> ast.AST:
    """The syntax tree of a function's or class's source."""
    return ast.parse(textwrap.dedent(inspect.getsource(thing))).body[0]


def code(text: str) -> str:
    """A block of Python, in the quotes of the house rather than those of ast."""
    written = text if '"' in text else text.replace("'", '"')
    return f"```python\n{written}\n```"


def _is_private(node: ast.AnnAssign) -> bool:
    return isinstance(node.target, ast.Name) and node.target.id.startswith("_")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

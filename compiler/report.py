"""Tables for people. Needs no torch."""

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from peftc.compiler.facts import AdapterFacts, BuildFacts, CheckpointFacts
from peftc.compiler.names import collapse
from peftc.grammar import expression
from peftc.grammar.rule import MethodRule


def adapters_report(adapters: Iterable[AdapterFacts]) -> RenderableType:
    """Of every adapter its rules, the sites they reach, the values there and how much is trained."""
    parts: list[RenderableType] = []
    for each in adapters:
        rows = [
            (
                "\n".join([rule.rule, *(f"-> {sites}" for sites in collapse(rule.sites))]),
                rule.brief,
                str(len(rule.sites)),
                f"{rule.parameters:,}",
            )
            for rule in each.rules
        ]
        parts.append(Text(f"{each.name} = {each.method}", style="bold"))
        parts.append(_table(("rule -> sites", "values"), rows, right=("#", "parameters")))
    return Group(*parts)


def build_report(facts: BuildFacts) -> RenderableType:
    """What `peftc compile` says."""
    model = facts.model
    totals = Table.grid(padding=(0, 2))
    totals.add_row("base", f"{model.architecture}, {model.parameters:,} parameters, frozen")
    totals.add_row("adapters", f"{facts.parameters:,} parameters, {100 * facts.share:.4g} % of all")
    totals.add_row("checkpoint", _size(facts.bytes))
    totals.add_row("active", _active(facts.adapters))
    if facts.output:
        totals.add_row("written", facts.output)
    return Group(adapters_report(facts.adapters), totals)


def _active(adapters: Iterable[AdapterFacts]) -> str:
    terms = [each.name if each.weight == 1 else f"{each.weight:g} * {each.name}" for each in adapters if each.weight]
    return " + ".join(terms) or "none"


def checkpoint_report(facts: CheckpointFacts) -> RenderableType:
    """What `peftc inspect` says."""
    head = Table.grid(padding=(0, 2))
    head.add_row("checkpoint", facts.directory)
    method = facts.method or "not supported"
    head.add_row("method", f"{method} (PEFT type {facts.peft_type or 'unknown'})")
    if facts.brief:
        head.add_row("values", facts.brief)
    head.add_row("base", (facts.base or "unknown") + (f" at {facts.revision}" if facts.revision else ""))
    if facts.task_type:
        head.add_row("task", facts.task_type)
    head.add_row("size", f"{_size(facts.bytes)}, {facts.parameters:,} parameters")
    if facts.manifest:
        versions = ", ".join(f"{name} {version}" for name, version in facts.manifest["versions"].items())
        head.add_row("written by", versions)
        head.add_row("base weights", f"a {facts.manifest['base_class']}, {facts.manifest['fingerprint'][:12]}")
    else:
        head.add_row("written by", "no peftc manifest")
    rows = [
        (
            "\n".join(collapse(each.modules)),
            ", ".join(f"{name} = {value}" for name, value in each.values.items()),
            "\n".join(each.tensors),
            ", ".join(each.dtypes),
            str(len(each.modules)),
            f"{each.parameters:,}",
        )
        for each in facts.modules
    ]
    return Group(head, _table(("modules", "values", "tensors", "type"), rows, right=("#", "parameters")))


def methods_table(methods: Iterable[MethodRule]) -> Table:
    """Every method on a line."""
    rows = [(each.name, ", ".join(each.kinds), first_sentence(each.doc)) for each in methods]
    return _table(("method", "kinds", "what it is"), rows)


def method_report(rule: MethodRule) -> RenderableType:
    """One method: what it is, its hyperparameters, its parameters, its formula."""
    head = Table.grid(padding=(0, 2))
    formula = f"W' = {expression.text(rule.weight)}"
    lets = [f"{name} = {expression.text(value)}" for name, value in rule.lets]
    head.add_row("formula", "\n".join([formula, *lets]))
    head.add_row("kinds", ", ".join(rule.kinds))
    if rule.peft_type:
        head.add_row("PEFT type", rule.peft_type)
    values = [
        (each.name, f"text ({', '.join(each.choices)})" if each.choices else each.type, expression.text(each.default))
        for each in rule.hyperparameters
    ]
    parameters = []
    for param in rule.params:
        shape = f"[{', '.join(expression.text(size) for size in param.shape)}]"
        saved = dict(param.saved)
        for kind, init in param.init:
            name = f"{param.role} (on {kind})" if kind else param.role
            parameters.append((name, shape, expression.text(init), saved[kind]))
    tables = [
        _table(("hyperparameter", "type", "default"), values),
        _table(("parameter", "shape", "starts as", "saved as"), parameters),
    ]
    parts: list[RenderableType] = [Text(f"{rule.name}\n"), Text(f"{_flowing(rule.doc)}\n" if rule.doc else ""), head]
    return Group(*parts, *(each for each in tables if each.row_count))


def first_sentence(doc: str) -> str:
    """The doc up to its first full stop or colon."""
    text = " ".join(doc.split())
    ends = [end for end in (text.find(". "), text.find(": ")) if end > 0]
    return text[: min(ends)] if ends else text.removesuffix(".")


def _flowing(doc: str) -> str:
    """A doc's paragraphs without the line breaks of its file."""
    return "\n\n".join(" ".join(each.split()) for each in doc.split("\n\n"))


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()) -> Table:
    """A table whose cells wrap, but for those on the right: a number is never cut."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for each in columns:
        table.add_column(each, overflow="fold")
    for each in right:
        table.add_column(each, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _size(count: int) -> str:
    size = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{count:,} bytes" if unit == "bytes" else f"{size:.4g} {unit}"

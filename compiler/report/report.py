"""Tables for people. Needs no torch."""

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from peftc.compiler.report.facts import (
    AdapterFacts,
    BuildFacts,
    CheckpointFacts,
    ExplainFacts,
    GroupFacts,
    InsertedFacts,
    RefusalFacts,
)
from peftc.compiler.report.names import collapse, places
from peftc.grammar.method.rule import MethodRule
from peftc.grammar.syntax import expression
from peftc.passes.foreign.peft import OWN_TYPE
from peftc.runtime.merge.drift import MergeDrift, TensorDrift
from peftc.runtime.regions.partition import Partition, SplitRow


def adapters_report(adapters: Iterable[AdapterFacts]) -> RenderableType:
    """Of every adapter its rules, the sites they reach, the values there and how much is trained."""
    parts: list[RenderableType] = []
    for each in adapters:
        rows = [
            (
                "\n".join([rule.rule, *(f"-> {sites}" for sites in places(rule.sites))]),
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
    totals.add_row("checkpoint", size_text(facts.bytes))
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
    own = facts.peft_type == OWN_TYPE
    known_as = "defined in the file" if own else f"PEFT type {facts.peft_type or 'unknown'}"
    head.add_row("method", f"{method} ({known_as})")
    if facts.brief:
        head.add_row("values", facts.brief)
    head.add_row("base", (facts.base or "unknown") + (f" at {facts.revision}" if facts.revision else ""))
    if facts.task_type:
        head.add_row("task", facts.task_type)
    head.add_row("size", f"{size_text(facts.bytes)}, {facts.parameters:,} parameters")
    if facts.manifest:
        versions = ", ".join(f"{name} {version}" for name, version in facts.manifest["versions"].items())
        head.add_row("written by", versions)
        head.add_row("base weights", f"a {facts.manifest['base_class']}, {facts.manifest['fingerprint'][:12]}")
    else:
        head.add_row("written by", "no peftc manifest")
    rows = [
        (
            "\n".join(places(each.modules)),
            ", ".join(f"{name} = {value}" for name, value in each.values.items()),
            "\n".join(each.tensors),
            ", ".join(each.dtypes),
            str(len(each.modules)),
            f"{each.parameters:,}",
        )
        for each in facts.modules
    ]
    return Group(head, _table(("modules", "values", "tensors", "type"), rows, right=("#", "parameters")))


def drift_report(drift: MergeDrift) -> RenderableType:
    """What `peftc drift` says."""
    totals = Table.grid(padding=(0, 2))
    totals.add_row("merged", " + ".join(drift.adapters))
    exact = f"at most {drift.largest:.3g} from the exact value, {drift.relative:.3g} of the largest"
    totals.add_row("weights", exact if drift.tensors else "none is computed: trained rows and copies take their places")
    outputs = drift.outputs
    if outputs is None:
        totals.add_row("outputs", "not compared: nothing is known that the model could be called with")
    else:
        average = f"{outputs.mean:.3g} on average"
        totals.add_row(
            "outputs", f"at most {outputs.largest:.3g} apart, {outputs.relative:.3g} of the largest; {average}"
        )
    if outputs is not None and outputs.divergence is not None and outputs.agreement is not None:
        totals.add_row("distributions", f"{outputs.divergence:.3g} nats apart")
        totals.add_row("greedy choice", f"the same at {100 * outputs.agreement:.4g} % of places")
    groups: dict[tuple[str, str], list[TensorDrift]] = {}
    for each in drift.tensors:
        alike = ".".join("*" if part.isdigit() else part for part in each.name.split("."))
        groups.setdefault((alike, each.dtype), []).append(each)
    rows = [
        (
            "\n".join(collapse(tuple(each.name for each in group))),
            dtype,
            str(len(group)),
            f"{max(each.largest for each in group):.3g}",
            f"{max(each.relative for each in group):.3g}",
        )
        for (_, dtype), group in groups.items()
    ]
    table = _table(("tensors", "type"), rows, right=("#", "largest", "relative"))
    return Group(table, totals) if rows else totals


def explain_report(facts: ExplainFacts) -> RenderableType:
    """What `peftc explain` says: for groups of alike sites the expression, and what each lowering costs."""
    parts: list[RenderableType] = []
    for each in facts.together:
        parts.append(Text(" + ".join(each.adapters), style="bold"))
        for inserted in each.inserted:
            parts.append(_inserted(inserted, several=len(each.adapters) > 1))
        for group in each.groups:
            parts.append(_group(group))
            parts.append(_costs(group))
        parts.append(_partition(each.regions))
        if each.refusals is not None:
            parts.append(_refusals(each.refusals, each.untraced))
    return Group(*parts)


def _partition(partition: Partition) -> RenderableType:
    """Which modules run graphs, kind by kind, and which are split."""
    if not partition.regions and not partition.splits:
        return Text("\nno module runs a graph")
    traced = any(each.traces for each in partition.regions)
    rows = [
        (
            "\n".join(_modules(each.modules)),
            each.kind,
            each.why,
            str(len(each.modules)),
            str(each.variants),
            *((str(each.traces),) if traced else ()),
        )
        for each in partition.regions
    ]
    right = ("#", "variants", *(("traces",) if traced else ()))
    splits = [("\n".join(_modules(each.modules)), _how(each), each.why) for each in partition.splits]
    parts: list[RenderableType] = [Text("")]
    if rows:
        parts.append(_table(("region", "kind", "because"), rows, right=right))
    if splits:
        parts.append(_table(("runs its own Python", "in calls", "because"), splits))
    return Group(*parts)


def _modules(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(each or "the model" for each in collapse(names))


def _how(split: SplitRow) -> str:
    if split.refused:
        return "refused"
    return ("some" if split.called else "all") + (", on adapted weights" if split.owned else "")


def _refusals(refusals: Sequence[RefusalFacts], untraced: str) -> RenderableType:
    """What passes left as it is: alike ones of several sites in a row of their own."""
    if untraced:
        return Text(f"\nthere is no graph of the whole model: {untraced}")
    sites: dict[tuple[str, str], list[str]] = {}
    for each in refusals:
        sites.setdefault((each.made_by, each.reason), []).append(each.site or each.node)
    rows = [("\n".join(places(dict.fromkeys(names))), *reason) for reason, names in sites.items()]
    if not rows:
        return Text("\nnothing is refused")
    return Group(Text(""), _table(("left as it is", "by", "because"), rows))


def _inserted(inserted: InsertedFacts, *, several: bool) -> RenderableType:
    head = Table.grid(padding=(0, 2))
    head.add_row("sites", Text("\n".join(places(inserted.sites)), overflow="fold"))
    head.add_row("", Text(inserted.says + (f" of {inserted.adapter}" if several else "")))
    for name, formula in inserted.formulas.items():
        head.add_row(name, Text(formula))
    head.add_row("", Text(", ".join(f"{role} {_product(shape)}" for role, shape in inserted.shapes.items())))
    return Group(Text(""), head)


def _group(group: GroupFacts) -> RenderableType:
    sizes = (*((group.count,) if group.count > 1 else ()), group.out_features, group.in_features)
    head = Table.grid(padding=(0, 2))
    head.add_row("sites", Text("\n".join(collapse(group.sites)), overflow="fold"))
    number = f"{len(group.sites)} {group.kind}, " if len(group.sites) > 1 else f"{group.kind}, "
    head.add_row("W", f"{number}{_product(sizes)}, {group.dtype}")
    for term in group.terms:
        name = f" of {term.adapter}" if len(group.terms) > 1 else ""
        head.add_row(f"W'{name}", Text(term.weight))
        if term.bias is not None:
            head.add_row(f"b'{name}", Text(term.bias))
        head.add_row("", Text(", ".join(f"{role} {_product(shape)}" for role, shape in term.shapes.items())))
    return Group(Text(""), head)


def _product(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes)) or "number"


def _costs(group: GroupFacts) -> RenderableType:
    rows = []
    for call in group.calls:
        for name, cost in call.costs.items():
            first = name == next(iter(call.costs))
            mark = "*" if name == call.lowering else ""
            figures = (_short(cost.flops), _short(cost.bytes), str(cost.calls), f"{cost.seconds * 1e6:,.0f}")
            rows.append((f"{call.tokens:,}" if first else "", mark, name, *figures))
    table = _table((), (), right=("tokens", "", "lowering", "flops", "bytes", "calls", "us"))
    table.columns[2].justify = "left"
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def methods_table(methods: Iterable[MethodRule]) -> Table:
    """Every method on a line."""
    rows = [(each.name, ", ".join(each.kinds) or _beside(each), first_sentence(each.doc)) for each in methods]
    return _table(("method", "kinds", "what it is"), rows)


def _beside(rule: MethodRule) -> str:
    """What a method that is for no kind of weight is for."""
    return "tokens" if rule.rows else "modules" if rule.copies else ""


def method_report(rule: MethodRule) -> RenderableType:
    """One method: what it is, its hyperparameters, its parameters, its formula."""
    head = Table.grid(padding=(0, 2))
    primes = {"W'": rule.weight, "b'": rule.bias}
    primes |= {"prompt'": rule.prompt, "gate'": rule.gate, "labels'": rule.labels}
    formulas = [f"{name} = {expression.text(value)}" for name, value in primes.items() if value is not None]
    lets = [f"{name} = {expression.text(value)}" for name, value in rule.lets]
    if rule.copies or rule.rows:
        formulas.append("the whole module, trained" if rule.copies else "W'[tokens] = rows")
    head.add_row("formula", Text("\n".join([*formulas, *lets])))
    if rule.kinds:
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
            parameters.append((name, shape, expression.text(init), saved.get(kind, "")))
    tables = [
        _table(("hyperparameter", "type", "default"), values),
        _table(("parameter", "shape", "starts as", "saved as"), parameters),
    ]
    parts: list[RenderableType] = [Text(f"{rule.name}\n"), Text(f"{_flowing(rule.doc)}\n" if rule.doc else ""), head]
    return Group(*parts, *(each for each in tables if each.row_count))


def first_sentence(doc: str) -> str:
    """The doc up to its first full stop, colon or parenthesis."""
    text = " ".join(doc.split())
    ends = [end for end in (text.find(". "), text.find(": "), text.find(" (")) if end > 0]
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


def _short(count: int) -> str:
    """A count with a prefix of the metric system: 8.4 M."""
    figure = float(count)
    for prefix in ("", " k", " M", " G", " T"):
        if figure < 999.5 or prefix == " T":
            break
        figure /= 1000
    return f"{count}" if not prefix else f"{figure:.3g}{prefix}"


def size_text(count: int) -> str:
    """A number of bytes: "1.2 MB"."""
    size = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{count:,} bytes" if unit == "bytes" else f"{size:.4g} {unit}"

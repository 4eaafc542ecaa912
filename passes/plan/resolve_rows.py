"""Meets the `tokens` clauses of a spec with a model: which rows of which weights are trained."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from peftc.grammar.diagnostics import SpecError, fail
from peftc.grammar.source import Span
from peftc.grammar.spec.no_match import misses
from peftc.grammar.spec.select import Universe, select_modules
from peftc.grammar.spec.spec import AdapterSpec, Tokens
from peftc.grammar.syntax import tree
from peftc.passes.plan.plan import PlannedRows
from peftc.passes.plan.site import Site

KINDS = ("embedding", "linear")  # whose weights have a row for each token


@dataclass
class _Named:
    """The tokens of one module."""

    ids: list[int] = field(default_factory=list)
    is_explicit: bool = True  # whether a clause names the module
    span: Span | None = None


def planned_rows(
    spec: AdapterSpec, sites: Iterable[Site], universe: Universe, embedding: str, taken: Mapping[str, str]
) -> tuple[PlannedRows, ...]:
    """The rows an adapter trains. `embedding` is the input embedding; `taken` says what the adapter does elsewhere.

    The input embedding stands for whatever is tied to it, unless a tied module is named with tokens of its own: then
    each module named has its own rows, as in PEFT.

    Raises:
        SpecError: a token is outside the vocabulary or there twice, a module has no row for each token, or the adapter
            adapts the same weight in another way.
    """
    known = {site.module: site for site in sites if site.leaf == "weight" and site.kind in KINDS}
    named: dict[str, _Named] = {}
    for clause in spec.tokens:
        for module in _modules(spec, clause, universe, embedding, known):
            found = named.setdefault(module, _Named(span=clause.span))
            found.is_explicit = found.is_explicit and bool(clause.modules)
            _add(found.ids, clause, module, _vocabulary(known[module]))
    planned: list[PlannedRows] = []
    tied = _tied(known[embedding], known) if embedding in named else ()
    joint = [module for module in named if module in tied]
    alike = all(named[module].ids == named[embedding].ids for module in joint)
    for module, found in named.items():
        if module in joint and alike:
            continue
        if module in (*joint, embedding) and not alike and not found.is_explicit:
            message = f"{module} is tied to {joint[0] if module == embedding else embedding}, which has other tokens"
            help = "give both the same tokens, or name both modules to part them: tokens [...] in ..."
            fail(SpecError, "E231", message, found.span, help)
        along = tied if module == embedding and alike else ()
        site = known[module]
        width = site.out_features if site.kind == "embedding" else site.in_features
        rows = PlannedRows(module, tuple(found.ids), width, along, spec.rule.rows)
        for each in rows.modules:
            if each in taken:
                help = "let another adapter do one of the two, or leave one out"
                fail(SpecError, "E231", f"{each} has trained tokens, and it {taken[each]} too", found.span, help)
        planned.append(rows)
    return tuple(planned)


def _modules(
    spec: AdapterSpec, clause: Tokens, universe: Universe, embedding: str, known: Collection[str]
) -> Sequence[str]:
    if not clause.modules:
        if embedding not in known:
            help = "name it: tokens [...] in embed_tokens"
            fail(SpecError, "E237", "the model does not say which of its modules embeds tokens", clause.span, help)
        return (embedding,)
    found: dict[str, tree.Selector] = {}
    for selector in clause.modules:
        chosen = select_modules(selector, universe)
        if not chosen:
            missed = misses(selector, None, universe, modules=True)
            raise SpecError(*missed)
        found |= dict.fromkeys(chosen, selector)
    for module, selector in found.items():
        if module not in known:
            message = f"{module} has no row for each token: it is neither an embedding nor a linear layer"
            fail(SpecError, "E237", message, selector.span or clause.span)
    return tuple(found)


def _add(ids: list[int], clause: Tokens, module: str, vocabulary: int) -> None:
    for token in clause.tokens:
        if isinstance(token, str):
            help = "pass tokenizer=..., the one the model is used with, or write ids"
            fail(SpecError, "E227", f"the token '{token}' needs a tokenizer", clause.span, help)
        if not 0 <= token < vocabulary:
            help = "an id is a place in the vocabulary"
            if token >= vocabulary:
                help = "add new tokens to the tokenizer, and pass it: tokenizer=..."
            message = f"there is no token {token}: {module} has {vocabulary}, from 0"
            fail(SpecError, "E229", message, clause.span, help)
        if token in ids:
            fail(SpecError, "E231", f"the token {token} is named twice for {module}", clause.span)
        ids.append(token)


def _vocabulary(site: Site) -> int:
    return site.in_features if site.kind == "embedding" else site.out_features


def _tied(site: Site, known: Collection[str]) -> tuple[str, ...]:
    modules = (name.rpartition(".")[0] for name in site.tied)
    return tuple(module for module in modules if module in known)

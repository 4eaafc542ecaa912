"""Meets a spec with a model: which rule with which values goes to which site. Touches no graph."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from peftc.grammar import tree
from peftc.grammar.bind import bind
from peftc.grammar.diagnostics import Diagnostic, SpecError, did_you_mean, fail
from peftc.grammar.miss import misses
from peftc.grammar.rule import BoundRule, Value
from peftc.grammar.select import Universe, holds, matches_inside, select, select_modules
from peftc.grammar.source import Span
from peftc.grammar.spec import AdapterSpec, Base, Target
from peftc.passes.plan import AdapterPlan, PlannedCopy, PlannedSite
from peftc.passes.site import Site
from peftc.passes.sites import collect, is_quantized, universe


@dataclass(frozen=True)
class Ground:
    """What resolving needs to know of a model."""

    class_names: tuple[str, ...]  # the class and its bases, most derived first
    config: object | None
    sites: tuple[Site, ...]
    universe: Universe
    tensors: Mapping[str, tuple[tuple[int, ...], bool]]  # name -> shape, is it a parameter
    quantized: tuple[str, ...]  # modules whose weights are packed

    @property
    def model_type(self) -> str:
        """config.model_type, or an empty string for a plain module."""
        return str(getattr(self.config, "model_type", ""))


def survey(model: nn.Module) -> Ground:
    """Look a model over, once; plans of any number of adapters follow from it."""
    sites = collect(model)
    parameters = {name: (tuple(each.shape), True) for name, each in model.named_parameters(remove_duplicate=False)}
    buffers = {name: (tuple(each.shape), False) for name, each in model.named_buffers(remove_duplicate=False)}
    saved = set(model.state_dict(keep_vars=True))
    return Ground(
        class_names=tuple(each.__name__ for each in type(model).__mro__),
        config=getattr(model, "config", None),
        sites=sites,
        universe=universe(model, sites),
        tensors={**parameters, **{name: value for name, value in buffers.items() if name in saved}},
        quantized=tuple(name for name, module in model.named_modules() if is_quantized(module)),
    )


def check_base(base: Base | None, ground: Ground) -> None:
    """Raise SpecError unless the model is what the spec's `base` block demands."""
    for entry in base.entries if base else ():
        wanted = entry.value.value if isinstance(entry.value, tree.Number | tree.Text | tree.Flag) else None
        if entry.name == "quantize":
            fail(SpecError, "E240", "quantizing the base from a spec is not supported yet", entry.span)
        if entry.name == "architecture":
            if wanted not in ground.class_names:
                help = f"the model is a {ground.class_names[0]}"
                fail(SpecError, "E241", f"this spec is for a {wanted}", entry.span, help)
            continue
        if ground.config is None or not hasattr(ground.config, entry.name):
            known = [name for name in vars(ground.config) if not name.startswith("_")] if ground.config else []
            fail(
                SpecError,
                "E242",
                f"the model's config has no {entry.name!r}",
                entry.span,
                did_you_mean(entry.name, known),
            )
        found = getattr(ground.config, entry.name)
        if found != wanted:
            message = f"this spec needs {entry.name} = {wanted!r}, the model has {found!r}"
            fail(SpecError, "E243", message, entry.span)


def resolve(spec: AdapterSpec, ground: Ground) -> AdapterPlan:
    """The plan of one adapter. Raises SpecError with every problem that is found."""
    if spec.tokens:
        fail(SpecError, "E244", "trainable tokens are not supported yet", spec.span, "leave the 'tokens' clause out")
    trained = _trained_modules(spec, ground)
    chosen = _chosen(spec, ground, trained)
    sites = {site.name: site for site in ground.sites}
    planned: list[PlannedSite] = []
    problems: list[Diagnostic] = []
    alike: Alike = {}
    for name, (values, span) in chosen.items():
        try:
            planned.append(_at(spec, sites[name], values, span, alike))
        except SpecError as error:
            problems += error.diagnostics
    if problems:
        raise SpecError(*_distinct(problems))
    copies = tuple(_copy(module, ground) for module in trained) + _bias_copies(spec, planned, trained, ground)
    if not planned and not copies:
        fail(SpecError, "E220", f"adapter {spec.name!r} adapts nothing on this model", spec.span)
    return AdapterPlan(spec, tuple(planned), copies)


Chosen = dict[str, tuple[dict[str, Value], Span | None]]


def _chosen(spec: AdapterSpec, ground: Ground, trained: Sequence[str]) -> Chosen:
    """Site name -> the hyperparameters there and the clause that chose it, in model order."""
    targets = spec.on or _default_targets(spec, ground)
    chosen: Chosen = {}
    problems: list[Diagnostic] = []
    for target in targets:
        for selector in target.selectors:
            # A checkpoint may name modules that this model has not; its keys tell whether that matters.
            if spec.strict:
                packed = _quantized_miss(selector, ground)
                problems += [packed] if packed else misses(selector, target.where, ground.universe)
            for each in select(selector, target.where, ground.universe):
                chosen[each.name] = ({**dict(spec.values), **dict(target.overrides)}, selector.span or target.span)
    for target in spec.skip:
        hit = _skipped(spec, target, chosen, ground)
        if not hit and spec.strict:
            problems.append(_ineffective("skip", target))
        for name in hit:
            del chosen[name]
    chosen = {name: value for name, value in chosen.items() if not _inside(name, trained)}
    for target in spec.refine:
        for selector in target.selectors:
            names = {each.name for each in select(selector, target.where, ground.universe)} & set(chosen)
            if not names and spec.strict:
                problems.append(_ineffective("refine", target))
            for name in names:
                values, span = chosen[name]
                chosen[name] = ({**values, **dict(target.overrides)}, target.span or span)
    if problems:
        raise SpecError(*_distinct(problems))
    order = [site.name for site in ground.sites if site.name in chosen]
    return {name: chosen[name] for name in order}


def _skipped(spec: AdapterSpec, target: Target, chosen: Chosen, ground: Ground) -> set[str]:
    """The chosen sites a `skip` takes away. In a spec it reaches everything inside a module; PEFT's reaches names."""
    candidates = {each.name: each for each in ground.universe.candidates}
    if spec.strict:
        hit = {name for name in chosen if any(matches_inside(each, name, ground.universe) for each in target.selectors)}
        return {name for name in hit if target.where is None or holds(target.where, candidates[name])}
    found = [each.name for selector in target.selectors for each in select(selector, target.where, ground.universe)]
    return set(chosen) & set(found)


def _default_targets(spec: AdapterSpec, ground: Ground) -> tuple[Target, ...]:
    if spec.train:
        return ()
    names = spec.rule.default_targets(ground.model_type)
    if not names:
        known = f"models of type {ground.model_type!r}" if ground.model_type else "a plain module"
        fail(
            SpecError,
            "E221",
            f"method {spec.rule.name!r} has no default targets for {known}",
            spec.span,
            "say where the adapter goes, for example: on all linear",
        )
    selectors = tuple(tree.PathSelector((tree.Segment(names=(name,)),)) for name in names)
    # Some defaults name modules that only some models of a type have, so one that matches is enough.
    present = tuple(each for each in selectors if select(each, None, ground.universe))
    return (Target(present or selectors),)


Alike = dict[tuple[object, ...], BoundRule]


def _at(spec: AdapterSpec, site: Site, values: dict[str, Value], span: Span | None, alike: Alike) -> PlannedSite:
    key = (tuple(values.items()), site.out_features, site.in_features, site.kind, site.count)
    if key in alike:  # layers repeat, and a server loads adapters all day
        return PlannedSite(site, alike[key])
    bound = alike[key] = bind(
        spec.rule,
        tuple(values.items()),
        out_features=site.out_features,
        in_features=site.in_features,
        kind=site.kind,
        count=site.count,
        span=span or spec.span,
        strict=spec.strict,
        site=site.name,
    )
    return PlannedSite(site, bound)


def _trained_modules(spec: AdapterSpec, ground: Ground) -> tuple[str, ...]:
    """Modules trained as a whole, outermost only, in model order."""
    found: set[str] = set()
    for selector in spec.train:
        names = [name for name in select_modules(selector, ground.universe) if _tensors_of(name, ground)]
        if spec.strict and (missed := misses(selector, None, ground.universe, modules=True)):
            raise SpecError(*missed)
        if spec.strict and not names:
            fail(SpecError, "E225", "this module has nothing to train", selector.span)
        found.update(names)
    return tuple(name for name in ground.universe.modules if name in found and not _inside(name, found - {name}))


def _copy(module: str, ground: Ground) -> PlannedCopy:
    return PlannedCopy(module, tuple(_tensors_of(module, ground)))


def _tensors_of(module: str, ground: Ground) -> list[tuple[str, tuple[int, ...], bool]]:
    prefix = f"{module}."
    return [
        (name.removeprefix(prefix), shape, trained)
        for name, (shape, trained) in ground.tensors.items()
        if name.startswith(prefix)
    ]


def _bias_copies(
    spec: AdapterSpec, planned: Iterable[PlannedSite], trained: Sequence[str], ground: Ground
) -> tuple[PlannedCopy, ...]:
    if spec.bias == "none":
        return ()
    adapted = {each.site.module for each in planned}
    copies = []
    for name, (shape, is_parameter) in ground.tensors.items():
        module, _, leaf = name.rpartition(".")
        wanted = leaf == "bias" and (spec.bias == "all" or module in adapted)
        if is_parameter and wanted and not _inside(module, trained):
            copies.append(PlannedCopy(module, ((leaf, shape, True),), is_bias=True))
    return tuple(copies)


def _inside(name: str, modules: Iterable[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _ineffective(keyword: str, target: Target) -> Diagnostic:
    return Diagnostic(
        "E223",
        f"this '{keyword}' clause matches no site that an 'on' clause chose",
        target.span,
        "remove it or mend it",
    )


def _quantized_miss(selector: tree.Selector, ground: Ground) -> Diagnostic | None:
    packed = Universe(candidates=(), modules=ground.quantized)
    if not ground.quantized or isinstance(selector, tree.AllSelector) or not select_modules(selector, packed):
        return None
    return Diagnostic("E224", "the modules chosen are quantized, which is not supported yet", selector.span)


def _distinct(problems: Iterable[Diagnostic]) -> list[Diagnostic]:
    """One message per place and code: a wrong rank is said once, not once per layer."""
    seen: dict[tuple[str, Span | None], Diagnostic] = {}
    for each in problems:
        seen.setdefault((each.code, each.span), each)
    return list(seen.values())

"""Meets a spec with a model: which rule with which values goes to which site. Touches no graph."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from peftc.grammar import tree
from peftc.grammar.bind import Place, bind
from peftc.grammar.diagnostics import Diagnostic, SpecError, did_you_mean, fail
from peftc.grammar.miss import misses
from peftc.grammar.rule import BoundParam, BoundRule, Value
from peftc.grammar.select import Candidate, Universe, holds, matches_inside, select, select_modules
from peftc.grammar.source import Span
from peftc.grammar.spec import AdapterSpec, Base, Target
from peftc.passes.places import places
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
    chosen = {} if spec.rule.copies else _chosen(spec, ground, trained)
    sites = {site.name: site for site in ground.sites}
    planned: list[PlannedSite] = []
    problems: list[Diagnostic] = []
    alike: Alike = {}
    for place, (name, (values, span)) in zip(places([sites[name] for name in chosen]), chosen.items(), strict=True):
        try:
            planned.append(PlannedSite(sites[name], _bound(spec, place, values, span, alike)))
        except SpecError as error:
            problems += error.diagnostics
    if problems:
        raise SpecError(*_distinct(problems))
    _check_shared(spec, planned)
    copies = tuple(_copy(module, ground) for module in trained) + _chosen_copies(spec, trained, ground)
    copies += _bias_copies(spec, planned, [each.module for each in copies], ground)
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
    defaults = spec.rule.default_targets(ground.model_type)
    if not defaults:
        known = f"models of type {ground.model_type!r}" if ground.model_type else "a plain module"
        fail(
            SpecError,
            "E221",
            f"method {spec.rule.name!r} has no default targets for {known}",
            spec.span,
            "say where the adapter goes, for example: on all linear",
        )
    targets = []
    for names, overrides in defaults:
        paths = (tuple(tree.Segment(names=(part,)) for part in name.split(".")) for name in names)
        selectors = tuple(map(tree.PathSelector, paths))
        # Some defaults name modules that only some models of a type have, so one that matches is enough.
        among = select_modules if spec.rule.copies else _select
        present = tuple(each for each in selectors if among(each, ground.universe))
        targets.append(Target(present or selectors, overrides=overrides))
    return tuple(targets)


def _select(selector: tree.Selector, universe: Universe) -> tuple[Candidate, ...]:
    return select(selector, None, universe)


Alike = dict[tuple[object, ...], BoundRule]


def _check_shared(spec: AdapterSpec, planned: Sequence[PlannedSite]) -> None:
    """What sites share must be the same tensor for all: settings that change it cannot differ between sites."""
    known: dict[tuple[str, int | str | None], tuple[BoundParam, str]] = {}
    for at in planned:
        for each in at.bound.starts:
            other, first = known.setdefault((each.role, each.group), (each, at.site.name))
            if each.shared and other != each:
                message = (
                    f"'{each.role}' of '{spec.rule.name}' is shared, but not the same at {first} and {at.site.name}"
                )
                fail(SpecError, "E226", message, spec.span, "give all sites of the adapter the same settings")


def _bound(spec: AdapterSpec, place: Place, values: dict[str, Value], span: Span | None, alike: Alike) -> BoundRule:
    if not spec.rule.counts_sites:
        place = replace(place, index=0, before=(0, 0), category="", members=1, tallest=0)
    key = (tuple(values.items()), place)
    if key not in alike:  # layers repeat, and a server loads adapters all day
        alike[key] = bind(spec.rule, tuple(values.items()), place, span=span or spec.span, strict=spec.strict)
    return alike[key]


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


def _chosen_copies(spec: AdapterSpec, trained: Sequence[str], ground: Ground) -> tuple[PlannedCopy, ...]:
    """The modules that `on` names, for a method that trains copies of them."""
    if not spec.rule.copies:
        return ()
    found: dict[str, tree.Selector] = {}
    for target in spec.on or _default_targets(spec, ground):
        if spec.strict and target.where is not None:
            fail(SpecError, "E225", f"'{spec.rule.name}' takes whole modules: 'where' knows none", target.span)
        for selector in target.selectors:
            if spec.strict and (missed := misses(selector, None, ground.universe, modules=True)):
                raise SpecError(*missed)
            found.update(dict.fromkeys(select_modules(selector, ground.universe), selector))
    skipped = {
        name for target in spec.skip for each in target.selectors for name in select_modules(each, ground.universe)
    }
    copies = []
    for module in ground.universe.modules:
        if module not in found or module in skipped or _inside(module, trained):
            continue
        tensors = tuple(_tensors_of(module, ground))
        if not tensors or any("." in name for name, _, _ in tensors):
            message = f"'{spec.rule.name}' trains modules with tensors of their own, and {module} is none"
            fail(SpecError, "E225", message, found[module].span)
        copies.append(PlannedCopy(module, tensors, saved=spec.rule.copies))
    return tuple(copies)


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

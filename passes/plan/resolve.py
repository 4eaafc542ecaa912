"""Meets a spec with a model: which rule with which values goes to which site. Touches no graph."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from peftc.grammar.diagnostics import Diagnostic, SpecError, did_you_mean, fail
from peftc.grammar.method.bind import Place, bind
from peftc.grammar.method.rule import LAST, BoundParam, BoundRule, Value
from peftc.grammar.source import Span
from peftc.grammar.spec.no_match import misses
from peftc.grammar.spec.select import Candidate, Universe, holds, matches_inside, select, select_modules
from peftc.grammar.spec.spec import AdapterSpec, Base, Target
from peftc.grammar.syntax import tree
from peftc.passes.plan.fronts import fronts
from peftc.passes.plan.places import places
from peftc.passes.plan.plan import AdapterPlan, PlannedSite
from peftc.passes.plan.resolve_copies import (
    Tensors,
    bias_copies,
    chosen_copies,
    inside,
    trained_copies,
    trained_modules,
)
from peftc.passes.plan.resolve_packed import check_unpacked
from peftc.passes.plan.resolve_rows import planned_rows
from peftc.passes.plan.site import WHOLE, Site
from peftc.passes.plan.sites import collect, input_embedding, output_head, tied_names, universe

KEPT = 8
"""Of how many different specs a survey keeps the plan."""


@dataclass(frozen=True)
class ModelSurvey:
    """What resolving needs to know of a model."""

    class_names: tuple[str, ...]  # the class and its bases, most derived first
    config: object | None
    sites: tuple[Site, ...]
    universe: Universe
    tensors: Mapping[str, tuple[tuple[int, ...], bool]]  # name -> shape, is it a parameter
    ties: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # name of a tensor -> all its names
    fronts: tuple[Site, ...] = ()  # places that are no weight
    embedding: str = ""  # the module that embeds tokens, if the model says so
    head: str = ""  # the module that turns hidden states into logits, if the model says so
    _plans: list[AdapterPlan] = field(default_factory=list, init=False, repr=False, compare=False)

    @property
    def model_type(self) -> str:
        """config.model_type, or an empty string for a plain module."""
        return str(getattr(self.config, "model_type", ""))

    def known(self, spec: AdapterSpec) -> AdapterPlan | None:
        """A plan that was made of a spec like this one, whatever that was called: servers load such ones all day."""
        found = next((each for each in self._plans if replace(each.spec, name=spec.name) == spec), None)
        return None if found is None else replace(found, spec=spec)

    def keep(self, plan: AdapterPlan) -> None:
        """Remember a plan, and of those before it the latest."""
        self._plans[:] = [plan, *self._plans[: KEPT - 1]]


def survey(model: nn.Module) -> ModelSurvey:
    """Look a model over, once; plans of any number of adapters follow from it."""
    sites = collect(model)
    parameters = {name: (tuple(each.shape), True) for name, each in model.named_parameters(remove_duplicate=False)}
    buffers = {name: (tuple(each.shape), False) for name, each in model.named_buffers(remove_duplicate=False)}
    saved = set(model.state_dict(keep_vars=True))
    return ModelSurvey(
        class_names=tuple(each.__name__ for each in type(model).__mro__),
        config=getattr(model, "config", None),
        sites=sites,
        universe=universe(model, sites),
        tensors={**parameters, **{name: value for name, value in buffers.items() if name in saved}},
        ties=tied_names(model),
        fronts=fronts(model),
        embedding=input_embedding(model),
        head=output_head(model),
    )


def check_base(base: Base | None, ground: ModelSurvey) -> None:
    """Raise SpecError unless the model is what the spec's `base` block demands; how it is stored is not looked at."""
    for entry in base.entries if base else ():
        wanted = entry.value.value if isinstance(entry.value, tree.Number | tree.Text | tree.Flag) else None
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
                did_you_mean(entry.name, ("architecture", *known)),
            )
        found = getattr(ground.config, entry.name)
        if found != wanted:
            message = f"this spec needs {entry.name} = {wanted!r}, the model has {found!r}"
            fail(SpecError, "E243", message, entry.span)


def resolve(spec: AdapterSpec, ground: ModelSurvey) -> AdapterPlan:
    """The plan of one adapter. Raises SpecError with every problem that is found."""
    plan = ground.known(spec)
    if plan is None:
        plan = _resolved(spec, ground)
        ground.keep(plan)
    return plan


def _resolved(spec: AdapterSpec, ground: ModelSurvey) -> AdapterPlan:
    _check_rows(spec)
    tensors = Tensors(ground.universe, ground.tensors, ground.ties)
    trained = trained_modules(spec, tensors)
    if spec.rule.prompt is not None:
        sites = {site.name: site for site in ground.fronts if site.kind in spec.rule.kinds}
        chosen = _chosen_places(spec, ground, sites)
    else:
        sites = {site.name: site for site in ground.sites}
        chosen = {} if spec.rule.copies or spec.rule.rows else _chosen(spec, ground, trained)
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
    copies = trained_copies(spec, trained, tensors)
    if spec.rule.copies:
        copies += chosen_copies(spec, spec.on or _default_targets(spec, ground), trained, tensors)
    copies += bias_copies(spec, planned, [each.module for each in copies], tensors)
    taken = {each.module: "is trained as a whole" for each in copies if not each.is_bias}
    taken |= {at.site.module: f"is adapted by '{spec.rule.name}'" for at in planned if at.bound.prompt is None}
    taken |= {module: "is trained as a whole" for module in ground.universe.modules if inside(module, trained)}
    tied = {full.rpartition(".")[0] for each in copies for _, full in each.tied}
    taken |= dict.fromkeys(tied, "is trained as a whole")
    rows = planned_rows(spec, ground.sites, ground.universe, ground.embedding, taken)
    check_unpacked(spec, copies, rows, ground.sites, ground.universe)
    if not planned and not copies and not rows:
        fail(SpecError, "E220", f"adapter {spec.name!r} adapts nothing on this model", spec.span)
    return AdapterPlan(spec, tuple(planned), copies, rows)


def _check_rows(spec: AdapterSpec) -> None:
    """A method that trains rows takes tokens and no modules."""
    if not spec.rule.rows:
        return
    clauses = (*spec.on, *spec.refine, *spec.skip, *spec.train)
    if clauses or spec.bias != "none":
        help = "modules are named with their tokens: tokens [...] in lm_head"
        span = clauses[0].span if clauses else spec.span
        fail(SpecError, "E230", f"'{spec.rule.name}' trains tokens and nothing else", span, help)
    if not spec.tokens:
        help = 'name them: tokens ["<tool>", 17]'
        fail(SpecError, "E230", f"'{spec.rule.name}' trains tokens, and there are none", spec.span, help)


Chosen = dict[str, tuple[dict[str, Value], Span | None]]


def _chosen(spec: AdapterSpec, ground: ModelSurvey, trained: Collection[str]) -> Chosen:
    """Site name -> the hyperparameters there and the clause that chose it, in model order."""
    targets = spec.on or _default_targets(spec, ground)
    chosen: Chosen = {}
    problems: list[Diagnostic] = []
    for target in targets:
        for selector in target.selectors:
            # A checkpoint may name modules that this model has not; its keys tell whether that matters.
            if spec.strict:
                problems += misses(selector, target.where, ground.universe)
            for each in select(selector, target.where, ground.universe):
                chosen[each.name] = ({**dict(spec.values), **dict(target.overrides)}, selector.span or target.span)
    for target in spec.skip:
        hit = _skipped(spec, target, targets, chosen, ground)
        if not hit and spec.strict:
            problems.append(_ineffective("skip", target))
        for name in hit:
            del chosen[name]
    left = {name: value for name, value in chosen.items() if not inside(name, trained)}
    if chosen and not left and spec.strict:
        span = targets[0].selectors[0].span or targets[0].span
        help = "leave one of the two out"
        fail(SpecError, "E239", "all that 'on' chooses is trained as a whole, by 'train'", span, help)
    chosen = left
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


def _chosen_places(spec: AdapterSpec, ground: ModelSurvey, sites: Mapping[str, Site]) -> Chosen:
    """The places that are no weight: the model has one, or they are modules that `on` may choose from."""
    (kind,), name = spec.rule.kinds, spec.rule.name
    if not sites:
        what = {"prompt": "token embeddings", "cache": "attention of known sizes", "attention": "attention"}[kind]
        help = "it is for transformers models of text" if kind == "prompt" else "it is for transformers models"
        fail(SpecError, "E232", f"'{name}' needs {what}, and {ground.class_names[0]} has none", spec.span, help)
    clauses = (*spec.on, *spec.refine, *spec.skip)
    if kind in WHOLE and clauses:
        message = f"'{name}' is of the whole model: there is nothing to choose"
        fail(SpecError, "E233", message, clauses[0].span, "leave 'on', 'refine' and 'skip' out")
    values = dict(spec.values)
    chosen: Chosen = {} if spec.on else dict.fromkeys(sites, (values, spec.span))
    for target in spec.on:
        if target.where is not None:
            fail(SpecError, "E236", f"'{name}' takes whole modules: 'where' knows none", target.span)
        for selector in target.selectors:
            hit = list(select_modules(selector, Universe((), tuple(sites))))
            if not hit and spec.strict:
                known = f"the places are {', '.join(list(sites)[:4])}{', ...' * (len(sites) > 4)}"
                fail(SpecError, "E234", "this chooses no attention module", selector.span or target.span, known)
            chosen |= {each: ({**values, **dict(target.overrides)}, selector.span) for each in hit}
    for target in (*spec.refine, *spec.skip):
        message = f"'{name}' takes 'on' and no other clause that chooses"
        fail(SpecError, "E233", message, target.span, "name the modules in 'on'")
    chosen = {each: chosen[each] for each in sites if each in chosen}
    return chosen if kind in WHOLE else _last(spec, chosen, tuple(sites))


def _last(spec: AdapterSpec, chosen: Chosen, sites: Sequence[str]) -> Chosen:
    """As many of the chosen modules as the adapter says, the last ones. Each then says how many there are.

    None where they are not the last of the model, which their number would mean.
    """
    counts = {values.get(LAST) for values, _ in chosen.values()} - {None}
    if not any(each.name == LAST for each in spec.rule.hyperparameters) or not chosen:
        return chosen
    count = counts.pop() if counts else len(chosen)
    assert isinstance(count, int)
    if counts or count > len(chosen) or (count < 1 and spec.strict):
        there = f"there are {len(chosen)} attention modules" if not counts else "it is one number for all"
        fail(SpecError, "E235", f"'{spec.rule.name}' cannot be for the last {count} layers: {there}", spec.span)
    kept = dict(list(chosen.items())[-count:])  # of PEFT's, the last 0 are all
    told = len(kept) if tuple(kept) == tuple(sites)[-len(kept) :] else None
    return {name: ({**values, LAST: told}, span) for name, (values, span) in kept.items()}


def _skipped(
    spec: AdapterSpec, skip: Target, targets: Sequence[Target], chosen: Chosen, ground: ModelSurvey
) -> set[str]:
    """The chosen sites a `skip` takes away. In a spec it reaches everything inside a module.

    PEFT's reaches names, and with a `where` only what no clause with another one chose: PEFT leaves modules out, and
    their weights can be named as parameters all the same.
    """
    candidates = {each.name: each for each in ground.universe.candidates}
    if spec.strict:
        hit = {name for name in chosen if any(matches_inside(each, name, ground.universe) for each in skip.selectors)}
        return {name for name in hit if skip.where is None or holds(skip.where, candidates[name])}
    apart = [each for each in targets if skip.where is not None and each.where not in (None, skip.where)]
    return set(chosen) & selected((skip,), ground) - selected(apart, ground)


def selected(targets: Iterable[Target], ground: ModelSurvey) -> set[str]:
    """The sites that clauses choose, each by itself."""
    pairs = ((selector, each.where) for each in targets for selector in each.selectors)
    return {found.name for selector, where in pairs for found in select(selector, where, ground.universe)}


def _default_targets(spec: AdapterSpec, ground: ModelSurvey) -> tuple[Target, ...]:
    return () if spec.train else usual_targets(spec, ground)


def usual_targets(spec: AdapterSpec, ground: ModelSurvey) -> tuple[Target, ...]:
    """What a method adapts of models of this type where nothing is named. Raises SpecError (E221) if it knows none."""
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


def _ineffective(keyword: str, target: Target) -> Diagnostic:
    return Diagnostic(
        "E223",
        f"this '{keyword}' clause matches no site that an 'on' clause chose",
        target.span,
        "remove it or mend it",
    )


def _distinct(problems: Iterable[Diagnostic]) -> list[Diagnostic]:
    """One message per place and code: a wrong rank is said once, not once per layer."""
    seen: dict[tuple[str, Span | None], Diagnostic] = {}
    for each in problems:
        seen.setdefault((each.code, each.span), each)
    return list(seen.values())

"""An adapter of a model as it was, carried over to the model as it is: the same changes to the same weights.

Under another name an adapter stays what it is. Linears of experts that are one stack today become one adapter of the
stack: their tensors side by side. Where several linears of an expert lie one below the other in it, its ranks are all
of theirs: `[B_1 A_1; B_2 A_2] = diag(B_1, B_2) [A_1; A_2]`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

import torch
from torch import Tensor

from peftc.grammar.algebra import algebra
from peftc.grammar.diagnostics import CheckpointError, SpecError, fail
from peftc.grammar.method.bind import Place, bind
from peftc.grammar.method.rule import BoundParam, ParamRule, Value
from peftc.grammar.spec.spec import AdapterSpec, Target, Tokens
from peftc.grammar.syntax import tree
from peftc.passes.expression.materialise import restack
from peftc.passes.plan.earlier import Earlier, Slot
from peftc.passes.plan.plan import AdapterPlan, ParamKey, PlannedSite
from peftc.passes.plan.resolve import ModelSurvey, resolve
from peftc.runtime.peft_format.peft_names import minimal_suffixes, suffix_selector

_ROWS, _COLUMNS = tree.Name("out"), tree.Name("in")
_ELEMENTWISE = ("divide", "stop_gradient")  # functions that keep the rows of what they are given apart
_OVER_ROW = ("norm", (1,))  # one that has a number for each row


Tensors = Mapping[ParamKey, Tensor]
Masks = Mapping[ParamKey, Sequence[bool]]


def carried(
    plan: AdapterPlan, tensors: Tensors, masks: Masks, earlier: Earlier, ground: ModelSurvey, where: str
) -> tuple[AdapterPlan, dict[ParamKey, Tensor], dict[ParamKey, Sequence[bool]]]:
    """The adapter that does on the model of today, `ground`, what `plan` with these did on the model as it was.

    Raises:
        CheckpointError: E346, no adapter of a stack does what those of its parts did.
    """
    stacks = _stacks(plan, earlier, ground, where)
    wanted = {name: stack.values(where) for name, stack in stacks.items()}
    for at in plan.sites:
        wanted.setdefault(earlier.site(at.site.name), dict(at.bound.values))
    spec = _spec(plan, wanted, earlier, ground)
    try:
        made = resolve(spec, ground)
    except SpecError as error:
        text = "; ".join(each.message for each in error.diagnostics)
        fail(CheckpointError, "E346", f"the model has other weights in its place today: {text}", where=where)
    found = {at.site.name: at for at in made.sites}
    if set(found) != set(wanted):
        _refuse(min(set(found) ^ set(wanted)), "it is no weight that the method knows", where)
    for name, stack in stacks.items():
        if any(at.key(plan.name, param) in masks for at in stack.sites.values() for param in at.own):
            _refuse(name, "ranks of its parts were dropped", where)
    of_parts = {at.site.name for stack in stacks.values() for at in stack.sites.values()}
    kept = {key: key._replace(site=earlier.site(key.site)) for key in tensors if key.site not in of_parts}
    moved = {kept[key]: tensor for key, tensor in tensors.items() if key in kept}
    for name, stack in stacks.items():
        moved |= stack.tensors(plan.name, tensors, found[name], where)
    _check(plan, made, moved, earlier, where)
    return made, moved, {kept.get(key, key): each for key, each in masks.items()}


# --- the plan ---


def _spec(
    plan: AdapterPlan, wanted: Mapping[str, Mapping[str, Value]], earlier: Earlier, ground: ModelSurvey
) -> AdapterSpec:
    """The adapter's spec by the names of today, every site as it is to be."""
    groups: dict[tuple[tuple[str, Value], ...], list[str]] = {}
    usual = dict(plan.spec.values)
    for site in ground.sites:
        if site.name in wanted:
            values = wanted[site.name].items()
            groups.setdefault(tuple(each for each in values if usual[each[0]] != each[1]), []).append(site.name)
    names = [site.name for site in ground.sites]
    on = tuple(Target(_selectors(group, names), overrides=values) for values, group in groups.items())
    modules = ground.universe.modules
    copies = [each for each in plan.copies if not each.is_bias and not each.saved]
    train = _selectors([earlier.module(each.module) for each in copies], modules) if copies else ()
    tied = _selectors([earlier.module(each.module) for each in copies if each.tied], modules)
    tokens = tuple(
        Tokens(each.ids, _selectors([earlier.module(each.module)], modules)) if plan.spec.rule.rows else own
        for each, own in zip(plan.rows, plan.spec.tokens, strict=False)
    )
    saved = [earlier.module(each.module) for each in plan.copies if each.saved]
    if saved:
        on = (Target(_selectors(saved, modules)),)
    tied = tuple(each for each in train if each in tied)
    return replace(plan.spec, on=on, refine=(), skip=(), train=train, tied=tied, tokens=tokens)


def _selectors(chosen: Sequence[str], names: Sequence[str]) -> tuple[tree.Selector, ...]:
    """Selectors of exactly these among the names."""
    suffixes = minimal_suffixes(chosen, names)
    if suffixes is None:
        return tuple(tree.PatternSelector(name.replace(".", r"\.")) for name in chosen)
    return tuple(map(suffix_selector, suffixes))


def _check(before: AdapterPlan, made: AdapterPlan, tensors: Tensors, earlier: Earlier, where: str) -> None:
    """The same formula over tensors of the sizes that it needs at every site, and a tensor for every one."""
    old = {earlier.site(at.site.name): at.bound for at in before.sites}
    for at in made.sites:
        bound = old[at.site.name]
        if _unsized(at.bound.weight) != _unsized(bound.weight) or not _equal(
            dict(at.bound.scalars), dict(bound.scalars)
        ):
            _refuse(at.site.name, f"'{at.bound.rule.name}' would compute something else there", where)
        for param in at.bound.params:
            tensor = tensors.get(at.key(made.name, param))
            if (tensor is None and not param.optional) or (tensor is not None and tuple(tensor.shape) != param.shape):
                _refuse(at.site.name, f"'{param.role}' is of another size there", where)


def _unsized(matrix: algebra.Matrix) -> algebra.Matrix:
    """The formula without the sizes that columns of numbers are laid out in: a whole has more rows than its parts."""
    match matrix:
        case algebra.Function("reshape", operands):
            return algebra.Function("reshape", tuple(map(_unsized, operands)))
    return algebra.rebuild(matrix, _unsized)


def _refuse(site: str, why: str, where: str) -> NoReturn:
    fail(
        CheckpointError,
        "E346",
        f"what was adapted apart is one weight, {site}, today: {why}",
        help="load it with the release of transformers that it was trained with, and merge it there",
        where=where,
    )


# --- stacks ---


@dataclass(frozen=True)
class _Stack:
    """The adapted parts of a stack."""

    name: str
    count: int
    slots: Mapping[str, Slot]  # all that there are, by their earlier names
    sites: Mapping[Slot, PlannedSite]  # those that are adapted

    @property
    def any(self) -> PlannedSite:
        return next(iter(self.sites.values()))

    @property
    def parts(self) -> int:
        return next(iter(self.sites)).parts

    def values(self, where: str) -> dict[str, Value]:
        """The hyperparameters of the whole: with several parts of an expert, of all their ranks together."""
        values = dict(self.any.bound.values)
        for at in self.sites.values():
            other = next((name for name, value in at.bound.values if values[name] != value), None)
            if other is not None:
                _refuse(self.name, f"'{other}' differs between {self.any.site.name} and {at.site.name}", where)
        complete = len(self.sites) == self.count * self.parts
        if self.parts == 1 and complete:
            return values
        ranks = _ranks(self.any)
        if ranks is None or not (complete or _is_none_without(self.any)):
            missing = next((name for name, slot in self.slots.items() if slot not in self.sites), "")
            name = self.any.bound.rule.name
            why = f"'{name}' does not add up rows by rows" if complete else f"{missing} is not adapted by this '{name}'"
            _refuse(self.name, why, where)
        if self.parts == 1:
            return values
        found = values if not ranks else _with_rank(self.any, ranks, self.parts)
        if found is None:
            _refuse(self.name, "its scale depends on its rank in a way of its own", where)
        return found

    def tensors(self, adapter: str, given: Tensors, at: PlannedSite, where: str) -> dict[ParamKey, Tensor]:
        """The tensors of the stack."""
        rules = {each.role: each for each in at.bound.rule.params}
        found: dict[ParamKey, Tensor] = {}
        for own in self.any.own:
            if self.any.key(adapter, own) not in given:
                continue
            param = next((each for each in at.own if each.role == own.role), None)
            if param is None:
                _refuse(self.name, f"it has no '{own.role}' there", where)
            experts = [
                _joined([self._of(adapter, given, own, expert, part) for part in range(self.parts)], rules[own.role])
                for expert in range(self.count)
            ]
            whole = restack(torch.stack(experts), param.stacked_axis, at.site)
            if whole.numel() != math.prod(param.shape):
                _refuse(self.name, f"'{own.role}' is of another size there", where)
            found[at.key(adapter, param)] = whole.reshape(param.shape).contiguous()
        return found

    def _of(self, adapter: str, given: Tensors, param: BoundParam, expert: int, part: int) -> Tensor:
        """A tensor of one part; zeros where the part is not adapted."""
        at = self.sites.get(Slot(self.name, expert, part, self.parts))
        if at is None:
            return torch.zeros_like(given[self.any.key(adapter, param)])
        return given[at.key(adapter, param)]


def _stacks(plan: AdapterPlan, earlier: Earlier, ground: ModelSurvey, where: str) -> dict[str, _Stack]:
    counts = {site.name: site.count for site in ground.sites}
    adapted: dict[str, dict[Slot, PlannedSite]] = {}
    for at in plan.sites:
        slot = earlier.slots.get(at.site.name)
        if slot is not None:
            adapted.setdefault(slot.site, {})[slot] = at
    slots: dict[str, dict[str, Slot]] = {}
    for name, slot in earlier.slots.items():
        slots.setdefault(slot.site, {})[name] = slot
    return {name: _Stack(name, counts[name], slots[name], sites) for name, sites in adapted.items()}


def _joined(parts: Sequence[Tensor], rule: ParamRule) -> Tensor:
    """One tensor of an expert: of its parts' rows one below the other, each over ranks of its own."""
    if len(parts) == 1:
        return parts[0]
    if len(rule.shape) == 2 and rule.shape[0] == _ROWS and rule.shape[1] != tree.Number(1):
        return torch.block_diag(*parts)  # type: ignore[no-untyped-call]
    return torch.cat(list(parts))


def _ranks(at: PlannedSite) -> str | None:
    """The hyperparameter that is the rank of a formula whose rows stand apart, "" if it has none; else None."""
    rules = {each.role: each for each in at.bound.rule.params}
    names = {each.name for each in at.bound.rule.hyperparameters}
    ranks: set[str] = set()
    for param in at.bound.params:
        match rules[param.role].shape:
            case (tree.Name("out"), tree.Name(rank)) | (tree.Name(rank), tree.Name("in")) if rank in names:
                ranks.add(rank)
            case (tree.Name("out"),) | (tree.Name("out"), tree.Number(1)):
                pass
            case _:
                return None
        if param.shared:
            return None
    shapes = {role: rule.shape for role, rule in rules.items()}
    apart = not _adds_bias(at.bound.bias) and _rows_apart(at.bound.weight, shapes)
    return "".join(ranks) if apart and len(ranks) < 2 else None


def _adds_bias(bias: algebra.Matrix | None) -> bool:
    """Whether there is a bias where the linear has none."""
    return bias is not None and algebra.without_bias(bias) is not None


def _rows_apart(matrix: algebra.Matrix, shapes: Mapping[str, tuple[tree.Expr, ...]]) -> bool:
    """Whether each row of the value is of that row of the weight, and of the tensors with rows, and of no other."""

    def apart(each: algebra.Matrix) -> bool:
        match each:
            case algebra.Weight():
                return True
            case algebra.Param(role):
                return shapes[role] in ((_ROWS,), (_ROWS, tree.Number(1)))
            case algebra.Product(algebra.Param(left), algebra.Param(right) | algebra.Dropped(algebra.Param(right), _)):
                return shapes[left][0] == _ROWS and shapes[right][-1] == _COLUMNS
            case algebra.Sum(left, right) | algebra.Hadamard(left, right):
                return apart(left) and apart(right)
            case algebra.Scaled(_, operand) | algebra.Dropped(operand, _):
                return apart(operand)
            case algebra.Function("reshape", (operand,)):
                return isinstance(operand, algebra.Param) and apart(operand)
            case algebra.Function(name, operands, options):
                return (name in _ELEMENTWISE or (name, options) == _OVER_ROW) and all(map(apart, operands))
        return False

    return apart(matrix)


def _is_none_without(at: PlannedSite) -> bool:
    """Whether the method changes nothing where its tensors are zeros: they are in products that are added, alone."""

    def vanishes(each: algebra.Matrix) -> bool:
        match each:
            case algebra.Product():
                return True
            case algebra.Hadamard(left, right):
                return vanishes(left) or vanishes(right)
            case algebra.Scaled(_, operand) | algebra.Dropped(operand, _):
                return vanishes(operand)
        return False

    match at.bound.weight:
        case algebra.Sum(algebra.Weight(), change):
            return vanishes(change)
    return False


def _with_rank(at: PlannedSite, rank: str, parts: int) -> dict[str, Value] | None:
    """The values for so many times the rank, with which all that is scaled is scaled as before; None if there are none.

    What a method divides by its rank, or by the root of that, is raised with it.
    """
    bound, site = at.bound, at.site
    values = dict(bound.values)
    own = values[rank]
    assert isinstance(own, int)
    values[rank] = own * parts
    floats = [each.name for each in bound.rule.hyperparameters if each.type == "float"]
    raised = [(name, factor) for name in floats for factor in (parts, math.sqrt(parts))]
    place = Place(site.kind, site.out_features * parts, site.in_features, has_bias=False)
    for name, factor in [("", 1), *raised]:
        value = values.get(name)
        found = {**values, name: value * factor} if isinstance(value, float | int) else values
        scalars = dict(bind(bound.rule, tuple(found.items()), place, strict=False).scalars)
        if _equal(scalars, dict(bound.scalars)):
            return found
    return None


def _equal(scalars: Mapping[str, float], others: Mapping[str, float]) -> bool:
    return scalars.keys() == others.keys() and all(
        math.isclose(value, others[name], rel_tol=1e-6) for name, value in scalars.items()
    )

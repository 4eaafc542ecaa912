"""The `allocate` item of a method: a budget of entries of a vector, dealt out over the sites while training."""

from collections.abc import Callable, Mapping, Sequence

from peftc.grammar.algebra.shapes import Dim, Shape
from peftc.grammar.diagnostics import SpecError, did_you_mean, fail
from peftc.grammar.method.infer import INT, Type, need
from peftc.grammar.method.infer import number as need_number
from peftc.grammar.method.rule import Allocation, AllocationRule, ParamRule, Schedule, Value
from peftc.grammar.source import Span
from peftc.grammar.syntax import tree

# What can be said between the braces, its default (None: it must be said), and whether it is a whole number.
SETTINGS: Mapping[str, tuple[float | None, bool]] = {
    "target": (None, True),
    "steps": (None, True),
    "warmup": (0, True),
    "final": (0, True),
    "every": (1, True),
    "sensitivity": (0.85, False),
    "uncertainty": (0.85, False),
    "orthogonal": (0.0, False),
}
_ONE = Dim.constant(1)


def check_allocation(
    item: tree.AllocateItem,
    params: Sequence[ParamRule],
    kinds: Sequence[str],
    names: Mapping[str, Type],
    infer: Callable[[tree.Expr], Type],
) -> AllocationRule:
    """The rule an item stands for; `names` gives shapes, `infer` types. Raises SpecError (E13x)."""
    if "parameter" in kinds:
        message = "'allocate' counts the entries of one weight, and a 'parameter' may be a stack of them"
        fail(SpecError, "E157", message, item.span)
    trained = {each.role: each for each in params if each.trained and not each.shared}
    for name in (item.vector, *item.partners):
        if name not in trained:
            help = did_you_mean(name, trained) or "name parameters of a site, defined before"
            fail(SpecError, "E130", f"'{name}' is not a parameter of a site", item.span, help=help)
    sizes = {name: _sizes(names[name]) for name in (item.vector, *item.partners)}
    own = [axis for axis, size in enumerate(sizes[item.vector]) if size != _ONE]
    if len(own) != 1:
        message = f"'{item.vector}' is not a vector: one of its sizes counts its entries, and the others are 1"
        fail(SpecError, "E133", message, item.span)
    count = sizes[item.vector][own[0]]
    axes = [(item.vector, own[0])]
    for name in item.partners:
        found = [axis for axis, size in enumerate(sizes[name]) if size == count]
        if len(found) != 1:
            message = f"one size of '{name}' has to be {count}, as of '{item.vector}', so that entries have parts in it"
            fail(SpecError, "E133", message, item.span)
        axes.append((name, found[0]))
    return AllocationRule(tuple(axes), _settings(item, infer))


def _sizes(type: Type) -> tuple[Dim, ...]:
    assert isinstance(type, Shape)
    return type.sizes


def _settings(item: tree.AllocateItem, infer: Callable[[tree.Expr], Type]) -> tuple[tuple[str, tree.Expr], ...]:
    given: dict[str, tree.Expr] = {}
    for each in item.settings:
        name = str(each.name)
        if name not in SETTINGS:
            help = did_you_mean(name, SETTINGS) or f"there are {', '.join(SETTINGS)}"
            fail(SpecError, "E157", f"'{name}' is not a setting of 'allocate'", each.span, help=help)
        if name in given:
            fail(SpecError, "E131", f"'{name}' is given twice", each.span)
        found = infer(each.value)
        if SETTINGS[name][1]:
            need(each.value, found, INT, f"'{name}'")
        else:
            need_number(each.value, found, f"'{name}'")
        given[name] = each.value
    for name, (default, _) in SETTINGS.items():
        if default is None and name not in given:
            fail(SpecError, "E157", f"'allocate' does not say its '{name}'", item.span)
    return tuple(given.items())


def bound_allocation(rule: AllocationRule, scalar: Callable[[tree.Expr], Value]) -> Allocation:
    """The item at a site."""
    values = {name: default for name, (default, _) in SETTINGS.items()}
    for name, expr in rule.settings:
        value = scalar(expr)
        assert isinstance(value, int | float), value
        values[name] = value
    whole = {name: int(values[name] or 0) for name, (_, is_whole) in SETTINGS.items() if is_whole}
    schedule = Schedule(
        steps=whole["steps"],
        warmup=whole["warmup"],
        final=whole["final"],
        every=whole["every"],
        sensitivity=float(values["sensitivity"] or 0),
        uncertainty=float(values["uncertainty"] or 0),
        orthogonal=float(values["orthogonal"] or 0),
    )
    return Allocation(rule.axes, whole["target"], schedule)


def check_schedule(allocation: Allocation, count: int, where: str, span: Span | None) -> None:
    """Raise SpecError (E21x) where a budget cannot be kept: `count` are the entries there are."""
    schedule = allocation.schedule
    if not 0 <= allocation.target <= count:
        message = f"a target of {allocation.target} does not fit {where}, which starts with {count}"
        fail(SpecError, "E218", message, span, help=f"a target is at most {count}")
    if min(schedule.steps, schedule.warmup, schedule.final, schedule.every - 1) < 0:
        message = "steps are counted from 0, and the budget falls every step, every second, ..."
        fail(SpecError, "E218", message, span)
    left = schedule.steps - schedule.final
    if schedule.steps and not schedule.warmup < left:
        message = f"{schedule.steps} steps leave none to lower the budget in: "
        message += f"{schedule.warmup} come before and {schedule.final} after"
        fail(SpecError, "E218", message, span, help="take more steps, or fewer before and after")
    for name, value in (("sensitivity", schedule.sensitivity), ("uncertainty", schedule.uncertainty)):
        if not 0 < value < 1:
            fail(SpecError, "E218", f"a smoothing of {name} by {value:g}: it must lie between 0 and 1", span)
    if schedule.orthogonal < 0:
        message = f"a regulariser's weight of {schedule.orthogonal:g} rewards what it is to prevent"
        fail(SpecError, "E218", message, span)

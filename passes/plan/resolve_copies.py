"""Meets `train` and `bias`, and methods that train copies, with a model: which of its tensors get copies."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from peftc.grammar.diagnostics import SpecError, fail
from peftc.grammar.spec.no_match import misses
from peftc.grammar.spec.select import Universe, select_modules
from peftc.grammar.spec.spec import AdapterSpec, Target
from peftc.grammar.syntax import tree
from peftc.passes.plan.plan import PlannedCopy, PlannedSite


@dataclass(frozen=True)
class Tensors:
    """What a model has to make copies of."""

    universe: Universe
    shapes: Mapping[str, tuple[tuple[int, ...], bool]]  # name -> shape, is it a parameter
    ties: Mapping[str, tuple[str, ...]]  # name -> all names of the same tensor

    def of(self, module: str) -> tuple[tuple[str, tuple[int, ...], bool], ...]:
        """A module's tensors, and those of what is in it, by their names there."""
        prefix = f"{module}."
        return tuple(
            (name.removeprefix(prefix), shape, trained)
            for name, (shape, trained) in self.shapes.items()
            if name.startswith(prefix)
        )

    def is_tied(self, module: str) -> bool:
        """Whether a tensor of the module has another name too."""
        return any(len(self.ties.get(f"{module}.{name}", ())) > 1 for name, _, _ in self.of(module))


def inside(name: str, modules: Iterable[str]) -> bool:
    """Whether a module is one of these or in one of them."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def trained_modules(spec: AdapterSpec, tensors: Tensors) -> dict[str, bool]:
    """Modules trained as a whole, outermost only, in model order, and whether with what is tied to them."""
    found: dict[str, bool] = {}
    for selector in spec.train:
        names = [name for name in select_modules(selector, tensors.universe) if tensors.of(name)]
        if spec.strict and (missed := misses(selector, None, tensors.universe, modules=True)):
            raise SpecError(*missed)
        if spec.strict and not names:
            fail(SpecError, "E225", "this module has nothing to train", selector.span)
        if spec.strict and selector in spec.tied and not any(map(tensors.is_tied, names)):
            help = "leave 'tied' out"
            fail(SpecError, "E238", f"nothing is tied to {names[0]}", selector.span, help)
        for name in names:
            found[name] = found.get(name, False) or selector in spec.tied
    outermost = [name for name in tensors.universe.modules if name in found and not inside(name, found.keys() - {name})]
    return {name: found[name] for name in outermost}


def trained_copies(spec: AdapterSpec, trained: Mapping[str, bool], tensors: Tensors) -> tuple[PlannedCopy, ...]:
    """The copies of modules trained as a whole. Where what is tied stays so, one copy serves them all."""
    copies: list[PlannedCopy] = []
    served: set[str] = set()
    for module, tied in trained.items():
        own: list[tuple[str, tuple[int, ...], bool]] = []
        others: list[tuple[str, str]] = []
        for each in tensors.of(module):
            full = f"{module}.{each[0]}"
            if full in served:
                continue
            own.append(each)
            if tied:
                others += [(each[0], name) for name in tensors.ties.get(full, ()) if name != full]
                served.update(tensors.ties.get(full, ()))
        if own:
            parted = not tied and tensors.is_tied(module)
            copies.append(PlannedCopy(module, tuple(own), tied=tuple(others), parted=parted))
    return tuple(copies)


def chosen_copies(
    spec: AdapterSpec, targets: Sequence[Target], trained: Collection[str], tensors: Tensors
) -> tuple[PlannedCopy, ...]:
    """The modules that these targets name, for a method that trains copies of them."""
    universe = tensors.universe
    found: dict[str, tree.Selector] = {}
    for target in targets:
        if spec.strict and target.where is not None:
            fail(SpecError, "E236", f"'{spec.rule.name}' takes whole modules: 'where' knows none", target.span)
        for selector in target.selectors:
            if spec.strict and (missed := misses(selector, None, universe, modules=True)):
                raise SpecError(*missed)
            found.update(dict.fromkeys(select_modules(selector, universe), selector))
    skipped = {name for target in spec.skip for each in target.selectors for name in select_modules(each, universe)}
    copies = []
    for module in universe.modules:
        if module not in found or module in skipped or inside(module, trained):
            continue
        own = tensors.of(module)
        if not own or any("." in name for name, _, _ in own):
            message = f"'{spec.rule.name}' trains modules with tensors of their own, and {module} is none"
            fail(SpecError, "E225", message, found[module].span)
        copies.append(PlannedCopy(module, own, saved=spec.rule.copies))
    return tuple(copies)


def bias_copies(
    spec: AdapterSpec, planned: Iterable[PlannedSite], trained: Sequence[str], tensors: Tensors
) -> tuple[PlannedCopy, ...]:
    """The biases that `bias` asks for, of modules that are not trained as a whole. Raises SpecError without any."""
    if spec.bias == "none":
        return ()
    adapted = {each.site.module for each in planned if each.bound.prompt is None}
    copies = []
    for name, (shape, is_parameter) in tensors.shapes.items():
        module, _, leaf = name.rpartition(".")
        wanted = leaf == "bias" and (spec.bias == "all" or module in adapted)
        if is_parameter and wanted and not inside(module, trained):
            copies.append(PlannedCopy(module, ((leaf, shape, True),), is_bias=True))
    if not copies and spec.strict:
        what = "no adapted module has one" if adapted else "it adapts no module"
        what = "the model has none" if spec.bias == "all" else what
        help = "leave it out" if spec.bias == "all" or adapted else "say 'bias all', or leave it out"
        message = f"'bias {spec.bias}' trains nothing: {what}" + (" that is not trained anyway" if trained else "")
        fail(SpecError, "E238", message, spec.span, help)
    return tuple(copies)

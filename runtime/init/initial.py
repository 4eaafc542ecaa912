"""The first values of an adapter's tensors: by initialiser, from a seed, or computed from the base weights."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy
import torch
from torch import nn

from peftc.grammar.method.initialisers import MEASURED, ROUNDED
from peftc.grammar.method.rule import ROWS_START, BoundParam, Derived, Init
from peftc.passes.expression.materialise import Evaluator, restack, to_logical, unstack
from peftc.passes.expression.scene import Eager
from peftc.passes.plan.plan import IDS, ORDER, ROWS, AdapterPlan, ParamKey, PlannedRows, PlannedSite
from peftc.passes.plan.site import WHOLE, Site
from peftc.runtime.init.calibration import Moments
from peftc.runtime.init.dense import Dense, quantization_error
from peftc.runtime.init.tokens import text_ids

LOW_PRECISION = (torch.float16, torch.bfloat16)
_DIGITS = {8.0: torch.bfloat16, 11.0: torch.float16}  # types whose numbers have so many binary digits

BaseTensor = Callable[[str], torch.Tensor | None]
"""The base's own tensor of a name, without what is merged into it."""

Tensors = dict[ParamKey, torch.Tensor]


@torch.no_grad()
def initial(
    plan: AdapterPlan,
    base: BaseTensor,
    given: Mapping[ParamKey, torch.Tensor] | None = None,
    *,
    upcast: bool = True,
    calibration: Mapping[str, Moments] | None = None,
    tokenizer: Any | None = None,
    dense: Dense | None = None,
) -> Tensors:
    """A tensor for every key of the plan: the given one, or a fresh one.

    Fresh tensors come from torch's random state, from the seed their method names (on the CPU, so that every machine
    makes the same), or from the base weight. As in PEFT an adapter is of the base's type, whatever type given tensors
    have, and in float32 where that is float16 or bfloat16, unless not `upcast`. `calibration` says what is known of the
    inputs of modules; `tokenizer` is for what starts as a text, where not the one that the method names; `dense` are
    the weights that the base was quantized from.
    """
    making = _Making(plan, base, dict(given or {}), calibration or {}, tokenizer, dense)
    making.grouped()
    for at in plan.sites:
        making.at(at)
        making.forget(at, shared=False)
    for copy in plan.copies:
        for name, _, _ in copy.tensors:
            key = ParamKey(plan.name, copy.module, name)
            source = base(f"{copy.module}.{name}")
            assert source is not None
            found = making.given.get(key)
            kept = source.detach().clone() if found is None else found.to(source.device, source.dtype, copy=True)
            making.made[key] = kept
    for rows in plan.rows:
        making.rows(rows, upcast=upcast)
    for at in plan.sites:
        making.forget(at, shared=True)
        if not upcast:
            making.narrow(at)
    return making.made


@dataclass
class _Making:
    plan: AdapterPlan
    base: BaseTensor
    given: Tensors
    calibration: Mapping[str, Moments]
    tokenizer: Any | None = None
    dense: Dense | None = None
    made: Tensors = field(default_factory=dict)
    shared_generators: dict[int, torch.Generator] = field(default_factory=dict)

    def grouped(self) -> None:
        """Make what groups of sites share, where a seed makes it: group after group, by their names."""
        found: dict[tuple[str, str], tuple[BoundParam, PlannedSite]] = {}
        for at in self.plan.sites:
            for param in at.bound.starts:
                if isinstance(param.group, str) and param.seed is not None:
                    found.setdefault((param.group, param.role), (param, at))
        for _, (param, at) in sorted(found.items(), key=lambda each: each[0]):
            key = at.key(self.plan.name, param)
            if key not in self.given and isinstance(param.init, Init):
                self.made[key] = _fresh(param, param.init, at.site, self.shared_generators)

    def at(self, at: PlannedSite) -> None:
        """Make what is not there yet of a site's tensors, in the order the method defines them."""
        keys = [at.key(self.plan.name, each) for each in at.bound.params]
        if all(key in self.given for key in keys) and all(each.seed is None for each in at.bound.params):
            for key in keys:
                if key not in self.made:
                    self.made[key] = self._given(self.given[key], at.site)
            return
        generators: dict[int, torch.Generator] = {}
        missing = (each.role for each in at.bound.params if at.key(self.plan.name, each) not in self.given)
        sources = at.bound.sources(missing)
        for param in at.bound.starts:
            key = at.key(self.plan.name, param)
            # What is not needed is drawn all the same where others are that come from the same seed.
            idle = param.role not in sources and (param.seed is None or not sources)
            if key in self.made or (param in at.bound.drafts and idle):
                continue
            own = self.shared_generators if param.shared else generators
            if isinstance(param.init, Init) and (key not in self.given or self._draws_with_missing(param, at)):
                self.made[key] = self._new(param, param.init, at, own)
            if key in self.given:
                self.made[key] = self._given(self.given[key], at.site)
            elif isinstance(param.init, Derived):
                self.made[key] = self._derived(param.init, param, at)

    def _draws_with_missing(self, param: BoundParam, at: PlannedSite) -> bool:
        """Whether a given tensor has to be drawn all the same: one that is not given draws from the same seed."""
        name = self.plan.name
        others = (each for each in at.bound.starts if each.seed == param.seed and each.shared == param.shared)
        return param.seed is not None and any(at.key(name, each) not in self.given for each in others)

    def _new(
        self, param: BoundParam, init: Init, at: PlannedSite, generators: dict[int, torch.Generator]
    ) -> torch.Tensor:
        if init.function == ROUNDED:
            stored = self.base(at.site.weight)
            assert stored is not None
            return quantization_error(self.dense, at.site, stored.detach(), self.plan.spec.rule.name)
        if init.function in MEASURED:
            return self.calibration[at.site.module].value(init.function).to(at.site.device, _dtype(at.site))
        if init.function == "encoded":
            return self._encoded(param, init, at)
        axis, alike = param.stacked_axis, dict(init.arguments).get("copies", 1) == 1
        if at.site.count == 1 or param.shared or (axis is not None and alike):
            return _fresh(param, init, at.site, generators)
        shape = list(param.shape)  # an expert starts as it would alone
        if axis is None:
            del shape[0]
        else:
            shape[axis] //= at.site.count
        one = replace(param, shape=tuple(shape))
        made = torch.stack([_fresh(one, init, at.site, generators) for _ in range(at.site.count)])
        return restack(made, axis, at.site).reshape(param.shape)

    def _encoded(self, param: BoundParam, init: Init, at: PlannedSite) -> torch.Tensor:
        """The ids of a text's tokens, again and again until there are enough."""
        said, count = dict(init.arguments), math.prod(param.shape)
        ids = text_ids(str(said["text"]), str(said["tokenizer"]), self.tokenizer, at.site.in_features)
        filled = (ids * -(-count // len(ids)))[:count]
        return torch.tensor(filled, device=at.site.device).reshape(param.shape)

    def forget(self, at: PlannedSite, *, shared: bool) -> None:
        """Drop what was needed only to make others."""
        for draft in at.bound.drafts:
            if draft.shared is shared:
                self.made.pop(at.key(self.plan.name, draft), None)

    def _given(self, tensor: torch.Tensor, site: Site) -> torch.Tensor:
        return tensor.to(site.device, _dtype(site) if tensor.is_floating_point() else tensor.dtype, copy=True)

    def narrow(self, at: PlannedSite) -> None:
        """Give a site's tensors the type that its weight is stored in."""
        if at.site.kind in WHOLE or at.site.packing is not None:
            return  # PEFT holds these in float32 all the same
        for param in at.bound.params:
            key = at.key(self.plan.name, param)
            if self.made[key].is_floating_point():
                self.made[key] = self.made[key].to(at.site.dtype)

    def rows(self, rows: PlannedRows, *, upcast: bool) -> None:
        """Make trained rows, which start as the base's own, and what says which they are."""
        weight = self.base(f"{rows.module}.weight".lstrip("."))
        assert weight is not None
        name = self.plan.name
        order = torch.tensor(rows.order, device=weight.device)
        ids = torch.tensor(rows.ids, device=weight.device)
        given = self.given.get(ParamKey(name, rows.module, ROWS))
        value = weight.detach()[ids] if given is None else given
        if given is None and self.plan.spec.rule.rows and ROWS_START in self.plan.spec.values:
            value = torch.randn_like(value)
        kind = torch.float32 if upcast and weight.dtype in LOW_PRECISION else weight.dtype
        self.made[ParamKey(name, rows.module, ROWS)] = value.to(weight.device, kind, copy=True)
        self.made[ParamKey(name, rows.module, IDS)] = ids[order]
        self.made[ParamKey(name, rows.module, ORDER)] = order

    def _stacked(self, param: BoundParam, site: Site) -> torch.Tensor:
        """The weights of all sites that share the tensor, with zeros below the shorter ones."""
        alike = [each.site for each in self.plan.sites if any(_same(other, param) for other in each.bound.starts)]
        found = [(self.base(each.weight), each) for each in alike]
        made = [
            to_logical(Eager(), weight.detach().to(site.device, _dtype(site)), each)
            for weight, each in found
            if weight is not None
        ]
        tallest = max(each.shape[-2] for each in made)
        return torch.stack([nn.functional.pad(each, (0, 0, 0, tallest - each.shape[-2])) for each in made])

    def _derived(self, init: Derived, param: BoundParam, at: PlannedSite) -> torch.Tensor:
        site, ops = at.site, Eager()
        weight, bias = self.base(site.weight), self.base(site.bias) if site.has_bias else None
        kind = _dtype(site)
        params = {
            each.role: unstack(ops, self.made[key], each.stacked_axis, each.shared, site)
            for each in at.bound.starts
            if (key := at.key(self.plan.name, each)) in self.made
        }
        values = Evaluator(
            ops,
            params,
            dict(init.scalars),
            weight=None if weight is None else lambda: to_logical(ops, weight.detach(), site).to(kind),
            weights=lambda: self._stacked(param, site),
            bias=None if bias is None else bias.detach().to(kind),
            lead=site.lead,
        )
        value = values.of(init.value)
        if site.lead and value.shape[0] == 1 and not param.shared:
            # What is made of what sites share is the same for every expert.
            value = value.expand(site.count, *value.shape[1:])
        value = restack(value, param.stacked_axis, site)
        return value.reshape(param.shape).clone(memory_format=torch.contiguous_format)


def _same(left: BoundParam, right: BoundParam) -> bool:
    return (left.role, left.group) == (right.role, right.group)


def _fresh(param: BoundParam, init: Init, site: Site, generators: dict[int, torch.Generator]) -> torch.Tensor:
    if param.seed is None:
        return filled(init, param.shape, dtype=_dtype(site), device=site.device)
    generator = generators.setdefault(param.seed, torch.Generator().manual_seed(param.seed))
    made = filled(init, param.shape, dtype=torch.float32, device=torch.device("cpu"), generator=generator)
    return made.to(site.device, _dtype(site) if made.is_floating_point() else made.dtype)


def _dtype(site: Site) -> torch.dtype:
    # As PEFT has it, what an attention module looks at is of its own type.
    return torch.float32 if site.dtype in LOW_PRECISION and site.kind != "attention" else site.dtype


def _balanced(count: int, limit: int, seed: int) -> torch.Tensor:
    """Whole numbers below a limit in random order, none more than once more often than another, from NumPy's PCG64."""
    generator = numpy.random.default_rng(seed)
    chosen = numpy.repeat(numpy.arange(limit), count // limit)
    chosen = numpy.concatenate([chosen, generator.choice(limit, size=count % limit, replace=False)])
    generator.shuffle(chosen)
    return torch.from_numpy(chosen)


def filled(
    init: Init,
    shape: tuple[int, ...],
    *,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """A new tensor started by an initialiser."""
    arguments = {name: value for name, value in init.arguments if isinstance(value, float)}
    if init.function == "listed":
        (values,) = (value for _, value in init.arguments)
        return torch.tensor(values, dtype=torch.int64, device=device).reshape(shape)
    if init.function == "randint":
        return torch.randint(int(arguments["limit"]), shape, generator=generator, device=device)
    if init.function == "randperm":
        limit, count = int(arguments["limit"]), torch.Size(shape).numel()
        return torch.randperm(limit, generator=generator, device=device)[:count].reshape(shape).clone()
    if init.function == "off_diagonal":
        size = int(arguments["size"])
        chosen = torch.randperm(size * size - size, generator=generator, device=device)[: shape[-1]]
        row, column = chosen // (size - 1), chosen % (size - 1)
        return torch.stack([row, column + (column >= row)])
    if init.function == "places":
        rows, columns = int(arguments["rows"]), int(arguments["columns"])
        chosen = torch.randperm(rows * columns, generator=generator, device=device)[: shape[-1]].sort().values
        return torch.stack([chosen // columns, chosen % columns])
    tensor = torch.empty(shape, dtype=dtype, device=device)
    match init.function:
        case "zeros":
            return tensor.zero_()
        case "ones":
            return tensor.fill_(1.0)
        case "constant":
            return tensor.fill_(arguments["value"])
        case "normal":
            return tensor.normal_(arguments["mean"], arguments["std"], generator=generator)
        case "uniform":
            coarse = tensor.to(_DIGITS.get(arguments["digits"], dtype))
            return coarse.uniform_(arguments["low"], arguments["high"], generator=generator).to(dtype)
        case "distinct":
            draws = torch.rand([*shape[:-1], int(arguments["limit"])], generator=generator, device=device)
            return draws.topk(shape[-1]).indices
        case "balanced":
            seed = generator.initial_seed() if generator else int(torch.randint(2**31, ()))
            return _balanced(tensor.numel(), int(arguments["limit"]), seed).reshape(shape).to(device)
        case "kaiming_uniform":
            copies = int(arguments["copies"])
            drawn = tensor if copies == 1 else tensor[..., ::copies].contiguous()
            nn.init.kaiming_uniform_(drawn, a=arguments["a"], generator=generator)
            return tensor if copies == 1 else drawn.repeat_interleave(copies, -1)[..., : shape[-1]].contiguous()
        case "xavier_uniform":
            return nn.init.xavier_uniform_(tensor, generator=generator)
        case _:
            raise AssertionError(f"the checker let an unknown initialiser through: {init.function}")

"""The one way in which adapters come into a model: specs -> plans -> room for tokens -> tensors -> bank -> active."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from peftc.grammar.diagnostics import SpecError, fail
from peftc.grammar.spec.spec import AdapterSpec
from peftc.passes.expression.apply import DropoutError
from peftc.passes.expression.dropping import check_dropout
from peftc.passes.plan.plan import AdapterPlan, ParamKey
from peftc.passes.plan.resolve import ModelSurvey, resolve
from peftc.passes.plan.vocabulary import enlarged, vocabulary
from peftc.runtime.adapted.adapted_module import AdaptedModule
from peftc.runtime.adapted.base_weights import Active
from peftc.runtime.adapters.bank import AdapterParameters, trained_keys
from peftc.runtime.init.calibration import Batches, Moments, measured
from peftc.runtime.init.dense import Dense, Source
from peftc.runtime.init.initial import BaseTensor, initial
from peftc.runtime.init.tokens import size_of, warn_unchosen, with_ids


@dataclass(frozen=True)
class PlannedAdapters:
    """What adapters put where, and how many tokens they need the model to have, if it has not so many."""

    plans: tuple[AdapterPlan, ...]
    tokens: int | None = None
    drawn: bool = True  # whether somebody may read the rows of new tokens as they are made


@dataclass(frozen=True)
class Values:
    """What an adapter's tensors are made from beside the base: what a file has, and what methods start from."""

    given: Mapping[ParamKey, torch.Tensor] = field(default_factory=dict)
    masks: Mapping[ParamKey, Sequence[bool]] = field(default_factory=dict)
    upcast: bool = True
    moments: Mapping[str, Moments] = field(default_factory=dict)
    tokenizer: Any | None = None
    dense: Dense | None = None


def plan_adapters(specs: Sequence[AdapterSpec], survey: ModelSurvey, tokenizer: Any | None = None) -> PlannedAdapters:
    """The plans of specs on a model that looks like this, with ids for the texts of tokens. Raises SpecError."""
    known, needed, meant = vocabulary(survey), None, []
    for each in specs:
        spec = with_ids(each, tokenizer)
        if known is not None and spec.tokens:
            spec, tokens = known.grown(spec, size_of(tokenizer))
            if tokens is not None:
                warn_unchosen(spec, known, tokens)
                needed = tokens
        meant.append(spec)
    larger = survey if needed is None else enlarged(survey, needed)
    plans = tuple(resolve(spec, larger) for spec in meant)
    for plan in plans:
        _check_dropout(plan)
    return PlannedAdapters(plans, needed)


def _check_dropout(plan: AdapterPlan) -> None:
    """Raise SpecError where an adapter is to drop and could not, which training would find out at its first step."""
    for at in {(id(each.bound), each.site.groups): each for each in plan.sites}.values():  # layers repeat
        try:
            check_dropout(at)
        except DropoutError as error:
            message = f"dropout cannot be honoured at {at.site.name}, of kind '{at.site.kind}': {error.reason}"
            fail(SpecError, "E212", message, plan.spec.span, help="set dropout = 0 there, or skip it")


def make_adapter(plan: AdapterPlan, base: BaseTensor, values: Values) -> AdapterParameters:
    """An adapter with a tensor for everything that its plan has. Raises UsageError where a method lacks its start."""
    tensors = initial(
        plan,
        base,
        values.given,
        upcast=values.upcast,
        calibration=values.moments,
        tokenizer=values.tokenizer,
        dense=values.dense,
    )
    adapter = AdapterParameters(plan, tensors, trained_keys(plan))
    if adapter.allocator is not None:
        adapter.allocator.restore(values.masks, adapter.tensor)
    return adapter


@dataclass(frozen=True)
class FreshOptions:
    """What fresh adapters start from beside the base, and whether they are wider than a base of low precision.

    They are arguments of `apply`, which says what they mean; `upcast` is its `autocast_adapter_dtype`.
    """

    calibration: Batches | None = None
    tokenizer: Any | None = None
    dense: Source | None = None
    upcast: bool = True


def add_fresh(
    model: AdaptedModule,
    planned: PlannedAdapters,
    active: Active | None,
    options: FreshOptions,
    *,
    trainable: bool = True,
) -> None:
    """Add adapters that start as their methods say, trained if `trainable`, and make these active if any are said.

    Raises UsageError, and leaves the model as it was: a method lacks what it starts from, or see `AdapterSet.activate`.
    """
    base = model._adapter_state.base

    def values() -> Iterator[Values]:
        weights = None if options.dense is None else Dense(options.dense)
        moments = measured(base.unloaded, planned.plans, options.calibration)
        for _ in planned.plans:
            yield Values(upcast=options.upcast, moments=moments, tokenizer=options.tokenizer, dense=weights)

    add_adapters(model, planned, values, lambda: base.unmerged().value, active, trainable=trainable)


def add_adapters(
    model: AdaptedModule,
    planned: PlannedAdapters,
    values: Callable[[], Iterator[Values]],
    base: Callable[[], BaseTensor],
    active: Active | None,
    *,
    trainable: bool,
) -> None:
    """Add adapters, and activate these if any are said: all of it, or on an error nothing.

    `values` and `base` are asked once there is room for new tokens.
    """
    state = model._adapter_state
    for plan in planned.plans:
        state.check_name(plan.name)
    with room_for(model, planned):
        tensor = base()
        made = [make_adapter(plan, tensor, own) for plan, own in zip(planned.plans, values(), strict=True)]
        for adapter in made:
            adapter.train_only(trainable)
        state.add(made, active, trainable=None if active is None else trainable)


@contextmanager
def room_for(model: AdaptedModule, planned: PlannedAdapters) -> Iterator[None]:
    """Give the model, not the user's, the tokens that adapters need; it has what it had if an error leaves this."""
    if planned.tokens is None:
        yield
        return
    base = model._adapter_state.base
    fingerprint, restore = base.facts.fingerprint, _restorer(model)
    known = base.fingerprint()
    try:
        model.resize_token_embeddings(planned.tokens, mean_resizing=planned.drawn)
        base.facts.fingerprint = known
        yield
    except BaseException:
        restore()
        base.facts.fingerprint = fingerprint
        base.engine.reset()
        raise


def _restorer(model: nn.Module) -> Callable[[], None]:
    """What gives a model and its configs the attributes and tensors of now back."""
    configs = _configs([getattr(module, "config", None) for module in model.modules()])
    # Programs hold the very dictionaries that modules keep their tensors in.
    held = [
        (owner, dict(vars(owner)), [(each, dict(each)) for each in vars(owner).values() if type(each) is dict])
        for owner in [*model.modules(), *configs]
    ]
    tensors = [(parameter, parameter.data) for parameter in model.parameters()]

    def restore() -> None:
        for owner, attributes, dictionaries in held:
            vars(owner).clear()
            vars(owner).update(attributes)
            for dictionary, content in dictionaries:
                dictionary.clear()
                dictionary.update(content)
        for parameter, data in tensors:
            if parameter.shape != data.shape:
                parameter.data = data

    return restore


def _configs(found: Sequence[Any]) -> list[Any]:
    """Configs and those inside them, each once."""
    seen: dict[int, Any] = {}
    left = [each for each in found if hasattr(each, "__dict__")]
    while left:
        config = left.pop()
        if id(config) not in seen:
            seen[id(config)] = config
            left += [each for each in vars(config).values() if type(each).__name__.endswith("Config")]
    return list(seen.values())

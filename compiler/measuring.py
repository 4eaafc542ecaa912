"""Measures how far a program is from the adapted model that it was made of."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from peftc.compiler.programs import IDS, Adapters, Made, own_tensors
from peftc.grammar.diagnostics import UsageError, fail
from peftc.passes.exported import ADAPTER
from peftc.runtime import nest
from peftc.runtime.drift import OutputDrift
from peftc.runtime.model import AdaptedModel
from peftc.runtime.rounding import output_drift

ROWS, LENGTH, MOST, SEED = 2, 32, 16, 0

Inputs = dict[str, Any]


def measured(
    adapted: AdaptedModel,
    made: Made,
    adapters: Adapters,
    names: Sequence[str],
    inputs: Mapping[str, Any] | None,
) -> OutputDrift:
    """How far a program's first output is from the adapted model's, whose adapters are not merged.

    The inputs are those given, or drawn from a seed of their own: random tokens, no padding. Of adapters that are
    inputs, or that rows choose from, at most 16 are tried. The model is to be in evaluation mode.
    """
    tried = names[:MOST]
    given = _inputs(adapted, made, inputs, rows=len(tried) if adapters == "routed" else ROWS)
    found: list[torch.Tensor] = []
    expected: list[torch.Tensor] = []
    with torch.no_grad():
        if adapters == "merged":
            expected.append(_expected(adapted, made, given))
            found.append(_first(made, given))
        elif adapters == "inputs":
            for name in tried:
                with _active(adapted, name):
                    expected.append(_expected(adapted, made, given))
                found.append(_first(made, {**given, ADAPTER: own_tensors(adapted, made, name)}))
        else:
            ids = torch.arange(_rows(given)) % len(tried)
            found.append(_first(made, {**given, IDS: ids.to(next(iter(given.values())).device)}))
            rows = torch.empty_like(found[0])
            for index, name in enumerate(tried):
                with _active(adapted, name):
                    rows[ids == index] = _expected(adapted, made, given)[ids == index].to(rows.dtype)
            expected.append(rows)
    name = made.outputs[0]["name"]
    return output_drift({name: torch.cat(expected)}, {name: torch.cat(found)})


@contextmanager
def _active(adapted: AdaptedModel, name: str) -> Iterator[None]:
    """One adapter in the slots, and afterwards those that were."""
    state = adapted._adapter_state
    before = state.active
    state.activate(((name, 1.0),))
    try:
        yield
    finally:
        state.activate(before)


def check_drift(drift: OutputDrift, max_drift: float | None, min_agreement: float | None) -> None:
    """Raise UsageError where the outputs differ more than is allowed."""
    if max_drift is not None and not drift.relative <= max_drift:
        message = f"outputs differ from the adapted model's by {drift.relative:.2g} of the largest"
        help = f"{max_drift:g} is allowed; nothing was written"
        fail(UsageError, "E648", message, help=help)
    if min_agreement is not None and drift.agreement is None:
        message = "min_agreement has no meaning here: the model gives no logits"
        fail(UsageError, "E640", message, help="give max_drift instead")
    if min_agreement is not None and drift.agreement is not None and drift.agreement < min_agreement:
        message = f"the adapted model prefers the same token in {drift.agreement:.1%} of the places"
        fail(UsageError, "E648", message, help=f"{min_agreement:.1%} are asked for; nothing was written")


def _first(made: Made, given: Mapping[str, Any]) -> torch.Tensor:
    return made(given)[made.outputs[0]["name"]]


def _expected(adapted: AdaptedModel, made: Made, given: Mapping[str, Any]) -> torch.Tensor:
    """What the adapted model gives for the program's first output, of the call that the program was made for."""
    engine = adapted._adapter_state.engine
    named = {name: value for name, value in given.items() if name in engine.parameters}
    with engine.unmerged():
        output = adapted(**made.entered.arguments(named))
    leaves: list[torch.Tensor] = []
    nest.flatten(output, leaves, "the output")
    tail = made.outputs[0]["shape"][1:2] == [1]  # where the model cannot give the last token's logits only
    return leaves[0][:, -1:] if tail and leaves[0].dim() == 3 else leaves[0]


def _inputs(adapted: AdaptedModel, made: Made, given: Mapping[str, Any] | None, rows: int) -> Inputs:
    """Inputs of the program: those given as far as it takes them, the others drawn."""
    ranges = {each.name: each for each in made.dimensions}
    sizes = {name: min(LENGTH, each.high or LENGTH) for name, each in ranges.items()}
    sizes |= {"batch": min(rows, ranges["batch"].high or rows) if "batch" in ranges else 1, "past": 0}
    config: Any = getattr(adapted, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = int(getattr(text, "vocab_size", None) or 2)
    device = next(iter(adapted.parameters())).device
    generator = torch.Generator(device).manual_seed(SEED)
    found: Inputs = {}
    for each in made.inputs:
        if each["name"] in (ADAPTER, IDS):
            continue
        own = (given or {}).get(each["name"])
        if isinstance(own, torch.Tensor):
            found[each["name"]] = own
            continue
        shape = [_evaluated(size, sizes) for size in each["shape"]]
        dtype = getattr(torch, each["dtype"])
        if each["name"].endswith("mask"):
            made_up = torch.ones(shape, dtype=dtype, device=device)
        elif each["name"] == "position_ids":
            made_up = torch.arange(shape[-1], dtype=dtype, device=device).expand(shape).contiguous()
        elif dtype.is_floating_point:
            made_up = torch.randn(shape, generator=generator, device=device).to(dtype)
        else:
            made_up = torch.randint(vocabulary, shape, generator=generator, dtype=dtype, device=device)
        found[each["name"]] = made_up
    return found


def _evaluated(size: int | str, sizes: Mapping[str, int]) -> int:
    if isinstance(size, int):
        return size
    return sum(int(each) if each.isdecimal() else sizes[each] for each in size.split(" + "))


def _rows(given: Inputs) -> int:
    rows: int = next(iter(given.values())).shape[0]
    return rows

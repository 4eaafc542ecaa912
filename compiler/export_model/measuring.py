"""Measures how far a program is from the adapted model that it was made of."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from peftc.compiler.export_model.entries import encoded_by
from peftc.compiler.export_model.export_options import Adapters
from peftc.compiler.export_model.programs import IDS, BuiltProgram, alone, own_tensors
from peftc.grammar.diagnostics import UsageError, fail
from peftc.passes.export.exported import ADAPTER
from peftc.passes.export.route import BANK, NOBODY
from peftc.passes.foreign import transformers as contract
from peftc.passes.foreign.peft import BASE_ROWS
from peftc.passes.ir.roles import Role, Stack
from peftc.runtime.execution import nest
from peftc.runtime.execution.caches import cache_in
from peftc.runtime.merge.drift import OutputDrift
from peftc.runtime.merge.rounding import output_drift
from peftc.runtime.model.model import AdaptedModel

ROWS, LENGTH, MOST, SEED = 2, 32, 16, 0
_READ, _DECODED = contract.name_of(Role.TOKENS), contract.name_of(Role.TOKENS, Stack.DECODER)

Inputs = dict[str, Any]


def measured(
    adapted: AdaptedModel,
    programs: Sequence[BuiltProgram],
    adapters: Adapters,
    names: Sequence[str],
    inputs: Mapping[str, Any] | None,
) -> OutputDrift:
    """How far what programs give is from what the adapted model gives, whose adapters are not merged.

    That is the first output of a plain forward, or of a prefill and of one token after it. The inputs are those given,
    or drawn from a seed of their own: random tokens, no padding. Of adapters that are inputs, or that rows choose from,
    at most 16 are tried, and of the latter rows that have none, where a program can. The model is to be in evaluation
    mode.
    """
    tried = names[:MOST]
    choices: dict[int, str | None] = dict(enumerate(tried))
    if BASE_ROWS in programs[0].rows:
        choices[NOBODY] = None
    given = _inputs(adapted, programs[0], inputs, rows=len(choices) if adapters == "routed" else ROWS)
    found: list[torch.Tensor] = []
    expected: list[torch.Tensor] = []
    with torch.no_grad():
        if adapters == "merged":
            expected += _expected(adapted, programs, given)
            found += _found(programs, given, [{} for _ in programs])
        elif adapters == "inputs":
            for name in tried:
                with alone(adapted, name):
                    expected += _expected(adapted, programs, given)
                found += _found(programs, given, [{ADAPTER: own_tensors(adapted, each, name)} for each in programs])
        else:
            ids = torch.tensor(list(choices))[torch.arange(_rows(given)) % len(choices)]
            own_ids: Inputs = {IDS: ids.to(next(iter(given.values())).device)}
            found += _found(programs, given, [own_ids for _ in programs])
            expected += [torch.empty_like(each) for each in found]
            for index, choice in choices.items():
                with alone(adapted, choice):
                    own_rows = _expected(adapted, programs, given)
                for rows, own in zip(expected, own_rows, strict=True):
                    rows[ids == index] = own[ids == index].to(rows.dtype)
    name = programs[0].outputs[0]["name"]
    left, right = (torch.cat([_as_rows(each) for each in outputs]) for outputs in (expected, found))
    return output_drift({name: left}, {name: right})


def _found(programs: Sequence[BuiltProgram], given: Inputs, beside: Sequence[Inputs]) -> list[torch.Tensor]:
    """What the programs give: the first, and if it generates the last, for one token more."""
    first, last = programs[0], programs[-1]
    outputs = first({**given, **beside[0]})
    found = [outputs[first.outputs[0]["name"]]]
    if _goes_on(first, given):
        state = {past: outputs[present] for present, past in first.state.items()}
        known = {**state, **_one_more(given), **beside[-1]}
        found.append(last(known)[contract.LOGITS])
    return found


def _expected(adapted: AdaptedModel, programs: Sequence[BuiltProgram], given: Inputs) -> list[torch.Tensor]:
    """The same of the adapted model."""
    first = programs[0]
    with adapted._adapter_state.engine.unmerged():
        output = adapted(**first.entered.arguments(_known(adapted, given)))
        leaves: list[torch.Tensor] = []
        nest.flatten(output, leaves, "the output")
        expected = [_last(leaves[0], first)]
        if _goes_on(first, given):
            more = _known(adapted, _one_more(given))
            more |= {**first.entered.options, str(adapted._adapter_state.engine.forward.cache): cache_in(output)}
            if _DECODED in given:
                more |= encoded_by(output)
            expected.append(_last(adapted(**more)[contract.LOGITS], programs[-1]))
    return expected


def _goes_on(first: BuiltProgram, given: Inputs) -> bool:
    """Whether a text is generated, and one more token fits."""
    most = next((each.high for each in first.dimensions if each.name == "sequence"), None)
    tokens = given.get(_DECODED, given.get(_READ))
    return bool(first.state) and tokens is not None and (most is None or tokens.shape[1] < most)


def _one_more(given: Inputs) -> Inputs:
    """The inputs of the call that goes on with one token; which, does not matter."""
    mask, places = contract.name_of(Role.MASK), contract.name_of(Role.POSITIONS)
    if _DECODED in given:
        seen = {mask: given[mask]} if mask in given else {}
        return {_DECODED: given[_DECODED][:, :1], **seen}
    tokens = given[_READ]
    longer = tokens.new_ones(len(tokens), tokens.shape[1] + 1)
    return {_READ: tokens[:, :1], mask: longer, places: longer[:, :1] * tokens.shape[1]}


def _known(adapted: AdaptedModel, given: Inputs) -> Inputs:
    return adapted._adapter_state.engine.forward.only(given)


def _last(logits: torch.Tensor, made: BuiltProgram) -> torch.Tensor:
    """As much as the program gives, where the model cannot give the last token's logits only."""
    tail = made.outputs[0]["shape"][1:2] == [1]
    return logits[:, -1:] if tail and logits.dim() == 3 else logits


def _as_rows(output: torch.Tensor) -> torch.Tensor:
    return output.reshape(-1, output.shape[-1]) if output.dim() > 1 else output


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


def _inputs(adapted: AdaptedModel, made: BuiltProgram, given: Mapping[str, Any] | None, rows: int) -> Inputs:
    """Inputs of the program: those given as far as it takes them, the others drawn."""
    ranges = {each.name: each for each in made.dimensions}
    sizes = {name: min(LENGTH, each.high or LENGTH) for name, each in ranges.items()}
    if made.state and "sequence" in sizes:
        sizes["sequence"] = max(1, sizes["sequence"] - 1)  # one more is to follow
    sizes |= {"batch": min(rows, ranges["batch"].high or rows) if "batch" in ranges else 1, "past": 0}
    vocabulary = contract.vocabulary_size(getattr(adapted, "config", None))
    device = next(iter(adapted.parameters())).device
    generator = torch.Generator(device).manual_seed(SEED)
    found: Inputs = {}
    for each in made.inputs:
        if each["name"] in (ADAPTER, BANK, IDS):
            continue
        own = (given or {}).get(each["name"])
        if isinstance(own, torch.Tensor):
            found[each["name"]] = own
            continue
        shape = [_evaluated(size, sizes) for size in each["shape"]]
        dtype = getattr(torch, each["dtype"])
        role = contract.argument_of(each["name"], encoder_decoder=False).role
        if role in (Role.MASK, Role.OTHER_MASK):
            made_up = torch.ones(shape, dtype=dtype, device=device)
        elif role == Role.TYPES:
            made_up = torch.zeros(shape, dtype=dtype, device=device)
        elif role == Role.POSITIONS:
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

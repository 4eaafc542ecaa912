"""What an artifact whose rows choose their adapter has of one that comes later."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch

from peftc.compiler.export_model import entries
from peftc.compiler.export_model.bank import Bank, read_bank
from peftc.compiler.export_model.entries import FORWARD, EntryCall
from peftc.compiler.export_model.programs import alone, in_bank, pieces_of
from peftc.compiler.trace.samples import SIZES
from peftc.grammar.diagnostics import UsageError, fail
from peftc.passes.export.bank_pieces import digest_of, owners
from peftc.passes.foreign.peft import BASE_ROWS
from peftc.passes.plan.structure import rows_slot, site_slot
from peftc.passes.route.laws import UnroutedError
from peftc.runtime.adapters.room import largest_rank, padded, rank_axes
from peftc.runtime.artifact.checks import ROUTE, dtype_of
from peftc.runtime.artifact.manifest import ArtifactManifest, BankTensor, Entry, TensorFacts
from peftc.runtime.artifact.tensors import read_tensors
from peftc.runtime.merge.rounding import in_evaluation
from peftc.runtime.model.model import AdaptedModel

ALIKE = "the same methods, at sites that the adapters in the artifact have"


def bank_rows(
    adapted: AdaptedModel, directory: Path, manifest: ArtifactManifest, names: Sequence[str]
) -> dict[str, dict[str, torch.Tensor]]:
    """For each of these adapters what the programs take of it, as large as the artifact has room for.

    Raises UsageError where one adapts what the artifact does not, in another way (E646), or is larger (E655).
    """
    base = read_tensors(directory / manifest.adapter_files[BASE_ROWS]) if manifest.has_base else {}
    assert manifest.bank is not None
    constants = frozenset(manifest.bank.constants)
    banks = {name: replace(read_bank(adapted, [name]), constants=constants) for name in names}
    for name, bank in banks.items():
        _check_places(name, bank, manifest)
    return {
        name: in_evaluation(adapted, partial(_row, adapted, manifest, name, bank, base)) for name, bank in banks.items()
    }


def _check_places(name: str, bank: Bank, manifest: ArtifactManifest) -> None:
    """Raise UsageError where an adapter has a place that the artifact has not, or other constants."""
    assert manifest.bank is not None
    known = {slot for each in manifest.bank_tensors.values() for slot in each.slots} | owners(manifest.bank.constants)
    for owner in dict.fromkeys(path.rpartition(".")[0] for path in bank.own[name]):
        if owner not in known:
            _refuse(name, f"it adapts {_place(owner)}, which the artifact does not")
    for path, digest in manifest.bank.constants.items():
        owner, _, role = path.rpartition(".")
        if owner in owners(bank.own[name]):
            tensor = bank.own[name].get(path)
            if tensor is None or digest_of(tensor) != digest:
                what = f"{role} at {_place(owner)}, which is one for all of the artifact's adapters"
                _refuse(name, f"it has another {what}" if tensor is not None else f"it has no {what}")


def _row(
    adapted: AdaptedModel, manifest: ArtifactManifest, name: str, bank: Bank, base: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    own: dict[str, torch.Tensor] = {}
    reads: dict[str, frozenset[str]] = {}
    slots: dict[str, str] = {}
    with alone(adapted, name):
        for call in _calls(adapted, manifest):
            try:
                pieces, more = pieces_of(adapted, call, slots, bank)
            except UnroutedError as error:
                _refuse(name, f"rows cannot choose it at {error.site or 'the model'}: {error.reason}")
            slots |= more
            own |= pieces.of(bank.own[name])
            reads |= pieces.owners
    wanted, adapts = manifest.bank_tensors, owners(bank.own[name])
    for each, places in reads.items():
        if each not in wanted:
            _refuse(name, f"what it has at {', '.join(sorted(map(_place, places)))} is computed in another way")
    grows = _grows(adapted, name)
    found = {}
    for each, facts in wanted.items():
        if each in own:
            found[each] = _fitted(adapted, name, own[each], facts, may_grow=set(facts.slots) <= grows)
        elif adapts.issuperset(facts.slots) or not manifest.has_base:
            _refuse(name, f"it has nothing of what the programs take of {', '.join(map(_place, facts.slots))}")
        else:
            found[each] = base[each]
    return found


def _fitted(
    adapted: AdaptedModel, name: str, piece: torch.Tensor, facts: BankTensor, *, may_grow: bool
) -> torch.Tensor:
    """A piece as the bank has it, with zeros where the bank has room for more."""
    wanted, dtype = [size.number for size in facts.facts.shape], dtype_of(facts.facts)
    value = in_bank(piece, facts.turned and piece.dim() == 2)
    what = f"{facts.facts.name} is {str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if value.dtype is not dtype or value.dim() != len(wanted) or (not may_grow and list(value.shape) != wanted):
        _refuse(name, f"{what}, not {facts.facts.dtype} {wanted}")
    if any(own > room for own, room in zip(value.shape, wanted, strict=True)):
        message = f"adapter {name!r} is larger than the artifact has room for: {what}, and there is room for {wanted}"
        rank = largest_rank(adapted._adapter_state.adapter(name))
        help = f"export again with rank={rank} (--rank {rank})" if rank else "export the adapters together"
        fail(UsageError, "E655", message, help=help)
    return padded(value, wanted)


def _grows(adapted: AdaptedModel, name: str) -> frozenset[str]:
    """The slots of an adapter of which a graph fits every rank, or every number of tokens."""
    plan = adapted._adapter_state.adapter(name).plan
    ranks = {site_slot(0, at.site.name) for at in plan.sites if any(rank_axes(at))}
    return frozenset(ranks | {rows_slot(0, rows.module) for rows in plan.rows})


def _calls(adapted: AdaptedModel, manifest: ArtifactManifest) -> Iterator[EntryCall]:
    """The calls that the artifact's programs were made for."""
    entry = manifest.entries.get(FORWARD)
    if entry is None:
        yield from entries.entered(adapted, "generate", None)
    else:
        yield from entries.entered(adapted, "forward", _drawn(entry, next(adapted.parameters()).device))


def _drawn(entry: Entry, device: torch.device) -> dict[str, torch.Tensor]:
    """A call of these inputs: their sizes tell how it is traced, and their values do not."""
    given = {}
    for each in entry.inputs:
        if isinstance(each, TensorFacts) and each.name != ROUTE:
            shape = [size.value(SIZES) for size in each.shape]
            given[each.name] = torch.zeros(shape, dtype=dtype_of(each), device=device)
    return given


def _place(owner: str) -> str:
    """The module of a slot, as well as its path tells."""
    return owner.partition("__")[2].replace("__", ".")


def _refuse(name: str, reason: str) -> NoReturn:
    fail(UsageError, "E646", f"adapter {name!r} is laid out in another way: {reason}", help=ALIKE)

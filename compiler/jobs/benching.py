"""bench: how long the programs of an exported artifact take. Imports no transformers."""

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import torch

from peftc.compiler.report.timings import BenchFacts, Timing
from peftc.grammar.diagnostics import UsageError, fail
from peftc.passes.foreign import transformers as contract
from peftc.passes.ir.roles import Role, Stack
from peftc.runtime.artifact.artifact import Artifact
from peftc.runtime.artifact.checks import ROUTE, dtype_of
from peftc.runtime.artifact.manifest import Entry, TensorFacts, TensorGroup
from peftc.runtime.artifact.programs import Value

TOKENS = (32, 128)
BATCHES = (1,)
_WARM, _LEAST, _MOST = 3, 5, 200  # calls that are not measured; that are, at least and at most


def bench(
    artifact: Artifact | str | PathLike[str],
    *,
    tokens: Sequence[int] = (),
    batches: Sequence[int] = BATCHES,
    seconds: float = 1.0,
    verify: bool = True,
) -> BenchFacts:
    """Time every entry of an artifact on random inputs.

    Args:
        artifact: Its directory, or the artifact itself.
        tokens: How many tokens a prefill (or forward) takes, and how many are in the cache of a decode, which takes
            one; 32 and 128 unless said, as far as the artifact takes so many.
        batches: How many rows a call has.
        seconds: How long to measure each size.
        verify: Check the digests of the files.

    Raises:
        AdapterError: it is no artifact, or was not made for such a size.
    """
    if not all(each > 0 for each in (*tokens, *batches)):
        fail(UsageError, "E623", "tokens and batches have to be at least 1")
    loaded = artifact if isinstance(artifact, Artifact) else Artifact.load(artifact, verify=verify)
    loaded.prepare()
    timings = []
    entries = loaded.manifest.entries
    for name in sorted(entries, reverse=True):  # a prefill before its decode
        entry = entries[name]
        for sizes in _sizes(loaded, entry, tokens, batches):
            inputs = _inputs(loaded, entry, sizes)
            taken = _timed(loaded, entry.name, inputs, seconds)
            count = sizes.get("batch", 1) * sizes.get("source" if _encodes(entry) else "sequence", 1)
            timings.append(Timing(entry.name, sizes, count, statistics.median(taken) * 1000, len(taken)))
    manifest = loaded.manifest
    directory = str(loaded.directory)
    return BenchFacts(directory, manifest.backend, manifest.adapters, torch.get_num_threads(), tuple(timings))


def _timed(artifact: Artifact, entry: str, inputs: Mapping[str, Value], seconds: float) -> list[float]:
    for _ in range(_WARM):
        artifact(entry, inputs)
    taken: list[float] = []
    while len(taken) < _LEAST or (sum(taken) < seconds and len(taken) < _MOST):
        start = time.perf_counter()
        artifact(entry, inputs)
        taken.append(time.perf_counter() - start)
    return taken


def _sizes(artifact: Artifact, entry: Entry, tokens: Sequence[int], batches: Sequence[int]) -> list[dict[str, int]]:
    """The sizes to measure an entry at. Sizes that nobody asked for are made to fit."""
    used = {
        name
        for each in entry.inputs
        if isinstance(each, TensorFacts)
        for size in each.shape
        for name in size.dimensions
    }
    limits, length = artifact.manifest.dimensions, artifact.manifest.length
    found: dict[tuple[tuple[str, int], ...], dict[str, int]] = {}
    for batch in batches:
        for count in tokens or TOKENS:
            decoding = entry.name == "decode"
            alone = decoding or _encodes(entry)  # one token of text, after `count` others or for `count` of the source
            past = count if decoding else 0
            if length is not None and not tokens:
                past, count = min(past, length - 1), min(count, length)
            meant = {"batch": batch, "sequence": 1 if alone else count, "past": past, "source": count}
            sizes = {name: meant.get(name, max(1, limits[name].min)) for name in limits if name in used}
            if not tokens:
                sizes |= {name: min(size, limits[name].max or size) for name, size in sizes.items() if name != "batch"}
            found[tuple(sizes.items())] = sizes
    return list(found.values())


def _encodes(entry: Entry) -> bool:
    return all(entry.takes(contract.name_of(Role.TOKENS, stack)) for stack in (Stack.ENCODER, Stack.DECODER))


def _inputs(artifact: Artifact, entry: Entry, sizes: Mapping[str, int]) -> dict[str, Value]:
    generator = torch.Generator().manual_seed(0)
    made: dict[str, Value] = {}
    for each in entry.inputs:
        if isinstance(each, TensorGroup):
            names = tuple(artifact.manifest.adapter_files)
            made[each.name] = (
                artifact.adapter(names[0])
                if names
                else {inner.name: _random(artifact, inner, sizes, generator) for inner in each.tensors}
            )
        else:
            made[each.name] = _random(artifact, each, sizes, generator)
    return made


def _random(
    artifact: Artifact, facts: TensorFacts, sizes: Mapping[str, int], generator: torch.Generator
) -> torch.Tensor:
    shape, dtype = [each.value(sizes) for each in facts.shape], dtype_of(facts)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    role = contract.argument_of(facts.name, encoder_decoder=False).role
    if role == Role.POSITIONS:
        past = sizes.get("past", 0)
        return torch.arange(past, past + shape[-1]).expand(shape).to(dtype).contiguous()
    if role == Role.TOKENS:
        return torch.randint(_vocabulary(artifact), shape, generator=generator).to(dtype)
    if facts.name == ROUTE:
        return torch.randint(len(artifact.manifest.adapter_names), shape, generator=generator).to(dtype)
    return torch.ones(shape, dtype=dtype)


def _vocabulary(artifact: Artifact) -> int:
    """How many tokens there are, as the model's config or the size of its logits says; two where nothing does."""
    try:
        config: Any = json.loads((artifact.directory / "config.json").read_bytes())
    except (OSError, ValueError):
        config = {}
    known = contract.vocabulary_in(config)
    if known is not None:
        return known
    if artifact.manifest.generation is not None:
        logits = next(each for each in artifact.manifest.entries["prefill"].outputs if each.name == contract.LOGITS)
        return logits.shape[-1].number
    return 2

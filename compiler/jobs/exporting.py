"""export: adapters on disk and a model, in a form that needs no peftc."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from peftc.compiler.api import AdaptedModel, load
from peftc.compiler.export_model.entries import DECODE, FORWARD, PREFILL
from peftc.compiler.export_model.export_options import MERGED, Adapters, Entry, ExportOptions, Format
from peftc.compiler.export_model.exportable import export_adapted
from peftc.compiler.export_model.output import MANIFEST
from peftc.compiler.jobs.drifting import adapted_by
from peftc.compiler.load_model.models import FoundModel, seeded
from peftc.compiler.load_model.tokenizers import tokenizer_beside
from peftc.compiler.report.facts import EntryFacts, ExportFacts
from peftc.grammar.diagnostics import UsageError, fail
from peftc.grammar.spec.spec import Spec
from peftc.runtime.adapted.together import Named
from peftc.runtime.merge.drift import OutputDrift
from peftc.runtime.merge.repack import Quantized

Checkpoint = str | PathLike[str]


def export(
    source: Spec | Checkpoint | Mapping[str, Checkpoint],
    model: FoundModel,
    directory: str | PathLike[str],
    *,
    format: Format = "checkpoint",
    adapters: Adapters = "merged",
    entry: Entry | None = None,
    adapter_names: Named | None = None,
    rank: int | None = None,
    max_batch_size: int | None = None,
    max_length: int | None = None,
    max_drift: float | None = None,
    min_agreement: float | None = None,
    max_shard_size: int | str | None = None,
    safe_merge: bool = False,
    quantized: Quantized | None = None,
    use: str | PathLike[str] | None = None,
    seed: int = 0,
    force: bool = False,
) -> ExportFacts:
    """Put adapters into a model and write it: `AdaptedModel.export` for adapters on disk.

    Args:
        source: A checkpoint's directory or Hub id; several of them, each with a name for its adapter; or a spec (a path
            to an `.adapter` file or a Spec), whose adapters are fresh.
        model: From `find_model`. Its tokenizer is written too, where it has one. Its example inputs are what the drift
            is measured with.
        directory: Where to write; it appears complete or not at all.
        format: As in `AdaptedModel.export`, and so are the options down to `quantized`.
        adapters: Merged, inputs or routed.
        entry: Forward or generate.
        adapter_names: Which adapters are merged, a list or a mapping to weights, are inputs, or routed. Left out, all
            checkpoints and those that a spec activates are merged; all adapters are inputs, or routed.
        rank: Of routed adapters, the rank that there is room for in others that come later.
        max_batch_size: The most rows a program takes.
        max_length: The most tokens of a row.
        max_drift: The largest difference from the adapted model's outputs that is allowed.
        min_agreement: The least share of places where both prefer the same token.
        max_shard_size: Of one file of a checkpoint's weights.
        safe_merge: Refuse values that are not finite.
        quantized: Of a quantized base, what becomes of the weights.
        use: An `.adapter` file with methods of your own, for checkpoints.
        seed: For the initial values of a spec's adapters.
        force: Replace a directory that is not an unchanged earlier export.

    Raises:
        AdapterError: the spec, a checkpoint, the model, an option or the directory is wrong, or the outputs differ too
            much.
    """
    with seeded(seed):
        adapted = _adapted(source, model, use)
    names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
    if adapters == MERGED:
        chosen: Named | None = names or (list(source) if isinstance(source, Mapping) else None)
        if chosen:
            adapted.set_adapter(chosen)
        names = None
    options = ExportOptions(
        format=format,
        adapters=adapters,
        entry=entry,
        adapter_names=names,
        rank=rank,
        example_inputs=_named(adapted, model.example_inputs),
        tokenizer=tokenizer_beside(model),
        max_batch_size=max_batch_size,
        max_length=max_length,
        max_drift=max_drift,
        min_agreement=min_agreement,
        max_shard_size=max_shard_size,
        safe_merge=safe_merge,
        quantized=quantized,
    )
    files = export_adapted(adapted, Path(directory), options, force=force)
    manifest = json.loads((Path(directory) / MANIFEST).read_bytes())
    named = tuple(adapted.active_adapters() if adapters == MERGED else names or adapted._adapter_state.names())
    return _facts(str(directory), format, named, files, manifest, has_tokenizer=options.tokenizer is not None)


def export_adapters(
    source: Spec | Checkpoint | Mapping[str, Checkpoint],
    model: FoundModel,
    directory: str | PathLike[str],
    *,
    adapter_names: str | Sequence[str] | None = None,
    use: str | PathLike[str] | None = None,
    seed: int = 0,
    force: bool = False,
) -> tuple[str, ...]:
    """Add adapters to an artifact that takes them as inputs, or has rows choose from them: as
    `AdaptedModel.export_adapters`, for adapters on disk.

    Args:
        source: As in `export`.
        model: From `find_model`; the base that the artifact was made of.
        directory: The artifact.
        adapter_names: Which adapters; all, if left out.
        use: An `.adapter` file with methods of your own, for checkpoints.
        seed: For the initial values of a spec's adapters.
        force: Replace adapters of the same names.

    Returns:
        The names of the new files.

    Raises:
        AdapterError: the spec, a checkpoint, the model or the artifact is wrong, or they do not belong together.
    """
    with seeded(seed):
        adapted = _adapted(source, model, use)
    return adapted.export_adapters(directory, adapter_names, force=force)


def _adapted(
    source: Spec | Checkpoint | Mapping[str, Checkpoint], model: FoundModel, use: Checkpoint | None
) -> AdaptedModel:
    if not isinstance(source, Mapping):
        return adapted_by(source, model, use)
    if not source:
        fail(UsageError, "E525", "there is no adapter, so there is nothing to export", help="name a checkpoint")
    (name, first), *others = source.items()
    adapted = load(model.model, first, adapter_name=name, use=use)
    for name, each in others:
        adapted.load_adapter(each, name, use=use)
    return adapted


def _named(adapted: AdaptedModel, given: Sequence[Any] | Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Example inputs by name."""
    if given is None or isinstance(given, Mapping):
        return given
    named: dict[str, Any] = adapted._named((given,) if isinstance(given, torch.Tensor) else tuple(given), {})
    return {name: value for name, value in named.items() if value is not None}


def _facts(
    directory: str,
    format: Format,
    adapters: tuple[str, ...],
    files: Sequence[str],
    manifest: Mapping[str, Any],
    *,
    has_tokenizer: bool,
) -> ExportFacts:
    artifact = manifest.get("artifact", {})
    found = artifact.get("entries", {})
    entries = [
        EntryFacts(name, found[name]["file"], _sizes(found[name]["inputs"]), _sizes(found[name]["outputs"]))
        for name in (FORWARD, PREFILL, DECODE)
        if name in found
    ]
    return ExportFacts(
        directory=directory,
        format=format,
        adapters=adapters,
        placed=artifact.get("adapters", MERGED),
        weights={name: each["weight"] for name, each in manifest.get("merged", {}).items()},
        files=tuple(files),
        bytes=sum(each["bytes"] for each in manifest["files"].values()),
        entries=tuple(entries),
        dimensions=artifact.get("dimensions", {}),
        drift=_drift(manifest["drift"]) if "drift" in manifest else None,
        tokenizer=has_tokenizer,
        generates=artifact.get("generation") is not None,
    )


def _drift(written: Mapping[str, Any]) -> OutputDrift:
    return OutputDrift(**{each.name: written[each.name] for each in fields(OutputDrift)})


def _sizes(described: Sequence[Mapping[str, Any]]) -> dict[str, tuple[int | str, ...] | int]:
    """The shape of each tensor, or of a dictionary how many there are in it."""
    return {each["name"]: tuple(each["shape"]) if "shape" in each else len(each["tensors"]) for each in described}

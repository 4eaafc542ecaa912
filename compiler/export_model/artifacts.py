"""Writes an adapted model as programs that stand alone, with a manifest that says what they take and give."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedModel

from peftc.compiler.export_model import backends, entries
from peftc.compiler.export_model.bank import Bank, bank_facts, check_alike, read_bank
from peftc.compiler.export_model.entries import EntryCall
from peftc.compiler.export_model.export_options import ExportFormat, ExportOptions
from peftc.compiler.export_model.measuring import check_drift, measured
from peftc.compiler.export_model.programs import BuiltProgram, alone, make, own_tensors
from peftc.grammar.diagnostics import ModelError, UsageError, fail
from peftc.passes.export.exported import ADAPTER
from peftc.passes.foreign import transformers as contract
from peftc.passes.quantized.schemes.known import packed_modules
from peftc.passes.route.laws import UnroutedError
from peftc.runtime.files.tensor_file import Entry as TensorEntry
from peftc.runtime.files.tensor_file import write_tensors
from peftc.runtime.merge.repack import DEQUANTIZE
from peftc.runtime.merge.rounding import in_evaluation
from peftc.runtime.model.merging import merged_copy
from peftc.runtime.model.model import AdaptedModel

# Raised when a reader of the format before would misunderstand the manifest, as of a bank that programs are given.
FORMAT, WITH_BANK = 1, 2


def write_artifact(adapted: AdaptedModel, directory: Path, options: ExportOptions) -> dict[str, Any]:
    """Fill an empty directory with programs and what they need beside them. Returns what its manifest is to say.

    Raises UsageError or ModelError; see `AdaptedModel.export`.
    """
    backends.check_installed(options.program_format)
    _check(adapted, options)
    return dict(in_evaluation(adapted, lambda: _written(adapted, directory, options)))


def _written(adapted: AdaptedModel, directory: Path, options: ExportOptions) -> dict[str, Any]:
    names = _names(adapted, options)
    bank = read_bank(adapted, names, options.rank) if options.adapters == "routed" else None
    if options.adapters == "inputs":
        check_alike({name: adapted._adapter_state.adapter(name) for name in names})
    length = options.max_length or entries.length_of(adapted)
    entry = options.entry or ("generate" if entries.can_generate(adapted) else "forward")
    with TemporaryDirectory(prefix="merged.", dir=directory, ignore_cleanup_errors=True) as scratch:
        with _source(adapted, options, names, Path(scratch)) as source:
            programs: list[BuiltProgram] = []
            for call in entries.entered(source, entry, options.example_inputs):
                programs.append(_made(source, call, options, names, length, programs, bank))
        drift = measured(adapted, programs, options.adapters, names, options.example_inputs)
        check_drift(drift, options.max_drift, options.min_agreement)
        for each in programs:
            backends.save(each, directory, options.program_format)
    files = _write_adapters(directory, _tensors(adapted, programs, names, bank))
    _write_config(adapted, directory, options)
    if options.program_format in ("pt2", "onnx"):
        backends.write_layout(directory, programs, options.program_format, adapted.base_class.__name__)
    return {
        "artifact": {
            "format": FORMAT if bank is None else WITH_BANK,
            "backend": options.program_format,
            "adapters": options.adapters,
            "dimensions": _dimensions(programs),
            "length": length,
            "entries": {name: _entry(made, options.program_format) for made in programs for name in made.entered.names},
            "adapter_names": list(names) if options.adapters != "merged" else [],
            "adapter_files": files,
            "bank": None if bank is None else bank_facts(bank),
            "generation": _generation(adapted) if entry == entries.GENERATE else None,
            "machine": backends.machine(options.program_format),
        },
        "drift": {**asdict(drift), "inputs": "drawn" if options.example_inputs is None else "given"},
    }


def _check(adapted: AdaptedModel, options: ExportOptions) -> None:
    state = adapted._adapter_state
    if not state.enabled:
        fail(UsageError, "E521", "the adapters are disabled", help="call enable_adapters first")
    if options.adapters != "merged" and state.displaced:
        fail(UsageError, "E516", "the model is merged already", help="call unmerge_adapter first")
    if not state.names():
        help = "call add_adapter or load_adapter first"
        fail(UsageError, "E525", "there is no adapter, so there is nothing to export", help=help)
    if options.adapters == "merged" and not (state.active or state.displaced):
        fail(UsageError, "E517", "no adapter is active, so there is nothing to export", help="call set_adapter first")
    state.inputs.check_fixed(state.names(), "what is exported")
    active = [name for name, _ in state.active]
    for name in active if options.adapters == "merged" else (options.adapter_names or state.names()):
        if any(at.bound.tasks for at in state.adapter(name).plan.sites):
            message = f"adapter {name!r} has other weights for every task, which a program cannot be told"
            fail(UsageError, "E656", message, help="serve the model with peftc, or export other adapters")
    held = packed_modules(adapted)
    if held and (options.adapters != "merged" or options.quantized != DEQUANTIZE):
        label = next(iter(held.values())).packing.label
        message = f"the base is quantized ({label}), and its operators are not torch's own"
        help = "merge into dense weights: adapters='merged', quantized='dequantize'"
        fail(UsageError, "E643", message, help=help)


def _names(adapted: AdaptedModel, options: ExportOptions) -> tuple[str, ...]:
    """The adapters that a program is for."""
    state = adapted._adapter_state
    if options.adapters == "merged":
        return tuple(name for name, _ in state.base.merged or state.active)
    return tuple(options.adapter_names or state.names())


@contextmanager
def _source(
    adapted: AdaptedModel, options: ExportOptions, names: Sequence[str], scratch: Path
) -> Iterator[AdaptedModel]:
    """The model that programs are made of, with the adapters in place; what is merged lies in `scratch`."""
    if options.adapters == "merged":
        yield merged_copy(adapted, scratch, safe=options.safe_merge, quantized=options.quantized)
    else:
        with alone(adapted, names[0]):
            yield adapted


def _made(
    adapted: AdaptedModel,
    entered: EntryCall,
    options: ExportOptions,
    names: Sequence[str],
    length: int | None,
    before: Sequence[BuiltProgram],
    bank: Bank | None,
) -> BuiltProgram:
    limits = {"max_batch_size": options.max_batch_size, "max_length": length}
    slots = {name: target for made in before for name, target in made.slots.items()}
    try:
        return make(adapted, entered, options.adapters, names, **limits, beside=slots, bank=bank)
    except UnroutedError as error:
        where = f" at {error.site}" if error.site else ""
        message = f"rows cannot choose among these adapters{where}: {error.reason}"
        fail(ModelError, "E647", message, help="export the adapters as inputs, or one artifact for each, merged")


def _tensors(
    adapted: AdaptedModel, programs: Sequence[BuiltProgram], names: Sequence[str], bank: Bank | None
) -> dict[str, Mapping[str, torch.Tensor]]:
    """What the programs take of each adapter beside the other inputs, and of the base where rows choose."""
    if bank is None:
        taken = any(each["name"] == ADAPTER for each in programs[0].inputs)
        return {name: own_tensors(adapted, programs[0], name) for name in names} if taken else {}
    return {row: {name: value for made in programs for name, value in made.rows[row].items()} for row in bank.names}


def _write_adapters(directory: Path, adapters: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, str]:
    """A file for each adapter."""
    if not adapters:
        return {}
    (directory / "adapters").mkdir()
    files = {name: adapter_file(name, index) for index, name in enumerate(adapters)}
    for name, file in files.items():
        write_adapter(directory / file, adapters[name])
    return files


def adapter_file(name: str, index: int) -> str:
    """Where an artifact has the tensors of its adapter of this name and number."""
    return f"adapters/{name if name.replace('-', '_').isidentifier() else index}.safetensors"


def write_adapter(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """The tensors of an adapter as a file."""
    write_tensors(
        path, [TensorEntry.like(name, value, partial(torch.detach, value)) for name, value in tensors.items()]
    )


def _write_config(adapted: AdaptedModel, directory: Path, options: ExportOptions) -> None:
    if isinstance(adapted, PreTrainedModel):
        config = deepcopy(adapted.config)
        config.__dict__.pop(contract.QUANTIZATION, None)  # programs have dense weights
        config.save_pretrained(directory)
        if adapted.can_generate():
            adapted.generation_config.save_pretrained(directory)
    if options.tokenizer is not None:
        options.tokenizer.save_pretrained(directory)


def _entry(made: BuiltProgram, format: ExportFormat) -> dict[str, Any]:
    return {
        "file": backends.file_name(made.entered.file, format),
        "inputs": list(made.inputs),
        "outputs": list(made.outputs),
        "state": dict(made.state),
    }


def _dimensions(programs: Sequence[BuiltProgram]) -> dict[str, dict[str, int | None]]:
    """The ranges that every program accepts."""
    found: dict[str, dict[str, int | None]] = {}
    for each in (each for made in programs for each in made.dimensions):
        before = found.get(each.name, {"min": each.low, "max": each.high})
        highs = [high for high in (each.high, before["max"]) if high is not None]
        found[each.name] = {"min": max(each.low, before["min"] or 0), "max": min(highs, default=None)}
    return found


def _generation(adapted: AdaptedModel) -> dict[str, Any]:
    tokens = contract.special_tokens(adapted.generation_config)
    return {**tokens, "encoder_decoder": contract.is_encoder_decoder(adapted.config)}

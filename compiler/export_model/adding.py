"""Adds adapters to an artifact that takes them as inputs, or has rows choose from them.

Its programs stay as they are.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import torch

from peftc.compiler.export_model.adding_rows import bank_rows
from peftc.compiler.export_model.artifacts import adapter_file, write_adapter
from peftc.compiler.export_model.merged_facts import made_by
from peftc.compiler.export_model.output import MANIFEST, digest, moved_into, write_text
from peftc.compiler.export_model.slots import in_slots
from peftc.grammar.diagnostics import UsageError, fail
from peftc.runtime.artifact.manifest import read_manifest
from peftc.runtime.model.model import AdaptedModel


def add_adapters(adapted: AdaptedModel, directory: Path, names: Sequence[str], *, force: bool) -> tuple[str, ...]:
    """Write the tensors of these adapters beside those that the artifact has. Returns the names of the new files.

    Raises UsageError, and CheckpointError for what is no artifact.
    """
    read = read_manifest(directory)
    if read.adapters == "merged" or (read.adapters == "routed" and read.bank is None):
        message = "an artifact whose programs hold their adapters can be given no more of them"
        help = "export with adapters='inputs' or 'routed' (--adapters), by this version"
        fail(UsageError, "E640", message, help=help, where=str(directory))
    manifest: dict[str, Any] = json.loads((directory / MANIFEST).read_bytes())
    artifact = manifest["artifact"]
    for name in names:
        if name in artifact["adapter_files"] and not force:
            help = "give it another name, or replace it with --force (force=True)"
            fail(UsageError, "E511", f"the artifact has an adapter {name!r}", help=help, where=str(directory))
    if adapted.base_fingerprint() != manifest["model"]["fingerprint"]:
        message = "the artifact was made of another base"
        fail(UsageError, "E654", message, help="give the model that it was exported from", where=str(directory))
    if read.bank is None:
        taken = _taken(artifact)
        found = {name: _tensors(adapted, taken, name) for name in names}
    else:
        found = bank_rows(adapted, directory, read, names)
    files: dict[str, str] = artifact["adapter_files"]
    replaced = {name: files[name] for name in names if name in files}
    for name, tensors in found.items():
        # Until the manifest names it, nobody reads a file; one that it names already is not written to.
        files[name] = _free(directory, adapter_file(name, len(files)))
        with moved_into(directory / files[name]) as path:
            write_adapter(path, tensors)
        manifest["files"][files[name]] = digest(directory / files[name])
        artifact["adapter_names"] = list(dict.fromkeys((*artifact["adapter_names"], name)))
        manifest.setdefault("adapters", {})[name] = made_by(adapted, name)
    for each in replaced.values():
        del manifest["files"][each]
    write_text(directory / MANIFEST, json.dumps(manifest, indent=2, sort_keys=True) + "\n")
    for each in replaced.values():
        with suppress(OSError):
            (directory / each).unlink()
    return tuple(files[name] for name in names)


def _free(directory: Path, file: str) -> str:
    """The file's name, or one like it that is not taken."""
    stem, _, suffix = file.rpartition(".")
    names = (f"{stem}-{number}.{suffix}" if number else file for number in count())
    return next(each for each in names if not (directory / each).exists())


def _taken(artifact: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The tensors that any of the programs takes of an adapter, by name."""
    inputs = [each for entry in artifact["entries"].values() for each in entry["inputs"]]
    return {tensor["name"]: tensor for each in inputs for tensor in each.get("tensors", ())}


def _tensors(adapted: AdaptedModel, taken: Mapping[str, Mapping[str, Any]], name: str) -> dict[str, torch.Tensor]:
    """An adapter's tensors as the programs take them. Raises UsageError where it is laid out in another way."""
    tensors = in_slots(adapted, {each: str(facts["slot"]) for each, facts in taken.items()}, name)
    help = "same method, places and sizes as the adapters in the artifact"
    for each, facts in taken.items():
        wanted = f"{facts['dtype']} {list(facts['shape'])}"
        found = _described(tensors.get(each))
        if found != wanted:
            what = f"{each} is {found}, not {wanted}" if found else f"it has no {each}"
            fail(UsageError, "E646", f"adapter {name!r} is laid out in another way: {what}", help=help)
    places = {str(facts["slot"]).rpartition(".")[0] for facts in taken.values()}
    state = adapted._adapter_state
    own = dict.fromkeys(each.rpartition(".")[0] for each in state.engine.slots.tensors(state.adapter(name)))
    more = [each for each in own if each not in places]
    if more:
        place = more[0].partition("__")[2].replace("__", ".")
        fail(UsageError, "E646", f"adapter {name!r} is laid out in another way: it adapts {place} too", help=help)
    return tensors


def _described(tensor: torch.Tensor | None) -> str:
    return "" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"

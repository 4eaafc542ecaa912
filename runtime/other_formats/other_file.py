"""A file of LoRA weights that is not PEFT's: where it lies, whose it is, and what its keys say."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from peftc.grammar.diagnostics import CheckpointError, fail
from peftc.passes.foreign import diffusers, kohya
from peftc.passes.foreign.key_table import KeyTable
from peftc.runtime.peft_format.adapter_files import CONFIG, PICKLE, SAFETENSORS, WEIGHTS

KNOWN = (kohya.KEYS, diffusers.KEYS)


@dataclass(frozen=True)
class OtherFile:
    """Tensors by part, module as it is spelled there, and what they are. `settings` are PEFT's fields by part."""

    path: Path
    keys: KeyTable
    parts: Mapping[str, Mapping[str, Mapping[str, Tensor]]]
    settings: Mapping[str, Mapping[str, object]] = field(default_factory=dict)


def other_file(place: Path) -> Path | None:
    """The file meant, if a place is no PEFT checkpoint: itself, or the one in a directory. Raises CheckpointError."""
    if place.is_file():
        return place
    if not place.is_dir() or any((place / each).exists() for each in (CONFIG, WEIGHTS, PICKLE)):
        return None
    if (place / diffusers.WEIGHTS).is_file():
        return place / diffusers.WEIGHTS
    found = [each for each in sorted(place.glob(f"*{SAFETENSORS}")) if _library(_keys(each)) is not None]
    if len(found) > 1:
        names = ", ".join(each.name for each in found)
        fail(CheckpointError, "E370", f"several files of LoRA weights: {names}", help="name one", where=str(place))
    return found[0] if found else None


def read_other(path: Path) -> OtherFile:
    """What a file holds. Raises CheckpointError for one that is damaged, of no known format, or of another method."""
    where = str(path)
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        help = "fetch the file again" if path.suffix == SAFETENSORS else "only safetensors are read"
        fail(CheckpointError, "E307", f"damaged, or no file of tensors: {error}", help=help, where=where)
    library = _library(tensors)
    if library is None:
        shown = ", ".join(sorted(tensors)[:3]) or "none"
        known = " and ".join(each.library for each in KNOWN)
        message = f"these tensors are of no format that is known here: {shown}"
        fail(CheckpointError, "E370", message, help=f"read are PEFT's directories, and files of {known}", where=where)
    parts: dict[str, dict[str, dict[str, Tensor]]] = {}
    for key, tensor in tensors.items():
        part, module, what = _parsed(key, library, where)
        parts.setdefault(part, {}).setdefault(module, {})[what] = tensor
    return OtherFile(path, library, parts, _settings(metadata.get(library.settings), library, where))


def _keys(path: Path) -> tuple[str, ...]:
    try:
        with safe_open(path, "pt") as file:
            return tuple(file.keys())
    except (SafetensorError, OSError):
        return ()


def _library(keys: Iterable[str]) -> KeyTable | None:
    """The library that writes such keys: whichever knows the part and the end of one."""
    for key in keys:
        for each in KNOWN:
            ends = (*each.ends, *each.refused)
            if key.endswith(ends) and (key.startswith(each.parts) or any(_has(key, old) for old in each.renamed)):
                return each
    return None


def _has(key: str, old: str) -> bool:
    return re.search(old.removesuffix("$"), key) is not None


def _parsed(key: str, library: KeyTable, where: str) -> tuple[str, str, str]:
    """The part, the module and the tensor that a key means."""
    part = max((each for each in library.parts if key.startswith(each)), key=len, default="")
    for end, method in library.refused.items():
        if key.endswith(end):
            message = f"'{key}' is of {method}, and of {library.library}'s files only LoRA is read"
            fail(CheckpointError, "E371", message, help="load it with its own library", where=where)
    end = max((each for each in library.ends if key.endswith(each)), key=len, default="")
    if not end or (library.flat and not part):
        message = f"'{key}' is no tensor that {library.library} has in a file of LoRA weights"
        fail(CheckpointError, "E371", message, where=where)
    module = key[len(part) : len(key) - len(end)]
    for old, new in library.renamed.items():
        module = re.sub(old, new, module)
    return part, module, library.ends[end]


def _settings(text: str | None, library: KeyTable, where: str) -> dict[str, dict[str, object]]:
    """PEFT's fields for each part, where the file has them."""
    if not text:
        return {}
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        fail(CheckpointError, "E303", f"the metadata '{library.settings}' is not valid JSON: {error}", where=where)
    if not isinstance(fields, dict):
        fail(CheckpointError, "E304", f"the metadata '{library.settings}' is not a JSON object", where=where)
    found: dict[str, dict[str, object]] = {}
    for name, value in fields.items():
        part = next((each for each in library.parts if name.startswith(each)), "")
        found.setdefault(part, {})[name.removeprefix(part)] = value
    return found

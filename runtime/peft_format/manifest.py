"""Provenance: what a checkpoint was made from, written beside it, and how a model differs from that."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from torch import Tensor

from peftc.grammar.diagnostics import CheckpointError, fail
from peftc.grammar.spec.spec import REGIONS, Regions
from peftc.runtime.peft_format.adapter_files import MANIFEST, read_json, write_files

FORMAT = 1  # raised when a reader of the format before would misunderstand the file
SAMPLES = 64  # elements of each tensor that enter a fingerprint


@dataclass(frozen=True)
class AdapterFacts:
    """One adapter of a checkpoint."""

    method: str
    parameters: int


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint was made from, and by what.

    `spec_sha256` is that of `spec`; `fingerprint` that of the base's tensors; `versions` are of peftc, torch,
    transformers and the PEFT format; `quantized` is how the base's weights are stored ("nf4"), None where dense;
    `regions` which modules the spec had run graphs, None where it did not say.
    """

    base_id: str | None
    base_revision: str | None
    base_class: str
    fingerprint: str
    spec: str
    spec_sha256: str
    versions: Mapping[str, str]
    seed: int | None = None
    quantized: str | None = None
    regions: Regions | None = None
    adapters: Mapping[str, AdapterFacts] = field(default_factory=dict)
    format: int = FORMAT

    def to_json(self) -> str:
        """The manifest as JSON text, keys sorted."""
        return json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"


def from_json(value: Mapping[str, object], *, where: str) -> Manifest:
    """The manifest a JSON object holds. Fields of later versions that do not raise `format` are ignored.

    Raises:
        CheckpointError: written by a newer peftc in a format unknown here, or fields missing or of the wrong type.
    """
    version = value.get("format")
    if not _is_int(version):
        fail(CheckpointError, "E360", "not a peftc manifest: no field 'format'", where=where)
    if isinstance(version, int) and version > FORMAT:
        fail(
            CheckpointError,
            "E361",
            f"the manifest has format {version}, this peftc reads up to {FORMAT}",
            help="upgrade peftc, or remove the manifest: the adapter loads without it, unchecked",
            where=where,
        )
    for name, expected in _EXPECTED.items():
        if not _has_type(value.get(name), expected):
            fail(CheckpointError, "E360", f"manifest field '{name}' is not {expected}", where=where)
    known = {each.name for each in fields(Manifest)}
    given: dict[str, object] = {name: each for name, each in value.items() if name in known}
    given["adapters"] = _adapters(given.get("adapters"), where)
    return Manifest(**given)  # type: ignore[arg-type] # every type was checked above


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write the manifest beside a checkpoint's files. Raises CheckpointError."""
    text = manifest.to_json()
    write_files(directory, {MANIFEST: lambda path: path.write_text(text, encoding="utf-8")})


def read_manifest(directory: Path) -> Manifest | None:
    """The manifest beside a checkpoint's files, or None: PEFT writes none. Raises CheckpointError for a damaged one."""
    path = directory / MANIFEST
    return from_json(read_json(path), where=str(path)) if path.exists() else None


def spec_digest(text: str) -> str:
    """The sha256 of a spec's text."""
    return hashlib.sha256(text.encode()).hexdigest()


def fingerprint(named_tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A sha256 over the names, shapes, dtypes and sampled contents of tensors, whatever their order or device.

    Of each tensor up to 64 evenly spaced elements count, the first and the last among them, bit for bit.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(named_tensors, key=lambda each: each[0]):
        shape = "x".join(str(each) for each in tensor.shape)
        digest.update(f"{name}\0{shape}\0{tensor.dtype}\0".encode())
        digest.update(_samples(tensor.detach()))
    return digest.hexdigest()


def compare(
    manifest: Manifest, found: str, *, base_class: str, base_id: str | None = None, quantized: str | None = None
) -> tuple[str, ...]:
    """What differs between the base a checkpoint was made on and a model, as sentences; empty when nothing does.

    Another name for the same weights is no difference: a model may have been moved. Weights that are stored in another
    way cannot be compared.
    """
    messages = []
    if base_class != manifest.base_class:
        messages.append(f"the adapter was trained on a {manifest.base_class}, this model is a {base_class}")
    if quantized != manifest.quantized:
        messages.append(
            f"the adapter was trained on {_stored(manifest.quantized)}, this model has {_stored(quantized)}: outputs "
            "differ by what quantization rounds away, and whether the weights are otherwise the same was not checked"
        )
    elif found != manifest.fingerprint:
        revision = f" at revision {manifest.base_revision}" if manifest.base_revision else ""
        trained = f"'{manifest.base_id}'{revision}" if manifest.base_id else "a base without a name"
        here = f"'{base_id}'" if base_id else "this model"
        messages.append(
            f"the weights of {here} are not those the adapter was trained on ({trained}): "
            f"fingerprint {found[:12]}, expected {manifest.fingerprint[:12]}"
        )
    return tuple(messages)


def _stored(quantized: str | None) -> str:
    return f"quantized weights ({quantized})" if quantized else "dense weights"


_EXPECTED = {
    "base_id": "a text or null",
    "base_revision": "a text or null",
    "base_class": "a text",
    "fingerprint": "a text",
    "spec": "a text",
    "spec_sha256": "a text",
    "versions": "an object of texts",
    "seed": "a whole number or null",
    "quantized": "a text or null",
    "regions": f"{', '.join(REGIONS)} or null",
}


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _has_type(value: object, expected: str) -> bool:
    match expected:
        case "a text or null":
            return value is None or isinstance(value, str)
        case "a whole number or null":
            return value is None or _is_int(value)
        case "model, layers, modules or null":
            return value is None or value in REGIONS
        case "an object of texts":
            return isinstance(value, dict) and all(isinstance(each, str) for each in value.values())
        case _:
            return isinstance(value, str)


def _adapters(value: object, where: str) -> dict[str, AdapterFacts]:
    found: dict[str, AdapterFacts] = {}
    if isinstance(value, dict):
        for name, facts in value.items():
            match facts:
                case {"method": str(method), "parameters": int(parameters)}:
                    found[name] = AdapterFacts(method, parameters)
    if not isinstance(value, dict) or len(found) != len(value):
        fail(
            CheckpointError,
            "E360",
            "manifest field 'adapters' does not give each a method and its parameters",
            where=where,
        )
    return found


def _samples(tensor: Tensor) -> bytes:
    count = tensor.numel()
    if count == 0 or tensor.is_meta:
        return b""
    wanted = min(count, SAMPLES)
    positions = [index * (count - 1) // max(1, wanted - 1) for index in range(wanted)]
    chosen = _elements(tensor, positions).contiguous().cpu()
    return chosen.view(torch.uint8).numpy().tobytes()


def _elements(tensor: Tensor, positions: list[int]) -> Tensor:
    """Elements by flat position, without copying the tensor even where it is not contiguous."""
    flat = torch.tensor(positions, device=tensor.device)
    if tensor.dim() == 0:
        return tensor.reshape(1)
    return tensor[torch.unravel_index(flat, tensor.shape)]

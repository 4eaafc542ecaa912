"""What is in an exported artifact, as its manifest.json says: read and checked as a whole. Needs no torch."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from peftc.grammar.diagnostics import CheckpointError, fail
from peftc.passes.foreign.peft import BASE_ROWS
from peftc.passes.foreign.transformers import LOGITS
from peftc.runtime.artifact.fields import Fields

MANIFEST = "manifest.json"
BANK = "bank"  # the input of programs that has all adapters
FORMAT = 2
BACKENDS = ("pt2", "aoti", "onnx")
ADAPTERS = ("merged", "inputs", "routed")
DTYPES = (
    *("bool", "uint8", "int8", "int16", "int32", "int64"),
    *("float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2", "complex64"),
)

EXPORT = "give a directory that `peftc export --format pt2` (or aoti, or onnx) wrote"
AGAIN = "export the model again"


@dataclass(frozen=True)
class Size:
    """A size of an axis: the sum of some dimensions and a number. `past + sequence` is `(("past", "sequence"), 0)`."""

    dimensions: tuple[str, ...]
    number: int = 0

    def __str__(self) -> str:
        number = (str(self.number),) if self.number or not self.dimensions else ()
        return " + ".join((*self.dimensions, *number))

    def value(self, sizes: Mapping[str, int]) -> int:
        """The size, where every dimension is known."""
        return sum(map(sizes.__getitem__, self.dimensions), self.number)


@dataclass(frozen=True)
class Dimension:
    """How small and how large a dimension may be; no `max` is no limit."""

    min: int
    max: int | None


@dataclass(frozen=True)
class TensorFacts:
    """A tensor that goes in or comes out."""

    name: str
    shape: tuple[Size, ...]
    dtype: str


@dataclass(frozen=True)
class BankTensor:
    """What a program takes of all adapters that rows choose from, as one tensor `[adapters, ..]`; of one it is `facts`.

    `slots` are the attribute paths that peftc has for where it is read. With `turned` a matrix has its axes in the
    other order.
    """

    facts: TensorFacts
    slots: tuple[str, ...]
    turned: bool


@dataclass(frozen=True)
class Bank:
    """What rows choose from: with `base` none of the adapters is a choice. `constants` are, by attribute path, digests
    of what programs hold of all adapters alike.
    """

    base: bool
    constants: Mapping[str, str]


@dataclass(frozen=True)
class TensorGroup:
    """An input that is a dict of tensors by their names: an adapter."""

    name: str
    tensors: tuple[TensorFacts, ...]


@dataclass(frozen=True)
class Entry:
    """A function of the artifact. `state`: which output of one call is which input of the next.

    `bank` is what the program takes beside its inputs, the same in every call: what rows choose from.
    """

    name: str
    file: str
    inputs: tuple[TensorFacts | TensorGroup, ...]
    outputs: tuple[TensorFacts, ...]
    state: Mapping[str, str]
    bank: tuple[BankTensor, ...] = ()

    def takes(self, name: str) -> bool:
        """Whether there is an input of this name."""
        return any(each.name == name for each in self.inputs)


@dataclass(frozen=True)
class Generation:
    """What a loop that generates has to know about the model."""

    eos_token_id: tuple[int, ...]
    pad_token_id: int | None
    decoder_start_token_id: int | None
    encoder_decoder: bool


@dataclass(frozen=True)
class FileFacts:
    """What a file was when it was written."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class ArtifactManifest:
    """All that the runner needs to know. `length` is the most tokens of text a row may have."""

    backend: str
    adapters: str
    dimensions: Mapping[str, Dimension]
    length: int | None
    entries: Mapping[str, Entry]
    adapter_names: tuple[str, ...]
    adapter_files: Mapping[str, str]
    generation: Generation | None
    machine: Mapping[str, str] | None
    files: Mapping[str, FileFacts]
    bank: Bank | None = None

    @property
    def rows(self) -> tuple[str, ...]:
        """Whose the rows of the bank are, in order."""
        return (*([BASE_ROWS] if self.has_base else ()), *self.adapter_names)

    @property
    def has_base(self) -> bool:
        """Whether a row may have none of the adapters."""
        return self.bank is not None and self.bank.base

    @property
    def bank_tensors(self) -> dict[str, BankTensor]:
        """What any program takes of the bank, by name."""
        return {each.facts.name: each for entry in self.entries.values() for each in entry.bank}


def read_manifest(directory: Path) -> ArtifactManifest:
    """The manifest of an artifact.

    Raises:
        CheckpointError: there is none (E600), it is of something else (E601) or of a later format (E602), a field is
            not what it should be (E603), or a file's name leaves the directory (E605).
    """
    path = directory / MANIFEST
    where = str(path)
    if not directory.is_dir():
        fail(CheckpointError, "E600", "there is no such directory", help=EXPORT, where=str(directory))
    try:
        value: Any = json.loads(path.read_bytes())
    except FileNotFoundError:
        fail(CheckpointError, "E600", f"there is no {MANIFEST}: this is no artifact", help=EXPORT, where=str(directory))
    except OSError as error:
        fail(CheckpointError, "E600", f"cannot read: {error.strerror or error}", where=where)
    except (ValueError, RecursionError):
        fail(CheckpointError, "E603", "the manifest is not JSON", help=AGAIN, where=where)
    if not isinstance(value, dict) or "artifact" not in value:
        fail(CheckpointError, "E601", "the manifest is not that of an artifact", help=EXPORT, where=where)
    top = Fields(value, where=where)
    artifact = top.table("artifact")
    version = artifact.number("format")
    if version > FORMAT:
        message = f"the artifact has format {version}, this peftc reads up to {FORMAT}"
        fail(CheckpointError, "E602", message, help="upgrade peftc", where=where)
    files = {
        _inside(name, top): FileFacts(each.number("bytes"), each.text("sha256"))
        for name, each in top.table("files").tables()
    }
    return _manifest(artifact, files)


def _manifest(artifact: Fields, files: Mapping[str, FileFacts]) -> ArtifactManifest:
    dimensions = {
        name: Dimension(each.number("min"), each.optional_number("max"))
        for name, each in artifact.table("dimensions").tables()
    }
    entries = {
        name: _entry(name, each, dimensions, files) for name, each in artifact.table("entries", empty=False).tables()
    }
    adapters = artifact.choice("adapters", ADAPTERS)
    names = artifact.texts("adapter_names", optional=adapters == "merged")
    if adapters == "routed" and not names:
        artifact.wrong("adapter_names", "a list of at least one name")
    bank = _bank(artifact) if adapters == "routed" and artifact.value.get("bank") is not None else None
    adapter_files = artifact.table("adapter_files", optional=adapters != "inputs" and bank is None)
    generation = _generation(artifact)
    if generation is not None:
        _check_generates(artifact, entries)
    machine = artifact.table("machine", optional=True)
    found = ArtifactManifest(
        artifact.choice("backend", BACKENDS),
        adapters,
        dimensions,
        artifact.optional_number("length"),
        entries,
        names,
        {name: _file(adapter_files, name, files) for name in adapter_files.value},
        generation,
        {name: machine.text(name) for name in machine.value} or None,
        files,
        bank,
    )
    for name in found.rows if bank is not None else ():
        if name not in found.adapter_files:
            adapter_files.wrong(name, "the name of a file")
    if bank is not None and BASE_ROWS in names:
        artifact.wrong("adapter_names", f"a list of names other than {BASE_ROWS!r}")
    return found


def _bank(artifact: Fields) -> Bank:
    fields = artifact.table("bank")
    constants = fields.table("constants")
    return Bank(fields.truth("base"), {path: constants.text(path) for path in constants.value})


def _entry(name: str, fields: Fields, dimensions: Mapping[str, Dimension], files: Mapping[str, FileFacts]) -> Entry:
    taken = fields.list_of_tables("inputs")
    banks = [each for each in taken if each.value.get("name") == BANK and "tensors" in each.value]
    inputs = tuple(_input(each, dimensions) for each in taken if each not in banks)
    bank = tuple(_bank_tensor(tensor, dimensions) for each in banks for tensor in each.list_of_tables("tensors"))
    outputs = tuple(_tensor(each, dimensions) for each in fields.list_of_tables("outputs"))
    state = fields.table("state", optional=True)
    given = {each.name for each in outputs}
    for output in state.value:
        if output not in given:
            state.wrong(output, "the name of an output")
    states = {each: state.text(each) for each in state.value}
    return Entry(name, _file(fields, "file", files), inputs, outputs, states, bank)


def _bank_tensor(fields: Fields, dimensions: Mapping[str, Dimension]) -> BankTensor:
    read = _tensor(fields, dimensions)
    count, *shape = read.shape or (Size(()),)
    if len(count.dimensions) != 1 or any(each.dimensions for each in shape):
        fields.wrong("shape", "a list of a dimension and then numbers")
    return BankTensor(replace(read, shape=tuple(shape)), fields.texts("slots"), fields.truth("turned"))


def _input(fields: Fields, dimensions: Mapping[str, Dimension]) -> TensorFacts | TensorGroup:
    if "tensors" not in fields.value:
        return _tensor(fields, dimensions)
    tensors = tuple(_tensor(each, {}) for each in fields.list_of_tables("tensors"))
    return TensorGroup(fields.text("name"), tensors)


def _tensor(fields: Fields, dimensions: Mapping[str, Dimension]) -> TensorFacts:
    sizes = fields.value.get("shape")
    if not isinstance(sizes, list):
        fields.wrong("shape", "a list of sizes")
    shape = tuple(_size(each, dimensions) for each in sizes)
    if None in shape:
        known = ", ".join(dimensions) or "there are none"
        fields.wrong("shape", f"a list of numbers and sums of dimensions ({known})")
    return TensorFacts(fields.text("name"), tuple(filter(None, shape)), fields.choice("dtype", DTYPES))


def _size(value: object, dimensions: Mapping[str, Dimension]) -> Size | None:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return Size((), value)
    if not isinstance(value, str):
        return None
    terms = [each.strip() for each in value.split("+")]
    names = tuple(each for each in terms if not each.isdecimal())
    if not set(names) <= set(dimensions):
        return None
    return Size(names, sum(int(each) for each in terms if each.isdecimal()))


def _generation(artifact: Fields) -> Generation | None:
    if artifact.value.get("generation") is None:
        return None
    fields = artifact.table("generation")
    start, encoder_decoder = fields.optional_number("decoder_start_token_id"), fields.truth("encoder_decoder")
    if encoder_decoder and start is None:
        fields.wrong("decoder_start_token_id", "a whole number")
    return Generation(fields.numbers("eos_token_id"), fields.optional_number("pad_token_id"), start, encoder_decoder)


def _check_generates(artifact: Fields, entries: Mapping[str, Entry]) -> None:
    """That what generation needs is there: two entries that take tokens, and for the second what the first leaves."""
    if not {"prefill", "decode"} <= set(entries):
        artifact.wrong("entries", "an object with a 'prefill' and a 'decode'")
    decode = entries["decode"]
    for entry in (entries["prefill"], decode):
        if not any(each.name == LOGITS for each in entry.outputs) or not all(map(decode.takes, entry.state.values())):
            message = (
                f"the entry '{entry.name}' cannot be generated with: it gives no logits, or what 'decode' cannot take"
            )
            fail(CheckpointError, "E603", message, help=AGAIN, where=artifact.where)


def _file(fields: Fields, field: str, files: Mapping[str, FileFacts]) -> str:
    name = _inside(fields.text(field), fields)
    if name not in files:
        fields.wrong(field, "the name of one of the manifest's files")
    return name


def _inside(name: str, fields: Fields) -> str:
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or ":" in name:
        message = f"the manifest names a file outside of its directory: {name!r}"
        fail(CheckpointError, "E605", message, help="do not use this artifact: export it yourself", where=fields.where)
    return name

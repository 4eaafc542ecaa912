"""The programs of an artifact, loaded: one function of plain tensors, whatever made it."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.export.graph_signature import OutputKind
from torch.utils import _pytree as pytree

from peftc.grammar.diagnostics import AdapterError, CheckpointError, UsageError, fail
from peftc.runtime.artifact.machine import check_machine
from peftc.runtime.artifact.manifest import AGAIN, BANK, ArtifactManifest, Entry, TensorFacts, TensorGroup

_NOT_NUMPY = frozenset(("bfloat16", "float8_e4m3fn", "float8_e5m2"))

Value = Tensor | Mapping[str, Tensor]


class Program(Protocol):
    """A program as its file has it. What it is given was checked before."""

    def __call__(self, entry: Entry, inputs: Mapping[str, Value]) -> dict[str, Tensor]:
        """The outputs by name."""
        ...


def load_program(path: Path, manifest: ArtifactManifest) -> Program:
    """Load one file of an artifact. It may hold pickles: its digest has to be checked before.

    Raises:
        CheckpointError: it cannot be loaded (E606), or not on this machine (E608).
        UsageError: a package is needed (E607).
    """
    if manifest.machine is not None:
        check_machine(manifest.machine, where=str(path))
    loaders: Mapping[str, Callable[[Path], Program]] = {"pt2": _Graph, "aoti": _Package, "onnx": _Session}
    try:
        with _quiet():
            return loaders[manifest.backend](path)
    except AdapterError:
        raise
    except Exception as error:  # three libraries, each with errors of its own
        lines = str(error).strip().splitlines()
        why = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
        message = f"this cannot be loaded as a program ({manifest.backend}): {why}"
        fail(CheckpointError, "E606", message, help=AGAIN, where=str(path))


class _Layout:
    """Where in a flat list of tensors each input stands, and what the outputs are called."""

    def __init__(self, in_spec: pytree.TreeSpec, out_spec: pytree.TreeSpec, where: str):
        args, kwargs = pytree.tree_unflatten(range(in_spec.num_leaves), in_spec)
        outputs = pytree.tree_unflatten(range(out_spec.num_leaves), out_spec)
        if args or not isinstance(outputs, dict):
            fail(
                CheckpointError, "E606", "the program does not take and give dicts of tensors", help=AGAIN, where=where
            )
        self.inputs: list[tuple[str, str | None]] = []
        for name, place in kwargs.items():
            self.inputs += [(name, each) for each in place] if isinstance(place, dict) else [(name, None)]
        self.outputs = tuple(outputs)

    def flat(self, inputs: Mapping[str, Any]) -> list[Tensor]:
        """The inputs in order. Programs are made for tensors that are contiguous."""
        return [(inputs[name] if inner is None else inputs[name][inner]).contiguous() for name, inner in self.inputs]


class _Graph:
    """A torch.export program: its graph as it is, without the checks that its module makes at every call."""

    def __init__(self, path: Path):
        program = torch.export.load(path)
        signature = program.graph_signature
        if any(each.kind is not OutputKind.USER_OUTPUT for each in signature.output_specs):
            message = "the program changes its own weights or inputs"
            fail(CheckpointError, "E606", message, help=AGAIN, where=str(path))
        self.layout = _Layout(program.call_spec.in_spec, program.call_spec.out_spec, str(path))
        held = {**program.constants, **program.state_dict}
        lifted = [each.target for each in signature.input_specs if each.target is not None]
        self.state = [_plain(held[name]) for name in lifted]
        self.forward = program.graph_module.forward

    def __call__(self, entry: Entry, inputs: Mapping[str, Value]) -> dict[str, Tensor]:
        outputs = self.forward(*self.state, *self.layout.flat(inputs))
        return dict(zip(self.layout.outputs, outputs, strict=True))


class _Package:
    """An AOTInductor package. Its code checks nothing at all."""

    def __init__(self, path: Path):
        self.loader: Any = torch._inductor.aoti_load_package(str(path)).loader
        in_spec, out_spec = map(pytree.treespec_loads, self.loader.get_call_spec())
        self.layout = _Layout(in_spec, out_spec, str(path))

    def __call__(self, entry: Entry, inputs: Mapping[str, Value]) -> dict[str, Tensor]:
        outputs = self.loader.boxed_run(self.layout.flat(inputs))
        return dict(zip(self.layout.outputs, outputs, strict=True))


class _Session:
    """An ONNX model in onnxruntime."""

    def __init__(self, path: Path):
        runtime = package("onnxruntime", "onnxruntime", "run an ONNX artifact", where=str(path))
        self.session: Any = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self.inputs = [each.name for each in self.session.get_inputs()]
        self.where = str(path)
        self.layouts: dict[str, dict[str, tuple[str, str | None]]] = {}

    def __call__(self, entry: Entry, inputs: Mapping[str, Value]) -> dict[str, Tensor]:
        if entry.name not in self.layouts:
            self.layouts[entry.name] = _feeds(entry, self.inputs, self.where)
        values: Mapping[str, Any] = inputs
        feeds = {
            name: (values[outer] if inner is None else values[outer][inner]).numpy(force=True)
            for name, (outer, inner) in self.layouts[entry.name].items()
        }
        try:
            given = self.session.run(None, feeds)
        except Exception as error:  # its errors have a class for each kind, and no common one
            raise RuntimeError(str(error)) from error
        found = [torch.from_numpy(each) for each in given]
        return dict(zip((each.name for each in entry.outputs), found, strict=True))


def _feeds(entry: Entry, names: Sequence[str], where: str) -> dict[str, tuple[str, str | None]]:
    """Which input each of an ONNX model's is. What is in a dict has the dict's name in front there: `adapter.x.A`."""
    known: dict[str, tuple[str, str | None]] = {}
    flat: dict[str, TensorFacts] = {}
    for each in entry.inputs:
        if isinstance(each, TensorGroup):
            known |= {f"{each.name}.{inner.name}": (each.name, inner.name) for inner in each.tensors}
            flat |= {f"{each.name}.{inner.name}": inner for inner in each.tensors}
        else:
            known[each.name], flat[each.name] = (each.name, None), each
    for tensor in entry.bank:
        name = f"{BANK}.{tensor.facts.name}"
        known[name], flat[name] = (BANK, tensor.facts.name), tensor.facts
    foreign = [name for name, facts in flat.items() if facts.dtype in _NOT_NUMPY]
    if foreign:
        message = f"'{foreign[0]}' is of a type that onnxruntime takes from no Python program: {flat[foreign[0]].dtype}"
        fail(CheckpointError, "E606", message, help="export the model in float32 or float16", where=where)
    odd = [name for name in names if name not in known]
    if odd:
        message = f"the program takes '{odd[0]}', of which the manifest knows nothing"
        fail(CheckpointError, "E606", message, help=AGAIN, where=where)
    return {name: known[name] for name in names}


def package(name: str, distribution: str, purpose: str, *, where: str) -> Any:
    """A package that only some artifacts need.

    Raises:
        UsageError: it is not installed (E607).
    """
    try:
        return import_module(name)
    except ImportError:
        help = f"pip install {distribution}"
        fail(UsageError, "E607", f"to {purpose}, {distribution} has to be installed", help=help, where=where)


def _plain(tensor: Tensor) -> Tensor:
    """A parameter costs a look at its class in every operator."""
    return tensor.detach()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning and the traceback that torch logs for a file that it then raises an error for."""
    logger = logging.getLogger("torch.export")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before

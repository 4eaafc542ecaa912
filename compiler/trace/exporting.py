"""Runs the exporter on a twin: a forward with flat tensors in and out becomes a flat graph with plain placeholders."""

import inspect
import logging
import operator
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NoReturn

import torch
from torch import fx, nn
from transformers import PreTrainedModel
from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter
from transformers.utils import logging as transformers_logging

from peftc.compiler.trace.stamp import StampError
from peftc.grammar.diagnostics import AdapterError, Diagnostic, ModelError, fail
from peftc.passes.ir.bodies import inline_gradient_blocks, tell_inner_uses
from peftc.passes.ir.inputs import InputSpec, Size, describe

Forward = Callable[[Mapping[str, torch.Tensor]], list[torch.Tensor]]
"""What is exported: tensors by the names of inputs -> the output's tensors."""


def _always(_: Callable[[], bool]) -> Callable[[], bool]:
    return lambda: True


COMPILING = [(torch.compiler, "is_compiling", _always)]
"""For `patch_attributes`: models choose kernels that fake tensors can run when they believe they are being compiled."""


class _CarriedError(Exception):
    """Takes what a forward met past the exporter, which prints the graph so far for errors that it knows."""


@dataclass(frozen=True)
class Input:
    """An input of a graph, and the fake tensor that it is traced with."""

    spec: InputSpec
    value: torch.Tensor

    @property
    def name(self) -> str:
        """What it is called in the graph."""
        return self.spec.name

    @property
    def dynamic(self) -> tuple[int, ...]:
        """The axes whose sizes may vary."""
        return tuple(axis for axis, size in enumerate(self.spec.axes) if not isinstance(size, int))


def exported(
    model: nn.Module, forward: Forward, inputs: Sequence[Input], kind: str
) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """What the exporter makes of a forward in a model's place, and its guards on sizes as `Traced.guards` has them.

    Raises ModelError for a `kind` of model that it cannot trace.
    """
    sample = {each.name: each.value for each in inputs}
    dynamic = {each.name: dict.fromkeys(each.dynamic, torch.export.Dim.AUTO) for each in inputs}

    def flat(**tensors: torch.Tensor) -> list[torch.Tensor]:
        try:
            return forward(tensors)
        except RuntimeError as error:
            if "data-dependent" in str(error):
                raise _CarriedError from error
            raise

    flat.__signature__ = inspect.Signature([_keyword(name) for name in sample])  # type: ignore[attr-defined]
    model.__dict__["forward"] = flat
    try:
        if isinstance(model, PreTrainedModel):
            config = DynamoConfig(dynamic=True, dynamic_shapes=dynamic)
            program, _ = DynamoExporter().export_program(model, dict(sample), config)
        else:
            with torch.no_grad():
                program = torch.export.export(model, (), sample, dynamic_shapes=dynamic, strict=False)
        # What transformers' models ask of sizes is about masks and lengths that the sampler chose to differ; a plain
        # module may have taken another way for these sizes than it would for others.
        asked = () if isinstance(model, PreTrainedModel) else program._guards_code
        return program.module(), tuple(_guards(asked, list(sample)))
    except (AdapterError, StampError):
        raise
    except Exception as error:  # whatever the model's own code meets under the exporter
        met = error.__cause__ if isinstance(error, _CarriedError) else error
        assert isinstance(met, Exception)
        refuse(kind, met)
    finally:
        model.__dict__.pop("forward", None)


def flat_graph(module: fx.GraphModule, inputs: Sequence[Input]) -> fx.Graph:
    """The exported graph with plain placeholders and a flat tuple as output."""
    graph = module.graph
    graph.set_codegen(fx.graph.CodeGen())
    inline_gradient_blocks(graph, module)
    tell_inner_uses(graph, module)
    names = [str(node.target) for node in graph.find_nodes(op="placeholder")]
    if names != [each.name for each in inputs]:
        extra = sorted(set(names) - {each.name for each in inputs})
        fail(ModelError, "E403", f"the exporter prepares inputs that are not supported yet: {', '.join(extra)}")
    for node, each in zip(graph.find_nodes(op="placeholder"), inputs, strict=True):
        describe(node, replace(each.spec, axes=_known_sizes(node, each.spec.axes)))
    for node in graph.nodes:
        if node.op == "get_attr" and "val" not in node.meta:
            node.meta["val"] = None
        if node.op == "call_module" and node.target == "_guards_fn":
            graph.erase_node(node)
    return graph


def constants_of(
    module: fx.GraphModule, graph: fx.Graph, aliases: Mapping[str, tuple[str, ...]]
) -> dict[str, torch.Tensor | nn.Module]:
    """What the graph reads that is not the model's: lifted constants and the bodies of higher-order operators."""
    found: dict[str, torch.Tensor | nn.Module] = {}
    for node in graph.find_nodes(op="get_attr"):
        if node.target not in aliases:
            found[str(node.target)] = operator.attrgetter(str(node.target))(module)
    return found


def refuse(kind: str, error: Exception) -> NoReturn:
    """Raise ModelError for what the exporter met in a forward."""
    lines = str(error).strip().splitlines() or ["no message"]
    help = "its forward depends on data, or on something torch.export does not support; the cause is chained"
    if isinstance(error, ValueError | TypeError):
        help = "its own forward may refuse such a call: try it on the model without adapters; the cause is chained"
    diagnostic = Diagnostic(
        "E402", f"{kind} cannot be traced for this call: {type(error).__name__}: {lines[0]}", help=help
    )
    raise ModelError(diagnostic) from error


_ADVISERS = ("torch.export", "torch.fx.experimental.symbolic_shapes")


@contextmanager
def apart(device: str) -> Iterator[None]:
    """Trace whatever the caller's mode: the graph serves calls inside and outside of autocast and inference mode.

    Keeps the exporter's advice, which is not for our user, off the user's screen.
    """
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    loggers = [logging.getLogger(name) for name in _ADVISERS]
    before = [each.disabled for each in loggers]
    for each in loggers:
        each.disabled = True
    try:
        with warnings.catch_warnings(), torch.inference_mode(False), torch.autocast(device, enabled=False):
            warnings.simplefilter("ignore")
            yield
    finally:
        for each, was in zip(loggers, before, strict=True):
            each.disabled = was
        transformers_logging.set_verbosity(level)


def _keyword(name: str) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def _known_sizes(node: fx.Node, axes: tuple[Size | None, ...]) -> tuple[Size | None, ...]:
    """What the axes of an input count, and how long those are that the trace turned out to be bound to."""
    shape = node.meta["val"].shape
    return tuple(size if isinstance(size, int) else meant for size, meant in zip(shape, axes, strict=True))


def _guards(code: Sequence[str], names: list[str]) -> Iterator[str]:
    """The exporter's guards on sizes, as `Traced.guards` has them."""
    for guard in code:
        text = re.sub(
            r"L\['(\w+)'\]\.size\(\)\[(\d+)\]", lambda found: f"sizes[{names.index(found[1])}][{found[2]}]", guard
        )
        if "L[" not in text:
            yield text

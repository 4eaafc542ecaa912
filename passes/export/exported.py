"""Makes an ExportedProgram of a lifted graph, without tracing it again."""

from collections.abc import Mapping, Sequence

import torch
from torch import fx, nn
from torch._export.verifier import TrainingIRVerifier
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.utils import _pytree as pytree
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from peftc.passes.export.lift import Lifted

ADAPTER = "adapter"
"""The input of a program that is a dictionary of an adapter's tensors, where it takes one."""


def exported_program(
    lifted: Lifted, outputs: Sequence[str], group: str, inside: Mapping[str, fx.Node]
) -> ExportedProgram:
    """A program that takes its inputs by name and gives a dictionary of tensors: `outputs` name those of the graph.

    `inside` are the inputs that are passed together, as one dictionary `group`, by their names in it. The graph is
    taken over. Nothing but torch is needed to load the program, once it is saved.
    """
    graph = lifted.graph
    graph.eliminate_dead_code()
    for node in graph.nodes:
        node.meta = {"val": node.meta["val"]} if "val" in node.meta else {}
    own = {name: node for name, node in lifted.inputs.items() if node not in set(inside.values())}
    ordered = [*own.values(), *inside.values()]
    for node in ordered:
        node.target = node.name  # where torch decomposes a program, it looks one up as the other
    _in_order(graph, [*lifted.tensors, *ordered])
    specs, state = [], dict[str, torch.Tensor]()
    for node, value in lifted.tensors.items():
        name, is_parameter = lifted.names[node], isinstance(value, nn.Parameter)
        kind = InputKind.PARAMETER if is_parameter else InputKind.BUFFER
        specs.append(InputSpec(kind, TensorArgument(node.name), name, None if is_parameter else True))
        state[name] = nn.Parameter(value.detach(), requires_grad=False) if is_parameter else value.detach()
    specs += [InputSpec(InputKind.USER_INPUT, TensorArgument(node.name), None) for node in ordered]
    (output,) = graph.find_nodes(op="output")
    results = [each.name for each in output.args[0]]
    taken: dict[str, object] = dict.fromkeys(own, 0)
    taken |= {group: dict.fromkeys(inside, 0)} if inside else {}
    call = ModuleCallSignature(
        [TensorArgument(each.name) for each in ordered],
        [TensorArgument(each) for each in results],
        pytree.tree_structure(((), taken)),
        pytree.tree_structure(dict.fromkeys(outputs, 0)),
    )
    return ExportedProgram(
        root=fx.GraphModule(nn.Module(), graph),
        graph=graph,
        graph_signature=ExportGraphSignature(
            specs, [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(each), None) for each in results]
        ),
        state_dict=state,
        range_constraints={
            # A program whose file names a size out of range cannot be loaded, and the sample is named there.
            lifted.symbols[each.name].node.expr: ValueRanges(
                each.low, int_oo if each.high is None else max(each.high, each.sample)
            )
            for each in lifted.dimensions
        },
        constants={},
        module_call_graph=[ModuleCallEntry("", call)],
        example_inputs=((), _examples(own, group, inside)),
        verifiers=[TrainingIRVerifier],
    )


def _in_order(graph: fx.Graph, placeholders: Sequence[fx.Node]) -> None:
    """Put the placeholders in this order in front of all else; those that are not named are gone."""
    first = next(iter(graph.nodes))
    for node in placeholders:
        if node is first:
            first = first.next
        else:
            first.prepend(node)


def _examples(own: Mapping[str, fx.Node], group: str, inside: Mapping[str, fx.Node]) -> dict[str, object]:
    """Inputs of the sample sizes: what ahead-of-time compilers begin with."""
    found: dict[str, object] = {name: _example(node) for name, node in own.items()}
    return found | ({group: {name: _example(node) for name, node in inside.items()}} if inside else {})


def _example(node: fx.Node) -> torch.Tensor:
    value = node.meta["val"]
    sizes = [each if isinstance(each, int) else int(each.node.hint) for each in value.shape]
    return torch.ones(sizes, dtype=value.dtype, device=value.device)

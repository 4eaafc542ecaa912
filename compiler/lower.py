"""The pipelines: from a trace to the graph that runs."""

from torch import fx

from peftc.grammar.diagnostics import ModelError, fail
from peftc.passes import driver
from peftc.passes.clean import Clean
from peftc.passes.float_mask import FloatMask
from peftc.passes.fuse_low_rank import FuseLowRank
from peftc.passes.group_heads import GroupHeads
from peftc.passes.insert_copy import InsertCopy
from peftc.passes.insert_delta import DropoutError, InsertDelta, SlotValue
from peftc.passes.native import NativeCalls
from peftc.passes.structure import Structure
from peftc.passes.traced import Traced


def specialise(
    traced: Traced, structure: Structure, slot_value: SlotValue, *, training: bool, autocast: bool
) -> fx.Graph:
    """A copy of the trace with adapters of this structure in it.

    Raises ModelError where an adapter cannot be put in as asked.
    """
    graph = copy_graph(traced.graph)
    pipeline: list[driver.Pass] = [Clean(keep_casts=autocast)]
    if structure.sites:
        pipeline.append(InsertDelta(structure, slot_value, training))
    if structure.copies:
        pipeline.append(InsertCopy(structure))
    try:
        driver.run(graph, pipeline)
    except DropoutError as error:
        fail(
            ModelError,
            "E420",
            f"dropout cannot be honoured at {error.site.name}: {error.reason}",
            help="set dropout = 0 there",
        )
    return graph


def lower(graph: fx.Graph, *, autocast: bool) -> tuple[fx.Graph, fx.Graph]:
    """Two copies of a specialised graph: for torch.compile to trace, and for Python to run as it is.

    The second is fused and calls operators the short way, both of which a compiler does by itself. Under autocast
    nothing is fused: it does not cast what an in-place operator is given.
    """
    traceable = copy_graph(graph)
    driver.run(traceable, [GroupHeads(), FloatMask()])
    plain = copy_graph(traceable)
    fuse: list[driver.Pass] = [] if autocast else [FuseLowRank()]
    driver.run(plain, [*fuse, NativeCalls()])
    return traceable, plain


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A graph with nodes of its own and the same metadata."""
    copied = fx.Graph()
    output = copied.graph_copy(graph, {})
    copied.output(output)
    return copied

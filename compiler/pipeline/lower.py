"""The pipelines: from a trace to the graph that runs."""

from collections.abc import Mapping

from torch import fx

from peftc.compiler.pipeline import managed
from peftc.grammar.diagnostics import ModelError, fail
from peftc.grammar.method.rule import PLACES
from peftc.passes.cost.cost import Choice
from peftc.passes.expression.apply import DropoutError
from peftc.passes.insert.insert_copy import InsertCopy
from peftc.passes.insert.insert_delta import DisorderedError, InsertDelta, SlotValue, UnfitError
from peftc.passes.insert.insert_tokens import InsertTokens
from peftc.passes.ir import pass_manager
from peftc.passes.ir.traced import Traced
from peftc.passes.ir.verify import VerifyError
from peftc.passes.optimize.add_in_place import AddInPlace
from peftc.passes.optimize.clean import Clean
from peftc.passes.optimize.float_mask import FloatMask
from peftc.passes.optimize.fuse_low_rank import FuseLowRank
from peftc.passes.optimize.fuse_rows import FuseRows
from peftc.passes.optimize.group_heads import GroupHeads
from peftc.passes.optimize.hoist import Hoist
from peftc.passes.optimize.join_cats import JoinCats
from peftc.passes.optimize.lower_quantized import LowerQuantized
from peftc.passes.optimize.native import NativeCalls
from peftc.passes.optimize.stop_early import StopEarly
from peftc.passes.plan.structure import Structure
from peftc.passes.quantized.schemes.known import Packed
from peftc.passes.route.group_rows import GroupRows
from peftc.passes.route.laws import DisorderError, UnroutedError
from peftc.passes.route.route_rows import LanePieces, RouteRows
from peftc.passes.virtual_tokens.insert_attention import InsertAttention
from peftc.passes.virtual_tokens.insert_heads import InsertHeads
from peftc.passes.virtual_tokens.insert_prefix import CarryPrompt, InsertPrefix
from peftc.passes.virtual_tokens.insert_prompt import InsertPrompt
from peftc.runtime.execution import virtual
from peftc.runtime.execution.program import Lowered

PUSHED = Choice()


def specialise(
    traced: Traced,
    structure: Structure,
    slot_value: SlotValue,
    *,
    training: bool,
    autocast: bool,
    choice: Choice = PUSHED,
    mode: str = "",
    packed: Mapping[str, Packed] | None = None,
) -> fx.Graph:
    """A copy of the trace with adapters of this structure in it, widened as the mode of the call says.

    `packed` are the modules that store their weight packed.

    Raises ModelError where an adapter cannot be put in as asked.
    """
    graph = copy_graph(traced.graph)
    pipeline: list[pass_manager.Pass] = [Clean(keep_casts=autocast)]
    pipeline += _widening(traced, structure, slot_value, mode)
    if structure.at("attention"):
        pipeline.append(InsertAttention(structure, slot_value))
    if structure.sites:
        pipeline.append(InsertDelta(structure, slot_value, training, choice.dense | choice.kept))
    if structure.rows:
        pipeline.append(InsertTokens(structure, slot_value, autocast))
    if structure.copies:
        pipeline.append(InsertCopy(structure))
    pipeline += [StopEarly(), LowerQuantized(packed or {}, training)]
    try:
        managed.run(graph, pipeline)
    except UnfitError as error:
        if error.site.kind in PLACES:
            what = f"the attention of {error.site.module}" if error.site.module else f"the model's {error.site.kind}"
            fail(ModelError, "E422", f"nothing can be put in front of {what}: {error.reason}")
        if isinstance(error, DisorderedError):
            message = f"tokens cannot be given more or less of the adapter at {error.site.name}: {error.reason}"
            fail(ModelError, "E425", message, help="choose other sites")
        help = "choose other sites, or a method that leaves the bias alone"
        fail(ModelError, "E421", f"the adapter cannot be put in at {error.site.name}: {error.reason}", help=help)
    except DropoutError as error:
        fail(
            ModelError,
            "E420",
            f"dropout cannot be honoured at {error.site.name}: {error.reason}",
            help="set dropout = 0 there",
        )
    return graph


def _widening(traced: Traced, structure: Structure, slot_value: SlotValue, mode: str) -> list[pass_manager.Pass]:
    """The passes that put virtual tokens in front."""
    cached, double = traced.cached, traced.encoder_decoder
    match mode:
        case virtual.PREFIX:
            return [InsertPrefix(structure, slot_value, cached, double)]
        case virtual.START:
            return [InsertPrompt(structure, slot_value, cached, double, traced.filler)]
        case virtual.CARRY:
            return [CarryPrompt(structure, cached)]
        case virtual.HEADS:
            return [InsertHeads(structure, slot_value)]
        case _:
            return []


def lower(graph: fx.Graph, *, autocast: bool, choice: Choice = PUSHED, by_row: bool = False) -> Lowered:
    """Two copies of a specialised graph: for torch.compile to trace, and for Python to run as it is.

    The second is fused and calls operators the short way, both of which a compiler does by itself; what no activation
    goes into is taken out of it where nothing trains. Under autocast nothing is fused or kept: it does not cast what an
    in-place operator is given, and its type may change from call to call.

    With `by_row` every row has an adapter of its own, and what it has of that is read from `routed`. Raises ModelError
    where an operator has no form for that.
    """
    lanes: tuple[LanePieces, ...] = ()
    if by_row:
        graph, route = copy_graph(graph), RouteRows()
        try:
            managed.run(graph, [route])
        except (
            UnroutedError,
            VerifyError,
            RuntimeError,
        ) as error:  # or whatever an operator says of what it does not take
            site, reason = (error.site, error.reason) if isinstance(error, UnroutedError) else ("", _first_line(error))
            message = f"rows cannot have adapters of their own{' at ' * bool(site)}{site}: {reason}"
            code = "E425" if isinstance(error, DisorderError) else "E424"
            fail(ModelError, code, message, help="call once for each adapter, or choose other sites")
        lanes = tuple(route.lanes)
    traceable = compilable(graph)
    plain = copy_graph(traceable)
    group = GroupRows()
    steps: list[pass_manager.Pass] = [] if autocast else [FuseLowRank(), FuseRows(), AddInPlace(), group]
    if choice.frozen and not autocast:
        steps.append(Hoist(choice.dense))
    result = managed.run(plain, [*steps, NativeCalls()])
    hoisted = result.changes.get(Hoist.name)
    return Lowered(traceable, plain, None if hoisted is None else hoisted.prologue, lanes, frozenset(group.matrices))


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def compilable(graph: fx.Graph) -> fx.Graph:
    """A copy of a specialised graph for other compilers: nothing writes in place, and operators are torch's own."""
    copied = copy_graph(graph)
    managed.run(copied, [JoinCats(), GroupHeads(), FloatMask()])
    return copied


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A graph with nodes of its own and the same metadata."""
    copied = fx.Graph()
    output = copied.graph_copy(graph, {})
    copied.output(output)
    return copied

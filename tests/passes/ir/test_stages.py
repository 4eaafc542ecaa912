"""The table of stages; in each a shape that is wrong and an operator that does not belong are named."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import fx

from peftc.passes.export.fold import Fold
from peftc.passes.insert.insert_delta import InsertDelta
from peftc.passes.ir import pass_manager
from peftc.passes.ir.emit import Origin
from peftc.passes.ir.pass_manager import Change, graph_of
from peftc.passes.ir.split_tied_weights import SplitOwners
from peftc.passes.ir.stages import LEGAL, Stage, is_legal, name_of
from peftc.passes.ir.verify import VerifyError
from peftc.passes.optimize.clean import Clean
from peftc.passes.optimize.float_mask import FloatMask
from peftc.passes.optimize.fuse_low_rank import FuseLowRank
from peftc.passes.optimize.group_heads import GroupHeads
from peftc.passes.optimize.join_cats import JoinCats
from peftc.passes.optimize.lower_quantized import LowerQuantized
from peftc.passes.optimize.native import NativeCalls
from peftc.passes.quantized.packed_operators import PACKED_LINEAR, QUANTIZED_LINEAR, UNPACK, packed_linear
from peftc.passes.virtual_tokens.insert_prompt import InsertPrompt
from tests.passes.export.lifted import X, lifted

aten = torch.ops.aten
CHECK = aten._assert_tensor_metadata.default
OURS = Origin("hurt", "some.site")


def through(lab: Any, stage: Stage) -> Any:
    """A graph that has come to a stage by the passes that lead there, verified after each."""
    name = "Reader" if stage is Stage.WIDENED else "Two"
    spec = "adapter a = prompt(length = 3)" if stage is Stage.WIDENED else "adapter a = lora(rank = 2) { on first }"
    if stage >= Stage.LIFTED:
        tensors = {"A": torch.randn(4, 4), "w": torch.randn(4, 4)}
        subject = lifted(_weighted, tensors, X)
        return pass_manager.run(subject, [Fold(frozenset({"A"}))] if stage is Stage.CLOSED else []).subject
    active = lab.active(name, spec)
    steps = [
        SplitOwners({}),
        Clean(),
        InsertPrompt(active.structure, active.slot_value, 2),
        InsertDelta(active.structure, active.slot_value, False),
        LowerQuantized({}, False),
        *(JoinCats(), GroupHeads(), FloatMask()),
        FuseLowRank(),
        NativeCalls(),
    ]
    return pass_manager.run(lab.graph(name), [each for each in steps if each.leaves <= stage]).subject


def _weighted(call: Callable[..., Any], inputs: Any, held: Any) -> Any:
    return call(aten.linear.default, (inputs[0], call(aten.add.Tensor, (held["w"], held["A"]))))


@dataclass(frozen=True)
class Hurt:
    """f  ->  what must not be left"""

    leaves: Stage
    how: Callable[[fx.Node], None]
    name: ClassVar[str] = "hurt"

    def run(self, subject: Any) -> Change:
        nodes = graph_of(subject).nodes
        self.how(
            next(each for each in nodes if each.op == "call_function" and isinstance(each.meta["val"], torch.Tensor))
        )
        return Change()


def longer(node: fx.Node) -> None:
    value = node.meta["val"]
    with value.fake_mode:
        node.meta["val"] = torch.empty((*value.shape, 2), dtype=value.dtype)


def calling(target: Any, origin: Origin | None = None) -> Callable[[fx.Node], None]:
    def put(node: fx.Node) -> None:
        node.target = target
        if origin is not None:
            node.meta["peftc"] = origin

    return put


ILLEGAL: dict[Stage, tuple[Any, Origin | None]] = {
    Stage.TRACED: (torch.relu, None),
    Stage.CLEANED: (CHECK, None),
    Stage.WIDENED: (aten.relu_.default, OURS),
    Stage.ADAPTED: (PACKED_LINEAR, OURS),
    Stage.BOUND: (QUANTIZED_LINEAR, None),
    Stage.PORTABLE: (aten.addmm_.default, OURS),
    Stage.FUSED: (torch.relu, OURS),
    Stage.NATIVE: (UNPACK, OURS),
    Stage.LIFTED: (torch.ops.higher_order.cond, None),
    Stage.CLOSED: (aten.index_add_.default, OURS),
}


@pytest.mark.parametrize("stage", Stage)
def test_a_wrong_shape_is_named(stage, lab):
    subject = through(lab, stage)
    assert pass_manager.run(subject, [Hurt(stage, lambda node: None)], full=True).subject is subject
    with pytest.raises(VerifyError, match=r"after pass 'hurt': node \w+ holds \w+\[.*, 2\] on cpu, but .* gives "):
        pass_manager.run(subject, [Hurt(stage, longer)])


@pytest.mark.parametrize("stage", Stage)
def test_an_operator_that_does_not_belong_is_named(stage, lab):
    target, origin = ILLEGAL[stage]
    told = f"which is not legal in a graph that is {stage.name.lower()}"
    with pytest.raises(VerifyError, match=rf"after pass 'hurt': node \w+ calls .*, {told}") as caught:
        pass_manager.run(through(lab, stage), [Hurt(stage, calling(target, origin))])
    assert str(target) in caught.value.problem


def call(target: Any, origin: Origin | None = None) -> fx.Node:
    node = fx.Graph().call_function(target)
    if origin is not None:
        node.meta["peftc"] = origin
    return node


@pytest.mark.parametrize(
    ("target", "name"),
    [
        (aten.add.Tensor, "aten.add.Tensor"),
        (torch.add, "torch.add"),
        (torch.Tensor.view, "torch._C.view"),
        (torch._C._nn.silu, "torch._C._nn.silu"),
        (torch.sym_max, "torch.sym_max"),
        (packed_linear, "peftc.passes.quantized.packed_operators.packed_linear"),
        (torch.ops.higher_order.cond, "higher_order.cond"),
        (UNPACK, "peftc.unpack.default"),
    ],
)
def test_names(target, name):
    assert name_of(call(target)) == name


def legal_in(target: Any, origin: Origin | None = None) -> set[Stage]:
    return {stage for stage in Stage if is_legal(call(target, origin), stage)}


def test_who_may_write_in_place():
    assert legal_in(aten.add_.Tensor) == set(Stage), "a model writes to what it likes"
    assert legal_in(aten.add_.Tensor, OURS) == {Stage.FUSED, Stage.NATIVE}
    assert legal_in(aten.add.Tensor, OURS) == set(Stage)


def test_what_no_row_has_is_legal_nowhere():
    assert legal_in(print) == set(Stage), "builtins make numbers"
    assert legal_in(pass_manager.run) == set()
    assert legal_in(torch.sym_max) == set(Stage)


def test_every_row_decides_something():
    """Each is the first that matches some name, so that none stands where it does nothing."""
    patterns = [row.pattern for row in LEGAL]
    assert len(set(patterns)) == len(patterns)
    assert all(row.stages or row.pattern == "peftc.*" for row in LEGAL)

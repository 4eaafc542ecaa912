"""The laws of a convolution, against patches cut out by hand."""

import pytest
import torch
from torch import fx, nn
from torch.testing import assert_close

from peftc.grammar.algebra import algebra as al
from peftc.passes.expression.apply import Apply
from peftc.passes.expression.convolve import Convolve, Patches, is_low_rank
from peftc.passes.expression.materialise import Evaluator
from peftc.passes.ir.emit import Emit, Origin
from peftc.passes.plan.site import Site

aten = torch.ops.aten
PRODUCT = al.Product(al.Param("B"), al.Param("A"))
SCALED = al.Scaled("s", PRODUCT)
OUT, CHANNELS, KERNEL, RANK = 4, 6, (3, 2), 2


def patches(x: torch.Tensor, groups: int, **options: object) -> torch.Tensor:
    """[rows, groups, channels of a group * kernel, places]"""
    cut = nn.functional.unfold(x, KERNEL, **options)
    return cut.view(x.shape[0], groups, -1, cut.shape[-1])


def by_hand(weight: torch.Tensor, x: torch.Tensor, groups: int, **options: object) -> torch.Tensor:
    rows = weight.view(groups, OUT // groups, -1)
    return torch.einsum("goi,ngip->ngop", rows, patches(x, groups, **options)).flatten(1, 2)


class Bench:
    """A convolution's graph, built by hand."""

    def __init__(self, lab, groups=1, training=False, dtype=torch.float32):
        self.lab, self.hand, self.groups = lab, lab.hand(), groups
        inner = CHANNELS // groups * KERNEL[0] * KERNEL[1]
        self.tensors = {
            "A": torch.randn(RANK, inner),
            "B": torch.randn(OUT, RANK),
            "G": torch.randn(OUT, inner),
            "s": torch.tensor(3.0),
        }
        self.x = torch.randn(2, CHANNELS, 7, 8)
        node = self.hand.placeholder("x", *self.x.shape, dtype=dtype)
        nodes = {name: self.hand.attribute(name, *each.shape) for name, each in self.tensors.items()}
        end = self.hand.call(aten.relu.default, node)
        self.emit = Emit(self.hand.graph, end, Origin("test"), like=end)
        values = Evaluator(self.emit, nodes, nodes, weight=lambda: nodes["G"])
        sizes = {name: tuple(each.shape) for name, each in self.tensors.items() if each.dim()}
        site = Site("conv", "weight", "conv2d", OUT, inner, kernel=KERNEL, groups=groups)
        self.apply = Apply(self.emit, values, lambda x: nodes["G"], sizes, (OUT, inner), site, training)
        self.options = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}
        given = (*map(list, self.options.values()), groups)
        self.patches = Patches(node, aten.conv2d.default, KERNEL, CHANNELS // groups, groups, given)

    def run(self, matrix: al.Matrix) -> torch.Tensor:
        result = Convolve(self.apply)(matrix, self.patches)
        return self.lab.run(self.hand.done(result), self.tensors, self.x)

    def targets(self) -> list[object]:
        return [node.target for node in self.emit.made if node.op == "call_function"]

    def expected(self, weight: torch.Tensor) -> torch.Tensor:
        return by_hand(weight, self.x, self.groups, **self.options)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    ("matrix", "value"),
    [
        (al.Param("G"), lambda t: t["G"]),
        (PRODUCT, lambda t: t["B"] @ t["A"]),
        (SCALED, lambda t: 3 * t["B"] @ t["A"]),
        (al.Scaled("s", al.Hadamard(al.Param("G"), PRODUCT)), lambda t: 3 * t["G"] * (t["B"] @ t["A"])),
        (al.Dropped(al.Param("G"), 0.5), lambda t: t["G"]),
    ],
)
def test_every_law_by_hand(matrix, value, groups, lab):
    bench = Bench(lab, groups)
    got = bench.run(matrix)
    assert_close(got.flatten(2), bench.expected(value(bench.tensors)), rtol=1e-4, atol=1e-4)


def test_a_product_convolves_with_the_small_factors(lab):
    bench = Bench(lab)
    bench.run(SCALED)
    assert [each for each in bench.targets() if each is not aten.reshape.default] == [
        aten.conv2d.default,
        aten.mul.Tensor,
        aten.unsqueeze.default,
        aten.unsqueeze.default,
        aten.conv2d.default,
    ]


def test_a_groups_product_is_multiplied_first(lab):
    bench = Bench(lab, groups=2)
    bench.run(SCALED)
    assert bench.targets().count(aten.conv2d.default) == 1
    assert aten.matmul.default in bench.targets()


def test_dropout_meets_what_the_convolution_reads(lab):
    bench = Bench(lab, training=True)
    bench.run(al.Scaled("s", al.Product(al.Param("B"), al.Dropped(al.Param("A"), 0.25))))
    (dropped,) = (node for node in bench.emit.made if node.target is aten.dropout.default)
    assert dropped.args == (bench.patches.node, 0.25, True)
    assert not any(node.target is aten.dropout.default for node in Bench(lab).emit.made)


def test_dropout_meets_what_a_grouped_convolution_reads(lab):
    bench = Bench(lab, groups=2, training=True)
    bench.run(al.Scaled("s", al.Product(al.Param("B"), al.Dropped(al.Param("A"), 0.25))))
    (dropped,) = (node for node in bench.emit.made if node.target is aten.dropout.default)
    assert dropped.args == (bench.patches.node, 0.25, True)


def test_computes_in_the_type_of_the_adapter(lab):
    bench = Bench(lab, dtype=torch.bfloat16)
    result = Convolve(bench.apply)(PRODUCT, bench.patches)
    assert isinstance(result, fx.Node)
    assert result.meta["val"].dtype == torch.float32


def test_what_is_of_low_rank():
    assert is_low_rank(al.Dropped(SCALED, 0.1))
    assert not is_low_rank(al.Hadamard(al.Param("G"), PRODUCT))
    assert not is_low_rank(al.Param("G"))

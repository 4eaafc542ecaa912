"""What graphs inside of operators use, and blocks that are taken apart, by what the exporter makes of them."""

import pytest
import torch
from torch import nn

from peftc.passes.ir.bodies import inline_gradient_blocks, tell_inner_uses, used_by

X = torch.linspace(-1, 1, 8).reshape(2, 4)


class Net(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.way, self.linear, self.other = way, nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.way(self, x)


def autocast(net, x):
    with torch.autocast("cpu", enabled=False):
        return net.linear(net.other(x))


def borrowed(net, x):
    """Another module's weight, used by the net itself."""
    with torch.autocast("cpu", enabled=False):
        return torch.nn.functional.linear(x, net.linear.weight)


def branch(net, x):
    return torch.cond(x.sum() > 0, net.linear, torch.tanh, (x,))


def nested(net, x):
    torch.set_grad_enabled(True)
    with torch.autocast("cpu", enabled=False):
        return net.linear(x)


def exported(way):
    torch.manual_seed(0)
    net = Net(way)
    with torch.no_grad():
        return net, torch.export.export(net, (X,), strict=False).module()


def users(graph, weight):
    (read,) = [node for node in graph.nodes if node.op == "get_attr" and node.target == weight]
    return [(user, used_by(user, read)) for user in read.users]


@pytest.mark.parametrize(
    ("way", "paths"),
    [(autocast, ("", "linear")), (borrowed, ("",)), (branch, ("", "linear")), (nested, ("", "linear"))],
)
def test_who_uses_a_weight_inside_of_an_operator(way, paths):
    _, module = exported(way)
    tell_inner_uses(module.graph, module)
    ((_, found),) = users(module.graph, "linear.weight")
    assert found == paths


def test_operands_have_users_of_their_own():
    _, module = exported(autocast)
    tell_inner_uses(module.graph, module)
    ((user, found),) = users(module.graph, "other.weight")
    assert found == ("", "other")
    assert used_by(user, user.args[4]) == ("",)  # the body itself


def test_blocks_of_gradients_are_taken_apart_with_what_is_in_them():
    net, module = exported(nested)
    assert module.graph.find_nodes(op="call_function", target=torch.ops.higher_order.wrap_with_set_grad_enabled)
    inline_gradient_blocks(module.graph, module)
    assert not module.graph.find_nodes(op="call_function", target=torch.ops.higher_order.wrap_with_set_grad_enabled)
    module.recompile()
    assert torch.equal(module(X), net(X))
    tell_inner_uses(module.graph, module)
    ((_, found),) = users(module.graph, "linear.weight")
    assert found == ("", "linear")

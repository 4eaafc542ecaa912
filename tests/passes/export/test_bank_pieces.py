import torch

from peftc.passes.export.bank_pieces import digest_of, owners, pieces_of
from tests.passes.export.lifted import X, lifted

aten = torch.ops.aten
SLOTS = {"v": "site.A", "b": "site.B"}


def thin(call, inputs, held):
    """x v^T (s b)^T, and beside it another product that nothing is added to"""
    made = call(aten.linear.default, (inputs[0], held["v"]))
    return call(aten.linear.default, (made, call(aten.mul.Tensor, (held["b"], held["s"]))))


def named(compute, **tensors):
    return [each.name for each in pieces_of(lifted(compute, tensors, X), SLOTS)]


def held(rank=2, scale="s"):
    return {"v": torch.randn(rank, 4), "b": torch.randn(6, rank), scale: torch.tensor(2.0)}


def test_names_are_those_of_what_is_computed():
    """Of other values and ranks they are the same."""
    first, second = named(thin, **held()), named(thin, **held(rank=5))
    assert first == second
    assert first[0] == "site.A"
    assert first[1].startswith("mul_")


def test_another_computation_has_another_name():
    def more(call, inputs, held):
        made = call(aten.linear.default, (inputs[0], held["v"]))
        return call(
            aten.linear.default, (made, call(aten.mul.Tensor, (held["b"], call(aten.neg.default, (held["s"],)))))
        )

    assert named(thin, **held())[1] != named(more, **held())[1]


def test_a_constant_of_the_trace_is_known_by_its_value():
    """Its name is a number, which may be another's in a later trace."""

    def scaled(call, inputs, held):
        return call(aten.linear.default, (inputs[0], call(aten.mul.Tensor, (held["v"], held["s"]))))

    def of(number, value):
        made = lifted(scaled, {"v": torch.ones(2, 4), "s": torch.tensor(value)}, X)
        made.names = {node: f"constant.{number}" if name == "s" else name for node, name in made.names.items()}
        return [each.name for each in pieces_of(made, SLOTS)]

    assert of(0, 2.0) == of(7, 2.0) != of(0, 3.0)


def test_what_a_piece_is_made_of():
    first, second = pieces_of(lifted(thin, held(), X), SLOTS)
    assert (first.reads, second.reads) == ({"v"}, {"b"})
    assert owners(["slots.p0__q.A", "slots.p0__q.B"]) == {"slots.p0__q"}


def test_digests_tell_type_size_and_value():
    one = torch.ones(2, 3)
    others = (torch.ones(3, 2), torch.ones(2, 3, dtype=torch.float64), torch.full((2, 3), 2.0))
    assert digest_of(one) == digest_of(torch.ones(3, 2).T.contiguous())
    assert digest_of(one) == digest_of(torch.ones(4, 3)[:2])
    assert digest_of(one) not in map(digest_of, others)

import torch

from peftc import compiler
from peftc.runtime.adapters.room import empty, largest, largest_rank, padded, with_rank


def parameters(spec):
    return compiler.apply(torch.nn.Sequential(torch.nn.Linear(8, 4)), spec)._adapter_state.adapter("a")


def test_what_is_padded_multiplies_as_before():
    torch.manual_seed(0)
    a, b = torch.randn(2, 8), torch.randn(4, 2)
    wide = padded(b, [4, 5]) @ padded(a, [5, 8])
    torch.testing.assert_close(wide, b @ a)
    assert padded(a, [2, 8]) is a


def test_tokens_that_there_are_not():
    ids = torch.tensor([3, 7])
    assert padded(ids, [4]).tolist() == [3, 7, empty(torch.int64), empty(torch.int64)]
    assert padded(torch.tensor([True]), [2]).tolist() == [True, False]


def test_the_largest_along_each_axis():
    assert largest([torch.ones(2, 5), torch.ones(3, 1)]) == [3, 5]


def test_zeros_of_a_rank_for_what_has_one():
    """Where a graph fits every rank, and for nothing else; what is larger stays."""
    found = with_rank(parameters("adapter a = lora(rank = 2) { on all linear }"), 6)
    assert {path.rpartition(".")[2]: tuple(each.shape) for path, each in found.items()} == {"A": (6, 8), "B": (4, 6)}
    assert not any(each.any() for each in found.values())
    larger = with_rank(parameters("adapter a = lora(rank = 3) { on all linear }"), 2)
    assert {tuple(each.shape) for each in larger.values()} == {(3, 8), (4, 3)}
    for spec in ("ia3", "dora(rank = 2)"):
        adapter = parameters(f"adapter a = {spec} {{ on all linear }}")
        assert not with_rank(adapter, 6)
        assert largest_rank(adapter) == 0

import pytest
from torch import nn

from peftc.grammar.spec.elaborate import read_spec
from peftc.passes.plan.resolve import resolve, survey

CONVOLUTIONS = {
    "conv": nn.Conv2d(6, 8, (3, 2), groups=2),
    "line": nn.Conv1d(4, 6, 5),
    "solid": nn.Conv3d(2, 3, (1, 2, 3)),
    "plain": nn.Linear(4, 5),
}


@pytest.mark.parametrize(
    ("method", "shapes"),
    [
        (
            "lora",
            {
                "conv": [(2, 3, 3, 2), (8, 2, 1, 1)],
                "line": [(2, 4, 5), (6, 2, 1)],
                "solid": [(2, 2, 1, 2, 3), (3, 2, 1, 1, 1)],
                "plain": [(2, 4), (5, 2)],
            },
        ),
        ("loha", {"conv": [(8, 2), (2, 18)] * 2, "line": [(6, 2), (2, 20)] * 2, "plain": [(5, 2), (2, 4)] * 2}),
        (
            "loha(rank = 2, effective = true)",
            {
                "conv": [*[(2, 8), (2, 3)] * 2, *[(2, 2, 3, 2)] * 2],
                "line": [*[(2, 6), (2, 4)] * 2, *[(2, 2, 5, 1)] * 2],
                "solid": [*[(2, 3), (2, 2)] * 2, *[(2, 2, 1, 2, 3)] * 2],
                "plain": [(5, 2), (2, 4)] * 2,
            },
        ),
        ("lokr(rank = 8)", {"conv": [(2, 1), (4, 3, 3, 2)], "line": [(2, 2), (3, 2, 5)], "plain": [(1, 2), (5, 2)]}),
        ("ia3", {"conv": [(1, 8, 1, 1)], "line": [(1, 6, 1)], "plain": [(5, 1)]}),
        ("ia3(feedforward = true)", {"conv": [(1, 3, 1, 1)], "solid": [(1, 2, 1, 1, 1)], "plain": [(1, 4)]}),
    ],
)
def test_saved_shape(method, shapes):
    method = method if "(" in method or method == "ia3" else f"{method}(rank = 2)"
    spec = f"adapter a = {method} {{ on {', '.join(shapes)} }}"
    plan = resolve(read_spec(spec).adapters[0], survey(nn.ModuleDict(CONVOLUTIONS)))
    found = {at.site.name: [at.saved_shape(param) for param in at.bound.params] for at in plan.sites}
    assert found == shapes


def test_a_parameter_in_use_is_a_matrix():
    plan = resolve(read_spec("adapter a = lora(rank = 2) { on conv }").adapters[0], survey(nn.ModuleDict(CONVOLUTIONS)))
    (at,) = plan.sites
    assert [param.shape for param in at.bound.params] == [(2, 18), (8, 2)]
    assert at.parameter_count == 2 * 18 + 8 * 2

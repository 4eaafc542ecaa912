import pytest

from peftc.grammar.spec.elaborate import read_spec
from peftc.grammar.spec.spec import Spec
from peftc.grammar.spec.write import to_tree
from peftc.grammar.syntax.format import format_file

METHOD = """
# Words about it.
method mine(a: float = 2, mode: text("x", "y") = "x", on: bool = true) {
    on linear, embedding
    default q, v for l, m
    default z for k
    default q, v for n
    param A[out, in] = normal(0, 1) saved "A" with kernel on embedding = zeros saved "E"
    let s = a if on else -a
    W' = W + s * A if mode == "x" else W - A
    peft MINE { alpha = a, mode = mode, fixed = 1 }
}
"""
LISTED = """
method listed(ids: ints = [1, -2], more: ints = none) {
    on prompt
    let n = len(ids)
    const I[n] = listed(ids) recomputed
    param P[n, out] = zeros saved "P"
    prompt' = P
    labels' = I if more == none else -I
}
"""


def written(spec: Spec) -> str:
    return format_file(to_tree(spec))


@pytest.mark.parametrize(
    "text",
    [
        "adapter a = lora",
        "adapter a = lora(rank = 4, alpha = 0.5) { on q_proj with alpha = 1e-7 }",
        'adapter a = lora adapter "b c" = lora(rslora = true) activate -a + 2.5 * "b c"',
        "adapter a = lora activate 0.5 * a",
        "adapter a = lora adapter b = lora",
        'base { architecture = "X" n = -3 } adapter a = lora { bias all tokens ["x", 3] }',
        "base { quantize = nf4(double_quant = true) } adapter a = lora",
        'base { regions = "modules" n = 3 quantize = int8 } adapter a = lora',
        "adapter a = trainable_tokens { tokens [3, 4] in embed_tokens, lm_head  tokens [5] in h.wte }",
        "adapter a = cpt(ids = [20, 3], types = [1, 4]) adapter b = cpt adapter c = cpt(ids = [5])",
        LISTED + "adapter a = listed(ids = [], more = [7])",
        METHOD + 'adapter a = mine(a = -3, mode = "y") { on q refine layers[0] where linear with on = false }',
        'adapter a = lora { skip layers[0..2] where in_features > 3 skip "a\\.b" train x, {y, "z w"} on all linear }',
    ],
)
def test_a_spec_written_and_read_is_the_same(text):
    spec = read_spec(text)
    assert read_spec(written(spec)) == spec
    assert written(read_spec(written(spec))) == written(spec)


def test_defaults_are_left_out():
    assert written(read_spec("adapter a = lora(rank = 8, alpha = 16.0, dropout = 0) { bias none }")) == (
        "adapter a = lora(alpha = 16)\n"
    )

import pytest

from peftc.grammar.spec.elaborate import read_spec
from peftc.grammar.spec.quantize import text
from peftc.grammar.spec.spec import Base, Quantize, Spec
from peftc.grammar.spec.write import to_tree
from peftc.grammar.syntax.format import format_file

WRITTEN = [
    ("nf4", Quantize("nf4"), "nf4()"),
    ("fp4()", Quantize("fp4"), "fp4()"),
    (
        "nf4(compute = bfloat16, double_quant = true)",
        Quantize("nf4", double_quant=True, compute="bfloat16"),
        "nf4(double_quant = true, compute = bfloat16)",
    ),
    ("nf4(compute = none, double_quant = false, skip = none)", Quantize("nf4"), "nf4()"),
    ("int8(threshold = 6)", Quantize("int8"), "int8()"),
    ("int8(threshold = 0)", Quantize("int8", threshold=0.0), "int8(threshold = 0)"),
    ("int8(threshold = 1e16)", Quantize("int8", threshold=1e16), "int8(threshold = 1e+16)"),
    (
        'int8(threshold = 5.5, skip = ["lm_head", "h.0"])',
        Quantize("int8", threshold=5.5, skip=("lm_head", "h.0")),
        'int8(threshold = 5.5, skip = ["lm_head", "h.0"])',
    ),
    ("nf4(skip = [])", Quantize("nf4", skip=()), "nf4(skip = [])"),
]


@pytest.mark.parametrize(("written", "meant", "canonical"), WRITTEN)
def test_read_and_written(written, meant, canonical):
    spec = read_spec(f'base {{ quantize = {written} architecture = "X" }} adapter a = lora')
    assert spec.quantize == meant
    assert spec.quantize is not None
    assert spec.quantize.span is not None
    assert spec.quantize.span.text == f"quantize = {written}"
    assert spec.base is not None
    assert [each.name for each in spec.base.entries] == ["architecture"]
    assert text(meant) == canonical
    assert f"quantize     = {canonical}\n" in format_file(to_tree(spec))
    assert read_spec(format_file(to_tree(spec))) == spec


def test_a_spec_that_a_program_made_is_written():
    adapters = read_spec("adapter a = lora").adapters
    made = Spec(adapters, base=Base(quantize=Quantize("fp4", skip=("head",))))
    assert format_file(to_tree(made)).startswith('base {\n    quantize = fp4(skip = ["head"])\n}\n')
    assert Spec(adapters).quantize is None

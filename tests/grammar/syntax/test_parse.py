import contextlib
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftc.grammar.diagnostics import SpecError
from peftc.grammar.source import Source
from peftc.grammar.spec.elaborate import read_spec
from peftc.grammar.syntax import tree
from peftc.grammar.syntax.load import load_source
from peftc.grammar.syntax.parse import parse

SPEC = """\
use "./mine.adapter"
base { architecture = "LlamaForCausalLM"  quantize = nf4(double_quant = true) }
adapter support = lora(rank = 16, alpha = 1e-4) {
    on layers[*].self_attn.{q_proj, v_proj}, 0.1, "a\\.b", all linear
    on layers[-4.., 2, ..3].up where in_features >= 64 and not embedding with rank = 64
    refine **.x with rank = 2
    skip layers[0]
    train lm_head
    bias adapter
    tokens ["<tool>", 7]
}
activate support - 0.5 * "my-style"
"""

METHOD = """\
# About it,
#   at length.
method m(rank: int = 8, mode: text("a", "b") = "a") {
    on linear, embedding
    default q, a.b for llama, "x-y"
    param A[rank, in] = kaiming_uniform(a = sqrt(5)) saved "a.w"
        on embedding = zeros saved "e"
    let s = 2 / rank if mode == "a" else -1 ** 2
    W' = W + s * (A.T @ A)
    peft M { r = rank }
}
"""


def read(text: str) -> tree.File:
    return parse(Source("x", text))


def told(text: str) -> None:
    """Reading it may fail, with a message and nothing else."""
    try:
        read_spec(f"{text}\n")
    except SpecError as error:
        message = str(error)
    else:
        message = "fine"
    assert message


def failure(text: str) -> SpecError:
    with pytest.raises(SpecError) as caught:
        read(text)
    return caught.value


def test_a_spec_has_the_tree_it_looks_like():
    use, base, adapter, activate = read(SPEC).statements
    assert use == tree.Use("./mine.adapter")
    assert isinstance(base, tree.Base)
    assert [each.name for each in base.entries] == ["architecture", "quantize"]
    assert isinstance(adapter, tree.Adapter)
    assert adapter.method.arguments[1] == tree.Argument("alpha", tree.Number(1e-4))
    first, second, refine, skip, train, bias, tokens = adapter.clauses
    assert isinstance(first, tree.OnClause)
    path = tree.PathSelector(
        (tree.Segment(("layers",), indices=()), tree.Segment(("self_attn",)), tree.Segment(("q_proj", "v_proj")))
    )
    digits = tree.PathSelector((tree.Segment(("0",)), tree.Segment(("1",))))
    assert first.selectors == (path, digits, tree.PatternSelector("a\\.b"), tree.AllSelector("linear"))
    assert isinstance(second, tree.OnClause)
    assert second.selectors[0].segments[0].indices == (
        tree.Index(-4, None, True),
        tree.Index(2),
        tree.Index(None, 3, True),
    )
    assert second.overrides == (tree.Argument("rank", tree.Number(64)),)
    assert isinstance(refine, tree.RefineClause)
    assert refine.selectors[0].segments[0].deep
    assert isinstance(skip, tree.SkipClause)
    assert isinstance(train, tree.TrainClause)
    assert bias == tree.BiasClause("adapter")
    assert tokens == tree.TokensClause((tree.Text("<tool>"), tree.Number(7)))
    assert activate == tree.Activate((tree.ActivateTerm(1.0, "support"), tree.ActivateTerm(-0.5, "my-style")))


def test_a_method_has_its_doc_variants_and_precedence():
    (method,) = read(METHOD).statements
    assert isinstance(method, tree.Method)
    assert method.doc == "About it,\n  at length."
    assert method.hyperparameters[1].choices == ("a", "b")
    _, default, param, let, prime, peft = method.items
    assert default == tree.DefaultItem(("q", "a.b"), ("llama", "x-y"))
    assert isinstance(param, tree.ParamItem)
    assert param.variants == (tree.Variant("embedding", tree.Name("zeros"), "e"),)
    assert isinstance(let, tree.LetItem)
    assert isinstance(let.value, tree.Conditional)
    assert let.value.otherwise == tree.Unary("-", tree.Binary("**", tree.Number(1), tree.Number(2)))
    assert isinstance(prime, tree.PrimeItem)
    assert isinstance(peft, tree.PeftItem)


def test_a_detached_comment_is_no_doc():
    (method,) = read("# about the file\n\nmethod m() { on linear }").statements
    assert isinstance(method, tree.Method)
    assert method.doc == ""


def test_every_node_carries_the_span_it_was_written_at():
    (_, _, adapter, _) = read(SPEC).statements
    assert isinstance(adapter, tree.Adapter)
    assert adapter.method.span is not None
    assert adapter.method.span.text == "lora(rank = 16, alpha = 1e-4)"
    clause = adapter.clauses[0]
    assert isinstance(clause, tree.OnClause)
    assert clause.selectors[0].span is not None
    assert clause.selectors[0].span.text == "layers[*].self_attn.{q_proj, v_proj}"
    assert clause.span is not None
    assert clause.span.line == 4


@pytest.mark.parametrize("text", ["\ufeff" + SPEC, SPEC.replace("\n", "\r\n"), SPEC.replace("    ", "\t")])
def test_marks_line_ends_and_tabs_make_no_difference(text):
    assert read(text) == read(SPEC)


def test_keywords_are_names_where_a_name_stands():
    (adapter,) = read("adapter on = lora { on base.all.{all, train}.use skip default }").statements
    assert isinstance(adapter, tree.Adapter)
    assert adapter.name == "on"
    assert len(adapter.clauses) == 2


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("(" * 100_000, "E110"),
        ("adapter a = m(x = " + "(" * 100_000, "E104"),
        ("adapter a = m(x = " + "-" * 50_000 + "1)", "E104"),
        ("adapter a = m(x = " + "1+" * 40_000 + "1)", "E104"),
        ("adapter a = m(x = " + "1+" * 400_000 + "1)", "E103"),
        ("adapter a = m { on " + "a.b," * 11_000 + "a }", "E103"),
        ("adapter a = m { on " + "a." * 40_000 + "a }", "E104"),
        ("#" * (1 << 20) + "#", "E103"),
        ("adapter a = m(x = " + "9" * 4000 + ")", "E114"),
        ("adapter " + "a" * 100_000 + " = m", "E103"),
    ],
)
def test_size_and_depth_are_limited_quickly(text, code):
    start = time.perf_counter()
    assert failure(text).diagnostics[0].code == code
    assert time.perf_counter() - start < 20


def test_a_megabyte_of_comments_is_fine():
    assert read("# x\n" * 250_000 + "use 'x'"[:0]).statements == ()


def test_load_source_reads_marks_and_line_ends(tmp_path):
    file = tmp_path / "a.adapter"
    file.write_bytes(b'\xef\xbb\xbfuse "x"\r\n')
    assert load_source(file).text == 'use "x"\n'


@pytest.mark.parametrize(("content", "code"), [(None, "E101"), (b"ab\xff", "E102"), (b"#" * ((1 << 20) + 1), "E103")])
def test_load_source_refuses(tmp_path, content, code):
    file = tmp_path / "a.adapter"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(SpecError) as caught:
        load_source(file)
    assert caught.value.diagnostics[0].code == code
    assert str(file) in str(caught.value)


def test_a_directory_is_no_file(tmp_path):
    with pytest.raises(SpecError, match="directory"):
        load_source(tmp_path)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_in_a_file_give_a_spec_or_a_diagnostic(content):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "a.adapter"
        file.write_bytes(content)
        with contextlib.suppress(SpecError):
            read_spec(file)


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=200))
def test_any_text_gives_a_tree_or_a_diagnostic(text):
    told(text)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_mutated_spec_gives_a_tree_or_a_diagnostic(data):
    text = data.draw(st.sampled_from([SPEC, METHOD, METHOD + "adapter a = m(rank = 3) { on q with rank = 4 }"]))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        end = data.draw(st.integers(start, min(len(text), start + 12)))
        text = text[:start] + data.draw(st.text(alphabet="{}[]()\"'.,*=:-+#\\ \nab01\0é", max_size=6)) + text[end:]
    told(text)

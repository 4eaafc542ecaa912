import pytest

from peftc.grammar.diagnostics import SpecError
from peftc.grammar.method.check import check_method
from peftc.grammar.method.rule import MethodRule
from peftc.grammar.source import Source
from peftc.grammar.spec.library import builtin_methods
from peftc.grammar.syntax import tree
from peftc.grammar.syntax.parse import parse


def check(text: str) -> MethodRule:
    (method,) = parse(Source("x", text)).statements
    assert isinstance(method, tree.Method)
    return check_method(method)


def body(text: str, head: str = "rank: int = 8, alpha: float = 1") -> str:
    params = 'param A[rank, in] = zeros saved "A" param B[out, rank] = zeros saved "B"'
    return f"method m({head}) {{ on linear {params} {text} peft M {{ r = rank, a = alpha }} }}"


def test_the_built_in_lora():
    lora = builtin_methods()["lora"]
    assert {"linear", "conv1d", "embedding", "parameter"} <= set(lora.kinds)
    assert [each.role for each in lora.params] == ["A", "B", "c"]
    assert lora.params[0].saved_for("embedding") == "lora_embedding_A"
    assert lora.params[0].saved_for("conv1d") == "lora_A.weight"
    assert lora.default_targets("gpt2") == ((("c_attn",), ()),)
    assert lora.default_targets("unheard_of") == ()
    assert lora.peft_type == "LORA"
    assert "2106.09685" in lora.doc


def test_default_targets_are_those_of_peft():
    constants = pytest.importorskip("peft.utils.constants")
    mapping = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    theirs = {name: set(targets) for name, targets in mapping.items() if not isinstance(targets, str)}
    ours = {name: [set(targets) for targets, _ in given] for name, given in builtin_methods()["lora"].defaults}
    assert ours == {name: [targets] for name, targets in theirs.items()}


def test_a_rule_does_not_depend_on_where_it_was_written():
    text = body("W' = W + B @ A")
    assert check(text) == check("\n\n" + text)
    assert hash(check(text)) == hash(check("\n" + text))


@pytest.mark.parametrize(
    "text",
    [
        "W' = W + alpha * (B @ A)",
        "W' = W - B @ A / alpha",
        "W' = W * (B @ A) + -W",
        "W' = W + (A.T @ B.T).T",
        "W' = W + B @ drop(A, 0.5)",
        "let D = B @ A let s = alpha / sqrt(max(rank, 2)) W' = W + s * D",
        "W' = W + (B @ A if rank > 2 and alpha != 1 else W * (B @ A))",
        "W' = W + alpha + B @ A",
        "W' = alpha / (B @ A)",
        "W' = W / (B @ A)",
        "W' = sqrt(W) + (B @ A) / sqrt(alpha)",
    ],
)
def test_well_typed_bodies(text):
    assert check(body(text)).weight


def test_sizes_are_compared_as_polynomials():
    params = 'param A[2 * rank, in] = zeros saved "A" param B[out, rank + rank] = zeros saved "B"'
    assert check(f"method m(rank: int = 1) {{ on linear {params} W' = W + B @ A }}")
    lets = 'let k = rank * rank param A[k, in] = zeros saved "A" param B[out, rank * rank] = zeros saved "B"'
    assert check(f"method m(rank: int = 1) {{ on linear {lets} W' = W + B @ A }}")


@pytest.mark.parametrize(
    ("text", "code", "span"),
    [
        ("W' = W + A @ B", "E133", "A @ B"),
        ("W' = W + A", "E133", "W + A"),
        ("W' = B @ A.T", "E133", "B @ A.T"),
        ("W' = A", "E133", "A"),
        ("W' = rank", "E133", "rank"),
        ("W' = W % alpha", "E132", "W % alpha"),
        ("W' = alpha ** W", "E132", "alpha ** W"),
        ("W' = W // W", "E132", "W // W"),
        ("W' = W @ alpha", "E132", "W @ alpha"),
        ("W' = W + alhpa * (B @ A)", "E130", "alhpa"),
        ("W' = W + sqr(2) * (B @ A)", "E138", "sqr(2)"),
        ("W' = W + max(W, 2) * (B @ A)", "E132", "W"),
        ("W' = W + sqrt(1, 2) * (B @ A)", "E138", "sqrt(1, 2)"),
        ("W' = W + drop(alpha, 0.5) * (B @ A)", "E132", "alpha"),
        ("W' = W + gather(B @ A, task(0))", "E133", "task(0)"),
        ('let t = task(3) const C[1] = t saved "C" W\' = W + C * (B @ A)', "E138", "task(3)"),
        ("W' = W + (B @ A if alpha else W)", "E132", "alpha"),
        ("W' = W + (B @ A if rank > 1 else A)", "E133", "B @ A if rank > 1 else A"),
        ("W' = W + B @ drop(A, W)", "E132", "W"),
        ("W' = W", "E134", 'param A[rank, in] = zeros saved "A"'),
        ("let s = 2 W' = W + B @ A", "E134", "let s = 2"),
        ("let A = 2 W' = W + B @ A", "E131", "let A = 2"),
        ("let sqrt = 2 W' = W + B @ A", "E154", "let sqrt = 2"),
        ("W' = W + B @ A W' = W", "E131", "W' = W"),
        ("let s = 1", "E135", "m"),
        ("W' = W + B @ A + alpha.T", "E132", "alpha.T"),
        ("W' = W + not W", "E110", "W"),
        ('W\' = W + "x" * W', "E132", '"x"'),
        ("W' = W + none * W", "E132", "none"),
        ("W' = W + [1] * W", "E132", "[1]"),
    ],
)
def test_ill_typed_bodies(text, code, span):
    with pytest.raises(SpecError) as caught:
        check(body(text))
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.code == code
    assert diagnostic.span is not None
    assert diagnostic.span.text == span


def test_what_stands_in_front_asks_for_no_task():
    text = 'param P[tasks, out] = zeros saved "P" let p = gather(P, task(tasks)) prompt\' = p'
    with pytest.raises(SpecError, match="E138") as caught:
        check(f"method m(tasks: int = 2) {{ on prompt {text} }}")
    assert caught.value.diagnostics[0].span.text == "task(tasks)"


OPTIONAL = "rank: int = 8, alpha: float = none"


@pytest.mark.parametrize(
    "scale",
    ["1 if alpha == none else alpha / rank", "alpha / rank if alpha != none else 1", "2 if alpha == none else 1"],
)
def test_what_may_be_none_is_a_number_where_it_is_not(scale):
    assert check(body(f"let s = {scale} W' = W + s * (B @ A)", OPTIONAL)).weight


@pytest.mark.parametrize(
    ("scale", "span"),
    [
        ("alpha * 2", "alpha"),
        ("2 * alpha if alpha == none else 1", "alpha"),
        ("1 if rank == none else rank", "rank == none"),
        ("1 if W == none else rank", "W == none"),
        ("1 if none == alpha else alpha", "none"),
    ],
)
def test_what_may_be_none_is_no_number_elsewhere(scale, span):
    with pytest.raises(SpecError) as caught:
        check(body(f"let s = {scale} W' = W + 2 * s * (B @ A)", OPTIONAL))
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.code == "E132"
    assert diagnostic.span.text == span


@pytest.mark.parametrize("step", ["D{0} + D{0}", "2 * D{0}"])
def test_lets_do_not_grow_without_bound(step):
    lets = " ".join(f"let D{each + 1} = {step.format(each)}" for each in range(200))
    with pytest.raises(SpecError, match="E104"):
        check(body(f"let D0 = B @ A {lets} W' = W + D200"))


@pytest.mark.parametrize(
    ("param", "code"),
    [
        ('param A[out, in] = zero saved "A"', "E136"),
        ('param A[out, in] = normal(men = 0) saved "A"', "E136"),
        ('param A[out, in] = normal(0, 1, 2) saved "A"', "E136"),
        ('param A[out, in] = normal(0, mean = 1) saved "A"', "E136"),
        ('param A[out, in] = constant saved "A"', "E136"),
        ('param A[out, in] = normal(std = true) saved "A"', "E132"),
        ('param A[out, in] = 3 saved "A"', "E136"),
        ('param A[out, in] = zeros saved "../A"', "E137"),
        ('param A[out, in] = zeros saved ""', "E137"),
        ('param A[out, in] = zeros saved "a..b"', "E137"),
        ('param A[out, in] = zeros saved "a b"', "E137"),
        ('param A[out] = zeros saved "A"', "E133"),
        ('param A[out, 2.5] = zeros saved "A"', "E132"),
        ('param A[out, W] = zeros saved "A"', "E132"),
        ('param A[out, in] = zeros saved "A" on conv1d = zeros saved "B"', "E139"),
        ('param A[out, in] = zeros saved "A" on linear = zeros saved "B" on linear = zeros saved "C"', "E131"),
        ('param A[out, in] = zeros saved "A" param B[out, in] = zeros saved "A"', "E137"),
    ],
)
def test_bad_parameters(param, code):
    rest = "W' = W + A + B" if "param B" in param else "W' = W + A"
    with pytest.raises(SpecError) as caught:
        check(f"method m() {{ on linear {param} {rest} }}")
    assert caught.value.diagnostics[0].code == code
    assert caught.value.diagnostics[0].span is not None


@pytest.mark.parametrize(
    ("head", "code"),
    [
        ("x: int = 1.5", "E132"),
        ('x: int = "a"', "E132"),
        ("x: bool = 1", "E132"),
        ("x: strin = 1", "E155"),
        ('x: text("a", "b") = "c"', "E151"),
        ('x: int("a") = 1', "E132"),
        ("x: int = 1, x: int = 2", "E131"),
        ("in: int = 1", "E154"),
        ("x: int = y", "E130"),
        ("x: int = 1", "E134"),
    ],
)
def test_bad_hyperparameters(head, code):
    with pytest.raises(SpecError) as caught:
        check(f'method m({head}) {{ on linear param A[out, in] = zeros saved "A" W\' = W + A }}')
    assert caught.value.diagnostics[0].code == code

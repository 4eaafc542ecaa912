"""What bad input is told: each rendered text is a golden file to be read."""

import pytest

from peftc.grammar.diagnostics import SpecError
from peftc.grammar.method.bind import Place, bind
from peftc.grammar.spec.elaborate import read_spec
from peftc.grammar.spec.no_match import misses
from peftc.grammar.spec.select import Candidate, Universe


def method(body: str) -> str:
    return f"method m(rank: int = 8, alpha: float = 8) {{\n    on linear\n{body}\n}}\nadapter a = m"


PARAMS = '    param A[rank, in] = zeros saved "A"\n    param B[out, rank] = zeros saved "B"\n'


def prompted(body: str) -> str:
    head = "method m(ids: ints = [3]) {\n    on prompt\n    let length = len(ids)\n"
    head += '    const I[length] = listed(ids) recomputed\n    param P[length, out] = zeros saved "P"\n'
    return f"{head}    prompt' = P\n{body}\n}}\nadapter a = m"


def place(prompt: str, kinds: str = "prompt") -> str:
    head = "method m(length: int = 4, alpha: float = 8)"
    return f'{head} {{\n    on      {kinds}\n    param   P[length, out] = normal saved "P"\n    prompt\' = {prompt}\n}}'


LINEAR = Place("linear", 6, 9, name="model.q")
BARE = Place("linear", 6, 9, has_bias=False, name="model.q")
SMALL = Place("linear", 6, 4, name="model.q")

BAD = {
    "empty": "",
    "only_a_comment": "# nothing yet\n",
    "colon_for_equals": "adapter a : lora(rank = 8)",
    "colon_in_arguments": "adapter a = lora(rank: 8)",
    "missing_brace": "adapter a = lora {\n    on q_proj\n",
    "missing_brace_before_statement": "adapter a = lora {\n    on q_proj\n\nactivate a\n",
    "missing_parenthesis": "adapter a = lora(rank = 8\n",
    "extra_brace": "adapter a = lora { on q_proj }\n}",
    "statement_typo": "adaptor a = lora",
    "clause_typo": "adapter a = lora {\n    onn q_proj\n}",
    "clause_typo_after_clause": "adapter a = lora {\n    on q_proj\n    skpi layers[0]\n}",
    "method_instead_of_name": "adapter lora(rank = 8)",
    "single_quotes": "use './mine.adapter'",
    "open_string": 'use "./mine.adapter\nadapter a = lora',
    "bad_escape": 'use "a\\qb"',
    "semicolon": "adapter a = lora;",
    "nul": "adapter a = lora\0",
    "tabs_align": "adapter a = lora {\n\ton\tq_proj\twith\trank := 3\n}",
    "slashes_for_comment": "// a comment\nadapter a = lora",
    "single_equals_in_where": "adapter a = lora { on q_proj where in_features = 4 }",
    "long_line": f"adapter a = lora {{ on {', '.join(f'p{each}' for each in range(80))} wiht rank = 3 }}",
    "deep": f"adapter a = lora(rank = {'(' * 200}",
    "huge_number": "adapter a = lora(alpha = 1e999)",
    "bad_pattern": 'adapter a = lora { on "(q|v" }',
    "bad_index": "adapter a = lora { on layers[1:3].q }",
    "doubled_alternative": "adapter a = lora { on {q, v, q} }",
    "unknown_method": "adapter a = loar(rank = 8)",
    "unknown_argument": "adapter a = lora(rnak = 8)",
    "unknown_override": "adapter a = lora {\n    on q_proj with alhpa = 3\n}",
    "positional_argument": "adapter a = lora(8)",
    "wrong_type": 'adapter a = lora(rank = "big")',
    "not_whole": "adapter a = lora(rank = 2.5)",
    "argument_twice": "adapter a = lora(rank = 8, rank = 9)",
    "name_for_value": "adapter a = lora(rslora = True)",
    "duplicate_adapter": "adapter a = lora\nadapter a = lora",
    "unsafe_name": 'adapter "../up" = lora',
    "unknown_active": "adapter support = lora\nactivate suport",
    "active_twice": "adapter a = lora\nactivate a + 0.5 * a",
    "two_activates": "adapter a = lora\nactivate a\nactivate a",
    "two_bases": 'base { model_type = "x" }\nbase { model_type = "y" }\nadapter a = lora',
    "unknown_kind": "adapter a = lora { on all liner }",
    "unknown_bias": "adapter a = lora { bias al }",
    "bias_twice": "adapter a = lora { bias all bias all }",
    "token_twice": 'adapter a = lora { tokens ["x", "x"] }',
    "where_unknown": "adapter a = lora { on q where in_feature > 3 }",
    "where_not_boolean": "adapter a = lora { on q where in_features }",
    "use_in_text": 'use "./mine.adapter"\nadapter a = lora',
    "redefined_built_in": 'method lora() { on linear param A[out, in] = zeros saved "A" W\' = A }',
    "method_swapped_product": method(f"{PARAMS}    W' = W + (alpha / rank) * (A @ B)"),
    "method_wrong_shape": method(f"{PARAMS}    W' = B"),
    "method_without_prime": method(PARAMS),
    "method_unknown_name": method(f"{PARAMS}    W' = W + alhpa * (B @ A)"),
    "method_operator": method(f"{PARAMS}    W' = W % alpha"),
    "method_unused_param": method(f"{PARAMS}    W' = W * alpha"),
    "method_initialiser": method('    param A[out, in] = kaiming saved "A"\n    W\' = W + A'),
    "method_no_key": method("    param A[out, in] = zeros\n    W' = W + A"),
    "method_bad_key": method('    param A[out, in] = zeros saved "../A"\n    W\' = W + A'),
    "method_same_key": method(PARAMS.replace('"B"', '"A"') + "    W' = W + alpha * (B @ A)"),
    "method_unknown_kind": "method m() {\n    on liner\n    W' = W\n}",
    "method_untyped": "method m(rank = 8) {\n    on linear\n    W' = W\n}",
    "method_unknown_function": method(f"{PARAMS}    W' = W + expo(alpha) * (B @ A)"),
    "method_number_start": method('    param A[out, in] = rank saved "A"\n    W\' = W + alpha * A'),
    "method_wrong_start": method('    param A[rank, in] = W saved "A"\n    W\' = W + alpha * sum(A, 0)'),
    "method_condition_shapes": method(f"{PARAMS}    W' = W + alpha * (B @ A if rank > 2 else A)"),
    "method_broadcast": method(f"{PARAMS}    W' = W + alpha * B * A"),
    "method_function_shape": method(f"{PARAMS}    W' = W + alpha * block_diag(B @ A)"),
    "method_function_option": method(f"{PARAMS}    W' = W + alpha * norm(B @ A, rank)"),
    "method_function_of_a_number": method(f"{PARAMS}    W' = W + relu(alpha) * (B @ A)"),
    "method_many_sizes": method('    param A[1, 1, 1, out, in] = zeros saved "A"\n    W\' = W + alpha * A'),
    "method_bias_shape": method(f"{PARAMS}    W' = W + alpha * (B @ A)\n    b' = b @ A"),
    "method_const_without_source": method("    const A[rank, in] = normal\n    W' = W + alpha * sum(A, 0)"),
    "method_kept_once": method("    const A[in, in] = covariance once\n    W' = W + alpha * (W @ A)"),
    "method_remade_from_once": method(
        "    const A[in, in] = normal once\n    const B[in, in] = qr(A) recomputed\n    W' = W + alpha * (W @ B)"
    ),
    "method_saved_once": method('    const A[out, in] = normal saved "A" once\n    W\' = W + alpha * A'),
    "method_inputs_shape": method('    const A[out, in] = second_moment saved "A"\n    W\' = W + alpha * A'),
    "method_inputs_shared": method('    shared const A[in, in] = covariance saved "A"\n    W\' = W + alpha * (W @ A)'),
    "method_const_of_chances": method("    const A[out, in] = zeros if rank > 3 else normal\n    W' = W + alpha * A"),
    "method_unused_const": method("    const A[rank, in] = ones seeded 3\n    W' = alpha * W"),
    "method_condition_not_boolean": method('    param A[out, in] = zeros saved "A" if rank\n    W\' = W + alpha * A'),
    "method_seed_not_whole": method("    const A[out, in] = normal seeded alpha\n    W' = W + rank * A"),
    "method_require_not_boolean": method(f"    require in % rank\n{PARAMS}    W' = W + alpha * (B @ A)"),
    "method_shared_without_word": method('    sharred param A[out, in] = zeros saved "A"\n    W\' = W + A'),
    "method_default_as_unknown": method(f"    default as loar_of_old\n{PARAMS}    W' = W + alpha * (B @ A)"),
    "method_default_with": method(f"    default q for llama with rnk = 3\n{PARAMS}    W' = W + alpha * (B @ A)"),
    "method_no_kinds": "method m() {\n    W' = W\n}",
    "method_field_product": method(f"{PARAMS}    W' = W + alpha * (B @ A)\n    peft M {{ r = 2 * rank }}"),
    "method_field_modules": method(f"{PARAMS}    W' = W + alpha * (B @ A)\n    peft M {{ r = modules(rank) }}"),
    "method_labels_shape": prompted("    labels' = P"),
    "method_labels_elsewhere": method(f"{PARAMS}    W' = W + alpha * (B @ A)\n    labels' = reshape(sum(A, 0), [in])"),
    "method_labels_twice": prompted("    labels' = I\n    labels' = I"),
    "method_list_of_numbers": prompted("    const J[length] = listed(length) recomputed\n    labels' = J + I"),
    "method_list_seeded": prompted("    const J[length] = listed(ids) seeded 3\n    labels' = J + I"),
    "method_number_of_a_list": prompted("    let s = sqrt(ids)\n    labels' = I * s"),
    "method_length_of_a_number": prompted("    let s = len(length)\n    labels' = I * s"),
    "list_of_texts": 'adapter a = cpt(ids = [3, "x"])',
    "list_for_number": "adapter a = lora(rank = [8])",
    "number_for_list": "adapter a = cpt(ids = 3)",
    "method_other_prime": "method m() {\n    on linear\n    A' = W\n}",
    "place_mixed": place("P", "prompt, linear"),
    "place_unknown": place("P", "promt"),
    "place_without_prompt": "method m() {\n    on cache\n}",
    "place_with_weight": place("P\n    W'      = W"),
    "place_swapped_shape": place("P.T"),
    "place_unused_param": place("W.T"),
    "place_gate_elsewhere": place("P\n    gate'   = reshape(eye(1), [1])"),
    "place_gate_shape": place("P\n    gate'   = alpha", "attention"),
    "place_labels_shape": place("P\n    labels' = P"),
    "place_prompt_for_a_weight": method(f"{PARAMS}    W' = W + alpha * (B @ A)\n    prompt' = A"),
    "place_word_for_a_weight": method(f"{PARAMS}    W' = W + num_layers * (B @ A)"),
    "place_value_of_a_weight": method(f'{PARAMS}    let D = B @ A saved "D"\n    W\' = W + alpha * D'),
    "place_value_twice": place("E").replace(
        "    prompt'", '    let D = -P saved "D"\n    let E = -D saved "E"\n    prompt\''
    ),
    "place_value_a_number": place("s * P").replace("    prompt'", '    let s = 2 * length saved "s"\n    prompt\''),
}

MISSES = {
    "alternative": "layers[*].self_attn.{q_porj, v_proj}",
    "segment": "layrs[*].mlp.up_proj",
    "index": "layers[9].mlp.up_proj",
    "container": "self_attn",
    "elsewhere": "mlp.q_proj",
    "where": "q_proj where in_features > 8",
    "pattern": '"q_proj"',
    "kind": "all conv2d",
    "nothing_near": "zzz",
}


def kind_of(name):
    """The file that holds what a bad spec is told."""
    return {"method": "methods", "place": "places"}.get(name.partition("_")[0], "specs")


@pytest.mark.parametrize("name", BAD)
def test_bad_specs(golden, name):
    with pytest.raises(SpecError) as caught:
        read_spec(BAD[name] + "\n" if BAD[name].endswith(".adapter") else BAD[name])
    golden(f"diagnostics/{kind_of(name)}.txt", f"{caught.value}\n", name)


# A method's items, and where it is put.
AT_SITES = {
    "require": ("require in % rank == 0 and out > rank", "W' = W + alpha", LINEAR),
    "blocks": ('param C[rank, out // rank, in // rank] = zeros saved "C"', "W' = W + alpha * block_diag(C)", LINEAR),
    "empty": ('param C[rank - 8] = zeros saved "C"', "W' = W + alpha * sum(C, 0)", LINEAR),
    "condition": ('param A[out, in] = zeros saved "A" if rank > 8', "W' = W + alpha * A", LINEAR),
    "shared_key": (
        'param A[out, in] = zeros saved "A" if rank > 1 param B[out, in] = zeros saved "A" if rank < 9',
        "W' = W + alpha * A + B",
        LINEAR,
    ),
    "bias": ("", "W' = W + alpha + rank b' = relu(b)", BARE),
    "bias_start": ('param c[out] = b saved "c"', "W' = W * alpha + rank b' = c", BARE),
    "start": ("const Q[out, rank] = left_singular(W, rank) recomputed", "W' = alpha * Q @ Q.T @ W", SMALL),
    "kind": ("", "W' = alpha * W + rank", Place("embedding", 6, 9, name="model.embed")),
}


@pytest.mark.parametrize("name", AT_SITES)
def test_sites_a_method_does_not_fit(golden, name):
    items, primes, place = AT_SITES[name]
    spec = read_spec(f"{method(f'    {items}' + chr(10) + f'    {primes}')} {{\n    on model.q\n}}").adapters[0]
    with pytest.raises(SpecError) as caught:
        bind(spec.rule, spec.values, place, span=spec.on[0].span)
    golden("diagnostics/sites.txt", f"{caught.value}\n", name)


@pytest.mark.parametrize("name", MISSES)
def test_selectors_that_choose_nothing(golden, name):
    leaves = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
    layers = [f"model.layers.{each}" for each in range(4)]
    modules = ["model", *layers, *(f"{each}.{part}" for each in layers for part in ("self_attn", "mlp", *leaves))]
    universe = Universe(
        tuple(Candidate(f"{each}.{leaf}", "linear", 8, 8) for each in layers for leaf in leaves), tuple(modules)
    )
    target = read_spec(f"adapter a = lora {{\n    on {MISSES[name]}\n}}").adapters[0].on[0]
    found = misses(target.selectors[0], target.where, universe)
    golden("diagnostics/selectors.txt", "".join(f"{each.render()}\n" for each in found), name)


def test_no_text_is_left_of_a_case_that_is_gone(golden):
    for kind in {kind_of(name) for name in BAD}:
        golden.holds(f"diagnostics/{kind}.txt", [name for name in BAD if kind_of(name) == kind])
    golden.holds("diagnostics/sites.txt", AT_SITES)
    golden.holds("diagnostics/selectors.txt", MISSES)

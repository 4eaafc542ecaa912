"""Help for PEFT's words, for names in another case, and for what a layer's own code calls things."""

import peft
import pytest

from peftc.compiler import check
from peftc.grammar.spec.library import builtin_methods
from peftc.grammar.spec.peft_help import for_field, for_method


def help_of(text: str) -> str:
    spec, problems = check(f"{text}\n")
    assert spec is None
    return problems[0].help


@pytest.mark.parametrize(
    ("written", "help"),
    [
        ("lora(r = 4)", "PEFT's 'r' is 'rank' here"),
        ("lora(lora_alpha = 4)", "'alpha'"),
        ("lora(lora_dropout = 0.1)", "'dropout'"),
        ("lora(use_rslora = true)", "'rslora'"),
        ("lora(use_dora = true)", "a method of its own here: dora"),
        ("lora(init_lora_weights = true)", "'init' here; the methods eva, loftq, lora_orthogonal, olora, pissa"),
        ("lora(rank_pattern = 4)", "on v_proj with rank = ..."),
        ("lora(alpha_pattern = 4)", "on v_proj with alpha = ..."),
        ("lora(target_modules = 4)", "{ on q_proj, v_proj }"),
        ("lora(target_parameters = 4)", "{ on "),
        ("lora(modules_to_save = 4)", "{ train lm_head }"),
        ("lora(exclude_modules = 4)", "{ skip lm_head }"),
        ("lora(layers_to_transform = 4)", "on layers[0..8]"),
        ("lora(trainable_token_indices = 4)", "{ tokens [5, 6] }"),
        ('lora(bias = "all")', "{ bias all }"),
        ('lora(task_type = "CAUSAL_LM")', "--task"),
        ("lora(inference_mode = true)", "leave PEFT's 'inference_mode' out"),
        ("lora(qalora_group_size = 1)", "leave PEFT's 'qalora_group_size' out"),
        ("prefix(num_virtual_tokens = 4)", "'length'"),
        ("oft(oft_block_size = 4)", "'block'"),
        ("lora(rnk = 4)", "did you mean 'rank'?"),
        ("LoRA(rank = 4)", "did you mean 'lora'?"),
        ("DoRA", "did you mean 'dora'?"),
        ("IA3", "did you mean 'ia3'?"),
        ("PREFIX_TUNING", "did you mean 'prefix'?"),
        ("PrefixTuningConfig", "did you mean 'prefix'?"),
        ("prompt_tuning", "did you mean 'prompt'?"),
        ("P_TUNING", "did you mean 'ptuning'?"),
        ("LoraConfig", "did you mean 'lora'?"),
        ("lora { target_modules q_proj }", "{ on q_proj, v_proj }"),
        ("lora { modules_to_save lm_head }", "{ train lm_head }"),
        ("lora { task_type }", "--task"),
        ("lora { r = 4 }", "in parentheses behind the method's name: lora(r = ...)"),
        ('lora { bias = "all" }', "bias all, bias adapter or bias none"),
        ("lora { On q_proj }", "did you mean 'on'?"),
        ("lora { on q_proj with r = 4 }", "'rank'"),
    ],
)
def test_words_of_peft_and_names_in_another_case(written, help):
    assert help in help_of(f"adapter a = {written}")


def test_every_field_that_is_a_hyperparameter_is_told_and_none_is_invented():
    """The fields are PEFT's own, and what is named in the help is of the method."""
    for rule in builtin_methods().values():
        if rule.peft_type not in {each.value for each in peft.PeftType}:
            continue
        named = {each.name for each in rule.hyperparameters}
        for field in rule.peft_fields:
            help = for_field(rule, field.name)
            if "' here" in help:
                assert help.split("is '")[1].split("'")[0] in named, (rule.name, help)


def test_every_type_of_peft_s_that_there_is_leads_to_a_method_of_it():
    methods = builtin_methods()
    for rule in methods.values():
        if rule.peft_type in {each.value for each in peft.PeftType}:
            help = for_method(rule.peft_type, methods)
            assert methods[help.split("'")[1]].peft_type == rule.peft_type
    assert for_method("nothing", methods) == ""


METHOD = """method m(rank: int = 2) {{
    on linear
    param A[{size}, in] = zeros saved "m_A"
    param B[out, rank] = zeros saved "m_B"
    W' = W + B @ A{more}
}}
adapter a = m"""


@pytest.mark.parametrize(
    ("size", "more", "help"),
    [
        ("rank", " @ x", "a method sees no input"),
        ("rank", " * hidden_states", "a method sees no input"),
        ("in_features", "", "it is 'in' here"),
        ("out_features", "", "it is 'out' here"),
        ("r", "", "it is 'rank' here"),
        ("rank", " + weight", "it is 'W' here"),
        ("rank", " + bias", "it is 'b' here"),
        ("rnk", "", "did you mean 'rank'?"),
        ("rank", " * zzz", "known here: A, B, W, b,"),
    ],
)
def test_what_a_layer_s_own_code_calls_things(size, more, help):
    assert help in help_of(METHOD.format(size=size, more=more))


def test_what_is_known_is_what_the_pages_tell():
    listed = help_of(METHOD.format(size="zzz", more="")).removeprefix("known here: ").split(", ")
    assert not {"Ws", "category", "members", "tallest"} & set(listed)
    assert {"W", "b", "in", "out", "rank", "sites"} <= set(listed)
    # In a predicate there is no weight, and 'x' is any unknown word.
    assert "known here" in help_of("adapter a = lora { on all linear where x > 4 }")

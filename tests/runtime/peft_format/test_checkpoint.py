"""Checkpoint keys and tensors, with peft as the judge."""

import warnings
from types import SimpleNamespace

import peft
import pytest
import torch
from peft.utils.save_and_load import get_peft_model_state_dict
from torch.testing import assert_close

from peftc.grammar.diagnostics import CheckpointError
from peftc.passes.plan.plan import ParamKey
from peftc.runtime.peft_config.peft_config import read_config, write_config
from peftc.runtime.peft_format.adapter_files import read_adapter, write_adapter
from peftc.runtime.peft_format.checkpoint import checkpoint_keys, entries, fit
from peftc.runtime.peft_format.key_spelling import PREFIX

LAYERS = range(2)
LLAMA_Q = [f"model.layers.{i}.self_attn.q_proj" for i in LAYERS]
LLAMA_QV = [f"model.layers.{i}.self_attn.{leaf}" for i in LAYERS for leaf in ("q_proj", "v_proj")]
GPT2 = [f"transformer.h.{i}.{leaf}" for i in LAYERS for leaf in ("attn.c_attn", "mlp.c_fc")]
BERT = [f"bert.encoder.layer.{i}.attention.self.{leaf}" for i in LAYERS for leaf in ("query", "value")]
EXPERTS = [f"model.layers.{i}.mlp.experts.{leaf}" for i in LAYERS for leaf in ("gate_up_proj", "down_proj")]
DOWN = EXPERTS[1::2]
ROUTED = [
    each
    for i in LAYERS
    for each in (
        f"model.layers.{i}.self_attn.q_proj",
        f"model.layers.{i}.mlp.experts.gate_up_proj",
        f"model.layers.{i}.mlp.experts.down_proj",
        f"model.layers.{i}.mlp.gate.weight",
    )
]
PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

# name: (model, its options, names of sites, what the plan adds, PEFT's config)
CASES = {
    "llama": ("llama", {}, LLAMA_QV, {"rank": 4}, {"r": 4, "target_modules": ["q_proj", "v_proj"]}),
    "llama, tied": ("llama", {"tied": True}, LLAMA_Q, {}, {"target_modules": ["q_proj"]}),
    "llama, ranks": (
        "llama",
        {},
        LLAMA_Q,
        {"by_site": {LLAMA_Q[0]: {"rank": 2, "alpha": 3.0}}},
        {
            "target_modules": ["q_proj"],
            "rank_pattern": {"layers.0.self_attn.q_proj": 2},
            "alpha_pattern": {"0.self_attn.q_proj": 3},
        },
    ),
    "llama, head": (
        "llama",
        {"tied": True},
        LLAMA_Q,
        {"train": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ),
    "llama, bias all": (
        "llama",
        {"attention_bias": True},
        LLAMA_Q,
        {"bias": "all"},
        {"target_modules": ["q_proj"], "bias": "all"},
    ),
    "llama, bias of adapted": (
        "llama",
        {"attention_bias": True},
        LLAMA_QV,
        {"bias": "adapter"},
        {"target_modules": ["q_proj", "v_proj"], "bias": "lora_only"},
    ),
    "gpt2": ("gpt2", {}, GPT2, {}, {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "gpt2, bias all": (
        "gpt2",
        {},
        GPT2,
        {"bias": "all"},
        {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "bias": "all"},
    ),
    "bert": (
        "bert",
        {},
        BERT,
        {"train": ["classifier"]},
        {"target_modules": ["query", "value"], "modules_to_save": ["classifier"]},
    ),
    "experts": ("qwen3_moe", {}, EXPERTS, {"rank": 2}, {"r": 2, "target_modules": [], "target_parameters": PARAMETERS}),
    "experts, listed the other way": (
        "qwen3_moe",
        {},
        EXPERTS,
        {"rank": 2, "by_site": {each: {"rank": 3} for each in DOWN}},
        {
            "r": 2,
            "target_modules": [],
            "target_parameters": PARAMETERS[::-1],
            "rank_pattern": {"experts.down_proj": 3},
        },
    ),
    "one of the experts": (
        "qwen3_moe",
        {},
        DOWN,
        {"rank": 2},
        {"r": 2, "target_modules": [], "target_parameters": PARAMETERS[1:]},
    ),
    "experts, router and attention": (
        "qwen3_moe",
        {},
        ROUTED,
        {"rank": 2},
        {"r": 2, "target_modules": ["q_proj"], "target_parameters": [*PARAMETERS, "gate.weight"]},
    ),
}


@pytest.fixture(params=CASES)
def case(request, tiny, plan):
    """A model adapted by PEFT with random weights, and the plan that says the same."""
    kind, options, names, planned, config = CASES[request.param]
    make = getattr(tiny, kind)
    theirs = peft.get_peft_model(make(**options), peft.LoraConfig(**config))
    stir(theirs)
    return SimpleNamespace(make=lambda: make(**options), theirs=theirs, plan=plan(make(**options), names, **planned))


def stir(model):
    """Move every trained parameter off its initial value, at which an adapter does nothing."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)


def names_of(model):
    return [name for name, _ in model.named_modules(remove_duplicate=False) if name]


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 13).reshape(2, 5)).logits


# --- keys ---


def test_keys_and_shapes_are_pefts(case):
    state = get_peft_model_state_dict(case.theirs)
    assert set(checkpoint_keys(case.plan)) == set(state)
    assert {key: entry.shape for key, entry in entries(case.plan).items()} == {
        key: tuple(tensor.shape) for key, tensor in state.items()
    }


def test_every_key_is_one_parameter(case):
    keys = checkpoint_keys(case.plan)
    assert len(set(keys.values())) == len(keys)


def test_names_of_nested_wrappers(tiny, plan):
    keys = checkpoint_keys(plan(tiny.qwen3_moe(), EXPERTS[:2], adapter="a"))
    name = "model.layers.0.mlp.experts"
    assert keys[f"{PREFIX}{name}.base_layer.lora_A.weight"] == ParamKey("a", f"{name}.gate_up_proj", "A")
    assert keys[f"{PREFIX}{name}.lora_A.weight"] == ParamKey("a", f"{name}.down_proj", "A")


# --- both ways, through files ---


def test_what_peft_saves_fits(case, tmp_path):
    case.theirs.save_pretrained(tmp_path)
    config, tensors = read_adapter(tmp_path)
    facts = read_config(config, methods={"lora": case.plan.spec.rule}, adapter_name="default", where="it")
    assert facts.spec.values == case.plan.spec.values
    found = fit(case.plan, tensors, where="it")
    state = get_peft_model_state_dict(case.theirs)
    assert len(found) == len(state)
    for key, param in checkpoint_keys(case.plan).items():
        assert_close(found[param], state[key], rtol=0, atol=0)


def test_what_is_written_here_peft_loads_with_equal_outputs(case, tmp_path):
    state = get_peft_model_state_dict(case.theirs)
    found = fit(case.plan, state, where="it")
    config = write_config(case.plan, module_names=names_of(case.make()), base_model_name_or_path=None, task_type=None)
    write_adapter(tmp_path, config, {key: found[param] for key, param in checkpoint_keys(case.plan).items()})
    loaded = peft.PeftModel.from_pretrained(case.make(), tmp_path)
    after = get_peft_model_state_dict(loaded)
    assert set(after) == set(state)
    for key, tensor in state.items():
        assert_close(after[key], tensor, rtol=0, atol=0)
    expected = logits(case.theirs.eval())
    assert_close(logits(loaded.eval()), expected)
    with pytest.raises(AssertionError):
        assert_close(logits(case.make()), expected)


def test_peft_warns_of_nothing_missing(tiny, plan, tmp_path):
    model = tiny.bert()
    planned = plan(model, BERT, train=["classifier"], bias="all")
    tensors = {key: torch.randn(entry.shape) for key, entry in entries(planned).items()}
    config = write_config(planned, module_names=names_of(model), base_model_name_or_path=None, task_type="SEQ_CLS")
    write_adapter(tmp_path, config, tensors)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # how peft tells of missing keys
        loaded = peft.PeftModel.from_pretrained(model, tmp_path)
    assert isinstance(loaded, peft.PeftModelForSequenceClassification)
    assert_close(
        loaded.base_model.model.classifier.modules_to_save["default"].bias, tensors[f"{PREFIX}classifier.bias"]
    )


def test_transformers_keys_fit(tiny, plan, tmp_path):
    model = tiny.llama()
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    model.save_pretrained(tmp_path)
    _, tensors = read_adapter(tmp_path)
    planned = plan(tiny.llama(), LLAMA_QV, rank=4)
    assert set(fit(planned, tensors, where="it")) == set(checkpoint_keys(planned).values())
    bare = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
    assert set(fit(planned, bare, where="it")) == set(checkpoint_keys(planned).values())


def test_transformers_loads_what_is_written(tiny, plan, tmp_path):
    model = tiny.llama()
    planned = plan(model, LLAMA_QV, rank=4)
    tensors = {key: torch.randn(entry.shape) for key, entry in entries(planned).items()}
    config = write_config(planned, module_names=names_of(model), base_model_name_or_path=None, task_type=None)
    write_adapter(tmp_path, config, tensors)
    model.load_adapter(str(tmp_path))
    loaded = model.get_submodule(LLAMA_QV[0]).lora_B["default"].weight
    assert_close(loaded, tensors[f"{PREFIX}{LLAMA_QV[0]}.lora_B.weight"])


def test_the_type_in_the_file_is_kept(tiny, plan):
    planned = plan(tiny.llama(), LLAMA_Q)
    tensors = {key: torch.zeros(entry.shape, dtype=torch.bfloat16) for key, entry in entries(planned).items()}
    assert {each.dtype for each in fit(planned, tensors, where="it").values()} == {torch.bfloat16}


# --- tensors of the base in the file ---


def embedding_case(tiny, plan, names=("model.embed_tokens", "lm_head"), **config):
    model = tiny.llama()
    theirs = peft.get_peft_model(tiny.llama(), peft.LoraConfig(target_modules=list(names), **config))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = get_peft_model_state_dict(theirs, save_embedding_layers=True)
    base = model.state_dict()
    shapes = {name: tuple(each.shape) for name, each in base.items()}
    return plan(model, names), state, {"base_shapes": shapes, "base_tensors": base.get}


def test_unchanged_embeddings_in_the_file_are_passed_over(tiny, plan):
    planned, state, base = embedding_case(tiny, plan)
    assert f"{PREFIX}model.embed_tokens.base_layer.weight" in state
    assert set(fit(planned, state, where="it", **base)) == set(checkpoint_keys(planned).values())
    half = {key: each.bfloat16() for key, each in state.items()}
    assert set(fit(planned, half, where="it", **base)) == set(checkpoint_keys(planned).values())


def test_changed_embeddings_are_refused(tiny, plan):
    planned, state, base = embedding_case(tiny, plan)
    state[f"{PREFIX}lm_head.base_layer.weight"] = state[f"{PREFIX}lm_head.base_layer.weight"] + 1
    with pytest.raises(CheckpointError, match=r"E343.*own 'lm_head.weight', which differs"):
        fit(planned, state, where="it", **base)
    state[f"{PREFIX}lm_head.base_layer.weight"] = torch.zeros(41, 16)
    with pytest.raises(CheckpointError, match=r"E343.*shape \[41, 16\], but the model's is \[40, 16\]"):
        fit(planned, state, where="it", **base)


def test_originals_that_bias_all_saves_are_passed_over(tiny, plan):
    config = peft.LoraConfig(target_modules=["query", "value"], bias="all", task_type="SEQ_CLS")
    state = get_peft_model_state_dict(peft.get_peft_model(tiny.bert(), config))
    planned = plan(tiny.bert(), BERT, train=["classifier"], bias="all")
    extra = set(state) - set(checkpoint_keys(planned))
    assert extra == {f"{PREFIX}classifier.{each}.bias" for each in ("original_module", "modules_to_save")}
    assert set(fit(planned, state, where="it")) == set(checkpoint_keys(planned).values())


def test_a_bias_without_base_layer_is_the_same_bias(tiny, plan):
    planned = plan(tiny.llama(attention_bias=True), LLAMA_Q, bias="adapter")
    tensors = {key.replace(".base_layer", ""): torch.ones(each.shape) for key, each in entries(planned).items()}
    assert set(fit(planned, tensors, where="it")) == set(checkpoint_keys(planned).values())


# --- what does not fit ---


@pytest.fixture
def zeros(tiny, plan):
    planned = plan(tiny.llama(), [*LLAMA_Q, "model.embed_tokens"])
    return planned, {key: torch.zeros(entry.shape) for key, entry in entries(planned).items()}


def misfit(planned, tensors):
    with pytest.raises(CheckpointError) as caught:
        fit(planned, tensors, where="adapter_model.safetensors")
    return caught.value


def test_all_misfits_are_reported_at_once(zeros):
    planned, tensors = zeros
    first = f"{PREFIX}{LLAMA_Q[0]}.lora_A.weight"
    tensors[first.replace("lora_A", "lora_a")] = tensors.pop(first)
    second = f"{PREFIX}{LLAMA_Q[1]}.lora_A.weight"
    tensors[second] = torch.zeros(4, 16)
    error = misfit(planned, tensors)
    assert [each.code for each in error.diagnostics] == ["E340", "E341", "E342"]
    text = str(error)
    assert f"adapter_model.safetensors: error[E340]: missing key '{first}'" in text
    assert f"did you mean '{first}'" in text
    assert f"'{second}' has shape [4, 16], expected [8, 16]" in text
    assert "the adapter was saved with rank = 4, not 8" in text


@pytest.mark.parametrize(
    ("key", "shape", "reason"),
    [
        (f"{PREFIX}model.embed_tokens.lora_embedding_A", (8, 41), "a vocabulary of 41, this one of 40"),
        (f"{PREFIX}{LLAMA_Q[0]}.lora_A.weight", (8, 32), "32 features there, this one 16"),
        (f"{PREFIX}{LLAMA_Q[0]}.lora_A.weight", (8, 16, 1), "another kind of module"),
    ],
)
def test_a_wrong_shape_has_a_likely_reason(zeros, key, shape, reason):
    planned, tensors = zeros
    assert reason in str(misfit(planned, tensors | {key: torch.zeros(shape)}))


def test_the_rank_of_a_stack_is_counted_per_expert(tiny, plan):
    planned = plan(tiny.qwen3_moe(), DOWN, rank=2)
    tensors = {key: torch.zeros(entry.shape) for key, entry in entries(planned).items()}
    key = f"{PREFIX}model.layers.0.mlp.experts.lora_A.weight"
    assert "saved with rank = 3, not 2" in str(misfit(planned, tensors | {key: torch.zeros(12, 8)}))


def test_a_trained_module_of_another_size(tiny, plan):
    planned = plan(tiny.bert(), BERT, train=["classifier"])
    tensors = {key: torch.zeros(entry.shape) for key, entry in entries(planned).items()}
    text = str(misfit(planned, tensors | {f"{PREFIX}classifier.bias": torch.zeros(3)}))
    assert "another number of labels" in text


def test_keys_of_a_bare_model_are_explained(zeros):
    planned, tensors = zeros
    bare = {key.replace(f"{PREFIX}model.", PREFIX): tensor for key, tensor in tensors.items()}
    assert "saved from a model that holds this one, or is held by it" in str(misfit(planned, bare))


def test_a_key_given_twice(zeros):
    planned, tensors = zeros
    key = f"{PREFIX}{LLAMA_Q[0]}.lora_A.weight"
    assert "in the file twice" in str(misfit(planned, tensors | {key.removeprefix(PREFIX): tensors[key]}))


def test_long_lists_are_cut(tiny, plan):
    names = [name for name, module in tiny.llama().named_modules() if isinstance(module, torch.nn.Linear)]
    error = misfit(plan(tiny.llama(), names), {})
    assert len(error.diagnostics) == 21
    assert "... and 10 more of this kind" in str(error)

"""A base that a spec has quantized: packed as transformers packs it, from memory and from a checkpoint."""

import json
import shutil
import sys

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from peftc import compiler
from peftc.compiler.load_model.quantizing import description, quantized_copy
from peftc.grammar.spec.spec import Quantize
from peftc.passes.quantized.schemes.known import packed_modules, parameter_count
from tests.compiler.commands.cli_help import peftc
from tests.matrix import wide

SPEC = "base {{ quantize = {} }}\nadapter a = lora(rank = 2) {{ on all linear }}"
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
DOUBLE = {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True}
WRITTEN = {
    "nf4": NF4,
    "fp4(double_quant = true, compute = bfloat16)": {**DOUBLE, "bnb_4bit_compute_dtype": torch.bfloat16},
    "int8(threshold = 4)": {"load_in_8bit": True, "llm_int8_threshold": 4.0},
}


def _models():
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
    llama = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 1}
    return {
        "llama": LlamaForCausalLM(LlamaConfig(**llama, **sizes)),
        "gpt2": GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=64)),
        "t5": T5ForConditionalGeneration(
            T5Config(d_model=64, d_kv=32, d_ff=128, num_layers=1, num_heads=2, vocab_size=64)
        ),
    }


@pytest.fixture(scope="module")
def models():
    return {name: each.eval() for name, each in _models().items()}


@pytest.fixture(scope="module")
def saved(models, tmp_path_factory):
    directory = tmp_path_factory.mktemp("dense") / "llama"
    models["llama"].save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def adapted(models):
    """A dense Llama quantized by its spec, with an adapter that is not at its start."""
    made = compiler.apply(models["llama"], SPEC.format("nf4(double_quant = true)"))
    torch.manual_seed(1)
    for each in made.get_submodule("adapter_bank").parameters():
        nn.init.normal_(each, std=0.1)
    return made


def loaded(model, **options):
    """The same weights, quantized by transformers as it loads them."""
    options = {"quantization_config": BitsAndBytesConfig(**options), "device_map": {"": "cpu"}, "dtype": model.dtype}
    return type(model).from_pretrained(None, config=model.config, state_dict=model.state_dict(), **options)


def raw(tensor):
    return tensor.contiguous().view(torch.uint8) if tensor.dim() else tensor


def assert_same_state(mine, theirs):
    mine, theirs = mine.state_dict(), theirs.state_dict()
    assert list(mine) == list(theirs)
    for name, each in mine.items():
        assert each.dtype == theirs[name].dtype, name
        assert torch.equal(raw(each), raw(theirs[name])), name


def unpacking(model):
    """A model of bitsandbytes that computes in its compute type, and does not repack itself."""
    for each in model.modules():
        if isinstance(each, bnb.nn.Linear4bit):
            each.support_avx512bf16_for_cpu = False
    return model.eval()


def refused(kind, call, code):
    with pytest.raises(kind) as caught:
        call()
    (found,) = caught.value.diagnostics
    assert found.code == code
    return found


# --- in memory ---

CASES = [f"{name} {written}" for name in ("llama", "gpt2", "t5") for written in WRITTEN]
ALWAYS = ("llama nf4", "gpt2 fp4(double_quant = true, compute = bfloat16)", "t5 int8(threshold = 4)")


@pytest.mark.parametrize("case", wide(CASES, ALWAYS))
def test_packs_as_transformers_does(case, models):
    name, _, written = case.partition(" ")
    model = models[name]
    before = {key: each.clone() for key, each in model.state_dict().items()}
    attributes, config = set(model.__dict__), model.config.to_json_string()
    mine = compiler.apply(model, SPEC.format(written)).unload()
    theirs = loaded(model, **WRITTEN[written])
    assert_same_state(mine, theirs)
    apart = {"dtype": None, "_name_or_path": None}
    assert {**mine.config.to_dict(), **apart} == {**theirs.config.to_dict(), **apart}
    assert mine.is_quantized
    assert mine.quantization_method == theirs.quantization_method
    assert mine.hf_quantizer.modules_to_not_convert == sorted(theirs.hf_quantizer.modules_to_not_convert)
    kinds = [{key: type(each) for key, each in of.named_modules()} for of in (mine, theirs)]
    assert kinds[0] == kinds[1]
    assert (set(model.__dict__), model.config.to_json_string()) == (attributes, config)
    assert packed_modules(model) == {}
    assert all(torch.equal(before[key], each) for key, each in model.state_dict().items())


def test_computes_in_the_models_own_type_unless_the_spec_names_another(models):
    half = LlamaForCausalLM(models["llama"].config).to(torch.bfloat16)
    for written, kind in (("nf4", torch.bfloat16), ("nf4(compute = float16)", torch.float16)):
        made = quantized_copy(half, compiler.read_spec(SPEC.format(written)).quantize)
        assert {each.packing.compute for each in packed_modules(made).values()} == {kind}
        assert made.config.quantization_config.bnb_4bit_compute_dtype == kind


def test_runs_merges_saves_and_reloads_as_a_loaded_one(adapted, models, tmp_path):
    plain = adapted.merge_and_unload(quantized="requantize")
    adapted.merge_adapter(quantized="requantize")
    merged = adapted(IDS).logits
    adapted.unmerge_adapter()
    torch.testing.assert_close(unpacking(plain)(IDS).logits, merged)
    plain.save_pretrained(tmp_path)
    again = unpacking(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert type(again.model.layers[0].mlp.up_proj) is bnb.nn.Linear4bit
    assert_same_state(again, plain)
    assert torch.equal(again(IDS).logits, plain(IDS).logits)
    base = unpacking(loaded(models["llama"], **NF4, bnb_4bit_use_double_quant=True))
    assert (merged - base(IDS).logits).abs().max() > 0.01
    with adapted.disable_adapter():
        torch.testing.assert_close(adapted(IDS).logits, base(IDS).logits)
    assert adapted._hf_peft_config_loaded  # without it Trainer refuses to train a quantized model


def test_a_model_that_is_quantized_so_is_taken_as_it_is(models):
    theirs = loaded(models["llama"], **NF4, bnb_4bit_use_double_quant=True)
    made = compiler.apply(theirs, SPEC.format("nf4(double_quant = true, compute = float32)"))
    mine, own = packed_modules(made), packed_modules(theirs)
    name = "model.layers.0.self_attn.q_proj"
    assert mine[name].parts[0].data_ptr() == own[name].parts[0].data_ptr()
    eight = loaded(models["llama"], **WRITTEN["int8(threshold = 4)"])
    assert quantized_copy(eight, Quantize("int8", threshold=4.0)) is eight
    found = refused(compiler.SpecError, lambda: quantized_copy(eight, Quantize("int8")), "E244")
    assert "int8()" in found.message
    assert "int8(threshold = 4)" in found.message


def test_a_model_that_repacked_itself_is_what_it_was(models):
    theirs = loaded(models["llama"], **NF4, bnb_4bit_use_double_quant=True).eval()
    with torch.no_grad():
        theirs(IDS)  # on a CPU with AVX-512 BF16 its scales are unpacked now
    wanted = Quantize("nf4", double_quant=True, compute="float32")
    assert quantized_copy(theirs, wanted) is theirs
    refused(compiler.SpecError, lambda: quantized_copy(theirs, Quantize("nf4")), "E244")


def test_skip_leaves_modules_dense_and_tied_ones_always(models):
    gpt2 = models["gpt2"]
    assert gpt2.lm_head.weight is gpt2.transformer.wte.weight
    made = quantized_copy(gpt2, Quantize("nf4", skip=("mlp", "attn.c_attn")))
    assert list(packed_modules(made)) == ["transformer.h.0.attn.c_proj"]
    assert made.lm_head.weight is made.transformer.wte.weight
    assert made.config.quantization_config.llm_int8_skip_modules[:2] == ["transformer.h.0.mlp", "attn.c_attn"]
    everything = quantized_copy(models["llama"], Quantize("int8", skip=()))
    assert "lm_head" in packed_modules(everything)
    message = refused(compiler.SpecError, lambda: quantized_copy(gpt2, Quantize("nf4", skip=("c_atn",))), "E246")
    assert "'c_attn'" in message.help


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.tied = nn.Linear(64, 64), nn.Linear(64, 64)
        self.again, self.last = self.first, nn.Linear(64, 64)
        self.last.weight = self.tied.weight

    def forward(self, x):
        return self.last(self.tied(self.again(self.first(x))))


def test_a_plain_module_is_packed_but_for_what_is_tied():
    model = Plain()
    made = quantized_copy(model, Quantize("int8"))
    assert type(made.first) is bnb.nn.Linear8bitLt
    assert made.again is made.first
    assert type(made.last) is nn.Linear
    assert made.last.weight is made.tied.weight
    assert made.last.weight.data_ptr() == model.last.weight.data_ptr()
    assert type(model.first) is nn.Linear
    assert parameter_count(made) == parameter_count(model)
    assert description(model) == ""
    assert description(made) == "1 linear in int8(): 4.2 KiB instead of 16.0 KiB"
    refused(compiler.SpecError, lambda: quantized_copy(nn.LayerNorm(3), Quantize("int8")), "E245")
    doubles = Plain().double()
    refused(compiler.ModelError, lambda: quantized_copy(doubles, Quantize("nf4")), "E463")


def test_without_bitsandbytes(models, saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    for call in (
        lambda: compiler.apply(models["llama"], SPEC.format("nf4")),
        lambda: compiler.find_model(saved, quantize=Quantize("nf4")),
    ):
        assert "pip install" in refused(compiler.ModelError, call, "E460").help


def test_a_model_whose_weights_transformers_has_drawn(models):
    drawn = LlamaForCausalLM(models["llama"].config)
    drawn.quantization_method = type("Method", (), {"value": "hqq"})()
    refused(compiler.ModelError, lambda: compiler.apply(drawn, "adapter a = lora { on q_proj }"), "E462")


# --- from a checkpoint ---


@pytest.mark.parametrize(("written", "options"), [("nf4", NF4), ('int8(skip = ["v_proj"])', {"load_in_8bit": True})])
def test_a_checkpoint_is_packed_as_it_is_read(written, options, models, saved):
    quantize = compiler.read_spec(SPEC.format(written)).quantize
    found = compiler.find_model(saved, quantize=quantize)
    assert found.dense == saved
    if quantize.skip:
        options = {**options, "llm_int8_skip_modules": ["v_proj"]}
    assert_same_state(found.model, loaded(models["llama"], **options))
    assert ("lm_head" in packed_modules(found.model)) == bool(quantize.skip)
    refused(compiler.SpecError, lambda: compiler.find_model(saved, quantize=Quantize("nf4", skip=("heads",))), "E246")


def test_a_checkpoint_of_half_precision_computes_in_it(models, tmp_path):
    half = LlamaForCausalLM(models["llama"].config).to(torch.bfloat16)
    half.save_pretrained(tmp_path)
    model = compiler.find_model(tmp_path, quantize=Quantize("nf4")).model
    assert {each.packing.compute for each in packed_modules(model).values()} == {torch.bfloat16}
    assert model.config.quantization_config.bnb_4bit_compute_dtype == torch.bfloat16
    assert_same_state(model, quantized_copy(half, Quantize("nf4")))


@pytest.mark.parametrize("options", [{**NF4, "bnb_4bit_use_double_quant": True}, {"load_in_8bit": True}])
def test_a_checkpoint_that_is_quantized_loads(options, models, tmp_path):
    theirs = loaded(models["llama"], **options)
    theirs.save_pretrained(tmp_path)
    assert_same_state(compiler.find_model(tmp_path).model, theirs)
    found = compiler.find_model(tmp_path, quantize=Quantize("fp4"))  # the checkpoint decides, and apply compares
    assert found.dense is None
    _, problems = compiler.check_fit(compiler.read_spec(SPEC.format("fp4")), found)
    assert [each.code for each in problems] == ["E244"]


def _written(saved, directory, quantization):
    shutil.copytree(saved, directory)
    config = json.loads((saved / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    return directory


@pytest.mark.parametrize(
    ("quantization", "code", "said"),
    [
        (
            {"quant_method": "gptq", "bits": 4},
            "E461",
            "with gptq; there is no backend for it on this machine",
        ),
        ({"quant_method": "awq", "bits": 4}, "E461", "quantized with awq; there is no backend"),
        ({"quant_method": "hqq"}, "E461", "quantized with hqq; there is no backend"),
        ({"quant_method": "spqr"}, "E461", "quantized with spqr; there is no backend"),
        ({"quant_method": "sinq"}, "E461", "quantized with sinq; there is no backend"),
        ({"quant_method": "gtpq"}, "E461", "'gtpq', which transformers does not know"),
        ({}, "E464", "no 'quant_method'"),
        ("gptq", "E464", "not a JSON object"),
        ({"quant_method": "gptq", "bits": "four"}, "E464", "'quantization_config' is wrong"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": 4}, "E464", "'quantization_config' is wrong"),
    ],
)
def test_what_other_checkpoints_are_quantized_with(quantization, code, said, saved, tmp_path):
    directory = _written(saved, tmp_path / "other", quantization)
    found = refused(compiler.ModelError, lambda: compiler.find_model(directory), code)
    assert said in found.message
    assert found.where.startswith(str(directory))


@pytest.mark.parametrize("by", ["bitnet", "bitsandbytes"])
def test_weights_that_a_quantized_checkpoint_lacks(by, models, saved, tmp_path):
    """What bitsandbytes packed is read or refused; of other libraries' it may have been overlooked."""
    directory = tmp_path / by
    if by == "bitnet":
        _written(saved, directory, {"quant_method": "bitnet", "linear_class": "autobitlinear"})
    else:
        loaded(models["llama"], **NF4).save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    if by == "bitsandbytes":
        assert "lack model.norm.weight" in compiler.find_model(directory).warnings[0]
    else:
        found = refused(compiler.ModelError, lambda: compiler.find_model(directory), "E462")
        assert "quantized with bitnet, and transformers has not read" in found.message


def test_random_weights_are_not_said_to_be_quantized(saved, tmp_path):
    _written(saved, tmp_path / "bare", {"quant_method": "gptq", "bits": 4})
    (tmp_path / "bare" / "model.safetensors").unlink()
    found = compiler.find_model(tmp_path / "bare")
    assert "has no effect on random weights" in found.warnings[0]
    assert getattr(found.model.config, "quantization_config", None) is None


# --- the command line ---


def test_the_command_line_quantizes_and_says_what_merging_costs(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "spec.adapter").write_text(SPEC.format("nf4").replace("all linear", "q_proj"))
    done = peftc("compile", "spec.adapter", saved, "-o", "out", "--json")
    assert done.code == 0, done.out
    assert done.json["model"]["parameters"] == parameter_count(compiler.find_model(saved).model)
    assert any("7 linears in nf4(" in each for each in done.json["notes"])
    assert "quantize = nf4()" in json.loads((tmp_path / "out" / "manifest.json").read_text())["spec"]
    for command in ("check", "explain"):
        assert peftc(command, "spec.adapter", saved).code == 0
    unsaid = peftc("drift", "spec.adapter", saved, "--json")
    assert unsaid.codes == ["E523"]
    assert "--quantized requantize" in unsaid.json["errors"][0]["help"]
    half = peftc("drift", "spec.adapter", saved, "--dtype", "bfloat16", "--quantized", "requantize", "--json")
    assert half.json["outputs"] is not None
    compiler.find_model(saved, quantize=Quantize("nf4")).model.save_pretrained(tmp_path / "packed")
    assert peftc("drift", "spec.adapter", "packed", "--dtype", "bfloat16", "--json").codes == ["E590"]

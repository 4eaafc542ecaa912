"""Adapters that were trained before transformers renamed, or stacked, what they adapt.

The judge is peft on linears under the earlier names, with the model's own weights: what it merges into them belongs
into the model of today.
"""

import json
import warnings
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from peftc import compiler
from peftc.grammar.diagnostics import CheckpointError
from peftc.runtime.peft_format.adapter_files import CONFIG, WEIGHTS
from tests.zoo import DECODER, TEXT, WIDTHS

IDS = torch.tensor([[1, 5, 9, 17, 23, 30], [2, 8, 3, 4, 50, 11]])
LAYERS = {"num_hidden_layers": 2}
TEXT2, DECODER2 = TEXT | LAYERS, DECODER | LAYERS

# --- models, and what their linears were called ---


def renamed(pairs):
    """Earlier names of all linears: today's with the first prefix that fits replaced."""

    def names(model):
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                new, old = next(((new, old) for new, old in pairs if name.startswith(new)), ("", ""))
                yield old + name[len(new) :], f"{name}.weight", ()

    return names


def experts(first, second, third, gate="", where=("", "")):
    """Beside the linears that are ones today: those of experts, and the gate that chooses among them."""

    def names(model):
        yield from renamed([where, ("", "")])(model)
        for name, parameter in model.named_parameters():
            base = name.replace(*where, 1) if where[0] else name
            if name.endswith(".gate_up_proj"):
                rows = parameter.shape[1] // 2
                for expert in range(len(parameter)):
                    owner = base.removesuffix("gate_up_proj")
                    yield f"{owner}{expert}.{first}", name, (expert, slice(rows))
                    yield f"{owner}{expert}.{second}", name, (expert, slice(rows, None))
            elif name.endswith("experts.down_proj"):
                for expert in range(len(parameter)):
                    yield f"{base.removesuffix('down_proj')}{expert}.{third}", name, (expert,)
            elif gate and name.endswith(f"{gate}.weight"):
                yield base.removesuffix(".weight"), name, ()

    return names


def of_mixtral(model):
    for old, new, part in experts("w1", "w3", "w2", "mlp.gate")(model):
        yield old.replace(".mlp.", ".block_sparse_moe."), new, part


def llava():
    config = hf.LlavaConfig(
        text_config=hf.LlamaConfig(**TEXT2),
        vision_config=hf.CLIPVisionConfig(**WIDTHS, image_size=28, patch_size=14),
        image_token_id=60,
    )
    return hf.LlavaForConditionalGeneration(config)


def gemma3():
    text = hf.Gemma3TextConfig(**DECODER2, head_dim=8, sliding_window=8)
    vision = hf.SiglipVisionConfig(**WIDTHS, image_size=28, patch_size=14)
    config = hf.Gemma3Config(text_config=text, vision_config=vision, image_token_index=60, mm_tokens_per_image=4)
    return hf.Gemma3ForConditionalGeneration(config)


def qwen2_vl():
    text = dict(**DECODER2, rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2]})
    vision = dict(depth=1, embed_dim=32, hidden_size=32, num_heads=4, patch_size=14)
    ids = dict(image_token_id=60, video_token_id=61, vision_start_token_id=58, vision_end_token_id=59)
    return hf.Qwen2VLForConditionalGeneration(hf.Qwen2VLConfig(text_config=text, vision_config=vision, **ids))


MOE = dict(**DECODER2, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
WITH_SHARED = dict(**DECODER2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
LLAVA = [
    ("model.language_model", "language_model.model"),
    ("lm_head", "language_model.lm_head"),
    ("model.vision_tower", "vision_tower.vision_model"),
    ("model.multi_modal_projector", "multi_modal_projector"),
]
MODELS = {
    "llava": (llava, renamed(LLAVA)),
    "gemma3": (gemma3, renamed(LLAVA)),
    "qwen2_vl": (qwen2_vl, renamed([("model.visual", "visual"), ("model.language_model", "model")])),
    "qwen3_moe": (
        lambda: hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**MOE)),
        experts("gate_proj", "up_proj", "down_proj"),
    ),
    "qwen2_moe": (
        lambda: hf.Qwen2MoeForCausalLM(hf.Qwen2MoeConfig(**WITH_SHARED, shared_expert_intermediate_size=16)),
        experts("gate_proj", "up_proj", "down_proj", "mlp.gate"),
    ),
    "mixtral": (lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**DECODER2, num_local_experts=4)), of_mixtral),
}


def make(name):
    torch.manual_seed(0)
    model = MODELS[name][0]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def tree_of(weights):
    """Modules of nothing but linears, under these names."""
    root = nn.Module()
    for name, weight in weights.items():
        *owners, leaf = name.split(".")
        module = root
        for each in owners:
            if each not in module._modules:
                module.add_module(each, nn.Module())
            module = module._modules[each]
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight.data = weight.detach().clone()
        module.add_module(leaf, linear)
    return root


@torch.no_grad()
def trained(name, config, directory, rename=lambda key: key):
    """Train and save with peft under the earlier names. The model of today with the merged weights."""
    truth = make(name)
    own = dict(truth.named_parameters(remove_duplicate=False))
    places = {rename(old): (new, part) for old, new, part in MODELS[name][1](truth)}
    old = tree_of({key: own[new][part] if part else own[new] for key, (new, part) in places.items()})
    torch.manual_seed(3)
    wrapped = peft.get_peft_model(old, config)
    for key, each in wrapped.named_parameters():
        if each.requires_grad and "modules_to_save" not in key:
            each.add_(torch.randn_like(each) * 0.2)
    for key, each in wrapped.named_parameters():
        if "modules_to_save.default" in key:
            each.mul_(1.5)
    wrapped.save_pretrained(directory)
    for key, module in wrapped.merge_and_unload().named_modules():
        if isinstance(module, nn.Linear):
            new, part = places[key]
            (own[new][part] if part else own[new]).copy_(module.weight)
    return truth


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def check(name, directory, truth):
    """The same outputs, saved and loaded again, merged, and read by peft on the model of today."""
    base = make(name)
    adapted = compiler.load(base, directory).eval()
    assert (logits(adapted) - logits(base)).abs().max() > 1e-3
    assert_close(logits(adapted), logits(truth), rtol=0, atol=2e-4)
    adapted.save_pretrained(directory / "again")
    assert_close(logits(compiler.load(base, directory / "again").eval()), logits(adapted))
    assert_close(logits(adapted.merge_and_unload()), logits(truth), rtol=0, atol=2e-4)
    return adapted


def read_by_peft(name, directory, truth):
    back = peft.PeftModel.from_pretrained(make(name), directory / "again").eval()
    assert_close(logits(back.base_model.model), logits(truth), rtol=0, atol=2e-4)


pytestmark = pytest.mark.filterwarnings("ignore")

# --- renamed ---

OLD = {
    "llava": (
        ["language_model.model.layers.0.mlp.down_proj", "language_model.model.layers.1.self_attn.q_proj"],
        r"^language_model\.model\.layers\.\d+\..*(q_proj|down_proj)",
    ),
    "gemma3": (["language_model.model.layers.1.mlp.up_proj"], r"language_model\.model\..*\.(k_proj|o_proj)"),
    "qwen2_vl": (
        ["model.layers.0.mlp.down_proj", "visual.blocks.0.mlp.fc1"],
        r"^model\.layers\.\d+.*(q_proj|up_proj)$",
    ),
}


@pytest.mark.parametrize("name", OLD)
@pytest.mark.parametrize("how", ["by leaf", "names", "pattern", "a layer"])
def test_renamed(name, how, tmp_path):
    names, pattern = OLD[name]
    targets = {"by leaf": ["q_proj", "down_proj"], "names": names, "pattern": pattern, "a layer": ["q_proj", "up_proj"]}
    extra = {"layers_to_transform": [1], "layers_pattern": "layers"} if how == "a layer" else {}
    config = peft.LoraConfig(r=4, target_modules=targets[how], **extra)
    truth = trained(name, config, tmp_path)
    check(name, tmp_path, truth)
    read_by_peft(name, tmp_path, truth)


METHODS = {
    "dora": lambda **k: peft.LoraConfig(r=4, use_dora=True, **k),
    "rslora, ranks": lambda **k: peft.LoraConfig(
        r=4,
        use_rslora=True,
        rank_pattern={r"^language_model\.model\.layers\.0\..*q_proj": 2, "layers.1.mlp.down_proj": 8},
        alpha_pattern={"language_model.model.layers.1.self_attn.q_proj": 3},
        **k,
    ),
    "loha": lambda **k: peft.LoHaConfig(r=4, **k),
    "lokr": lambda **k: peft.LoKrConfig(r=4, **k),
    "ia3": lambda **k: peft.IA3Config(feedforward_modules=["down_proj"], **k),
    "oft": lambda **k: peft.OFTConfig(oft_block_size=8, **k),
    "head too": lambda **k: peft.LoraConfig(r=4, modules_to_save=["lm_head"], **k),
    "head by its name": lambda **k: peft.LoraConfig(r=4, modules_to_save=["language_model.lm_head"], **k),
    "without some": lambda **k: peft.LoraConfig(
        r=4, exclude_modules=["language_model.model.layers.0.mlp.down_proj"], **k
    ),
}


@pytest.mark.parametrize("method", METHODS)
def test_renamed_of_other_methods(method, tmp_path):
    pattern = r"language_model\.model\..*\.(q_proj|v_proj|down_proj)"
    targets = ["q_proj", "v_proj", "down_proj"] if method == "ia3" else pattern
    truth = trained("llava", METHODS[method](target_modules=targets), tmp_path)
    adapted = check("llava", tmp_path, truth)
    assert "language_model.model" not in (tmp_path / "again" / CONFIG).read_text()
    assert adapted.active_adapters() == ["default"]


def test_names_of_between_and_of_wrappers(tmp_path):
    """Keys may be spelled in another way and be earlier ones at once."""
    config = peft.LoraConfig(r=4, target_modules=r"language_model\.model\..*q_proj")
    truth = trained("llava", config, tmp_path)
    file = tmp_path / WEIGHTS
    save_file(
        {f"module.{key.replace('.weight', '.default.weight')}": value for key, value in load_file(file).items()}, file
    )
    check("llava", tmp_path, truth)


def test_what_a_class_says_itself(tmp_path):
    """As classes of transformers 4, and of code from the Hub, do."""

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.q = nn.Linear(8, 8, bias=False)

    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self._checkpoint_conversion_mapping = {r"^old\.": "inner."}
            self.inner = Inner()

        def forward(self, x):
            return self.inner.q(x)

    torch.manual_seed(0)
    model = Mine()
    old = tree_of({"old.q": model.inner.q.weight})
    wrapped = peft.get_peft_model(old, peft.LoraConfig(r=2, target_modules=["old.q"], init_lora_weights=False))
    wrapped.save_pretrained(tmp_path)
    x = torch.randn(3, 8)
    merged = wrapped.merge_and_unload().old.q
    assert_close(compiler.load(model, tmp_path)(x), merged(x))


# --- experts ---

PROJECTIONS = {
    "qwen3_moe": ("gate_proj", "up_proj", "down_proj"),
    "qwen2_moe": ("gate_proj", "up_proj", "down_proj"),
    "mixtral": ("w1", "w3", "w2"),
}
CHOSEN = {"all": (0, 1, 2), "down": (2,), "gate and up": (0, 1), "gate alone": (0,)}


@pytest.mark.parametrize("name", PROJECTIONS)
@pytest.mark.parametrize("chosen", CHOSEN)
@pytest.mark.parametrize("pattern", [False, True], ids=["list", "pattern"])
def test_experts(name, chosen, pattern, tmp_path):
    targets = ["q_proj", *(PROJECTIONS[name][each] for each in CHOSEN[chosen])]
    config = peft.LoraConfig(r=4, lora_alpha=10, target_modules=rf".*\.({'|'.join(targets)})" if pattern else targets)
    truth = trained(name, config, tmp_path)
    check(name, tmp_path, truth)
    read_by_peft(name, tmp_path, truth)


@pytest.mark.parametrize("name", ["qwen2_moe", "mixtral"])
def test_the_gate_that_chooses(name, tmp_path):
    """A linear then, today a module with a bare weight: alone, and beside experts."""
    for targets in (["gate"], ["q_proj", "gate", PROJECTIONS[name][2]]):
        directory = tmp_path / str(len(targets))
        truth = trained(name, peft.LoraConfig(r=2, target_modules=targets), directory)
        check(name, directory, truth)


def test_all_linear(tmp_path):
    truth = trained("mixtral", peft.LoraConfig(r=2, target_modules="all-linear"), tmp_path)
    check("mixtral", tmp_path, truth)


@pytest.mark.parametrize("name", PROJECTIONS)
def test_some_experts_of_some_layers(name, tmp_path):
    pattern = rf".*\.layers\.1\..*experts\.[13]\.({'|'.join(PROJECTIONS[name])})"
    truth = trained(name, peft.LoraConfig(r=4, target_modules=pattern), tmp_path)
    check(name, tmp_path, truth)


OF_EXPERTS = {
    "rslora": (lambda **k: peft.LoraConfig(r=4, use_rslora=True, **k), True),
    "dora": (lambda **k: peft.LoraConfig(r=4, use_dora=True, **k), True),
    "loha": (lambda **k: peft.LoHaConfig(r=4, alpha=10, **k), True),
    "hira": (lambda **k: peft.HiraConfig(r=4, **k), True),
    "ia3": (lambda **k: peft.IA3Config(feedforward_modules=[], **k), True),
    "ia3 of inputs": (lambda **k: peft.IA3Config(feedforward_modules=k["target_modules"], **k), False),
    "lokr": (lambda **k: peft.LoKrConfig(r=4, **k), False),
    "oft": (lambda **k: peft.OFTConfig(oft_block_size=8, **k), False),
    "ranks": (lambda **k: peft.LoraConfig(r=4, rank_pattern={"down_proj": 2, "layers.1.mlp.experts.*": 3}, **k), True),
}


@pytest.mark.parametrize("method", OF_EXPERTS)
@pytest.mark.parametrize("chosen", [("down_proj",), ("gate_proj", "up_proj", "down_proj")], ids=["down", "all"])
def test_experts_of_other_methods(method, chosen, tmp_path):
    """A stack has an adapter for each expert whatever the method; halves of one weight add up for some."""
    config, joins = OF_EXPERTS[method]
    truth = trained("qwen3_moe", config(target_modules=list(chosen)), tmp_path)
    if joins or chosen == ("down_proj",):
        check("qwen3_moe", tmp_path, truth)
    else:
        refused(tmp_path, "E346")


def refused(directory, code, name="qwen3_moe"):
    base = make(name)
    before = logits(base)
    with pytest.raises(CheckpointError) as caught:
        compiler.load(base, directory)
    assert {each.code for each in caught.value.diagnostics} == {code}
    assert torch.equal(logits(base), before)
    return str(caught.value)


def test_ranks_that_differ_between_experts(tmp_path):
    config = peft.LoraConfig(r=4, rank_pattern={r".*experts\.1\.down_proj": 2}, target_modules=["down_proj"])
    trained("qwen3_moe", config, tmp_path)
    assert "'rank' differs between" in refused(tmp_path, "E346")


def test_dora_on_some_experts(tmp_path):
    trained("qwen3_moe", peft.LoraConfig(r=4, use_dora=True, target_modules=r".*experts\.1\.down_proj"), tmp_path)
    assert "experts.0.down_proj is not adapted" in refused(tmp_path, "E346")


def without(directory, test):
    file = directory / WEIGHTS
    save_file({key: value for key, value in load_file(file).items() if not test(key)}, file)


@pytest.mark.parametrize("gone", ["experts.3.down_proj", "layers.1.mlp", "layers.0.mlp.experts.2.up_proj.lora_B"])
def test_a_file_that_lacks_some(gone, tmp_path):
    trained("qwen3_moe", peft.LoraConfig(r=4, target_modules=["gate_proj", "up_proj", "down_proj"]), tmp_path)
    without(tmp_path, lambda key: gone in key)
    assert gone in refused(tmp_path, "E340")


def test_a_renamed_file_that_lacks_some(tmp_path):
    trained("llava", peft.LoraConfig(r=4, target_modules=r"language_model\.model\..*q_proj"), tmp_path)
    without(tmp_path, lambda key: "layers.1" in key)
    assert "layers.1.self_attn.q_proj" in refused(tmp_path, "E340", "llava")


def test_more_experts_than_the_model_has(tmp_path):
    trained("qwen3_moe", peft.LoraConfig(r=4, target_modules=["down_proj"]), tmp_path)
    file = tmp_path / WEIGHTS
    tensors = load_file(file)
    extra = {
        key.replace("experts.3", "experts.4"): value.clone() for key, value in tensors.items() if "experts.3" in key
    }
    save_file(tensors | extra, file)
    text = refused(tmp_path, "E341")
    assert "experts.4.down_proj" in text


def test_beside_another_and_trained_on(tmp_path):
    truth = trained("qwen3_moe", peft.LoraConfig(r=4, target_modules=["q_proj", *PROJECTIONS["qwen3_moe"]]), tmp_path)
    base = make("qwen3_moe")
    adapted = compiler.apply(base, "adapter other = lora(rank = 2) { on q_proj }")
    adapted.load_adapter(tmp_path, "old", is_trainable=True)
    adapted.set_adapter("old")
    assert_close(logits(adapted.eval()), logits(truth), rtol=0, atol=2e-4)
    adapted(input_ids=IDS, labels=IDS).loss.backward()
    grads = [each.grad for name, each in adapted.named_parameters() if ".old." in name]
    assert grads
    assert all(each is not None and each.abs().sum() > 0 for each in grads)


def test_todays_files_stay_as_they_are(tmp_path):
    """A stack that was adapted as one, the way peft does it today."""
    base = make("qwen3_moe")
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj", "mlp.gate.weight"]
    )
    torch.manual_seed(3)
    wrapped = peft.get_peft_model(make("qwen3_moe"), config).eval()
    with torch.no_grad():
        for each in wrapped.parameters():
            if each.requires_grad:
                each.add_(torch.randn_like(each) * 0.2)
    wrapped.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapted = compiler.load(base, tmp_path).eval()
    assert_close(logits(adapted), logits(wrapped.base_model.model), rtol=0, atol=2e-4)
    assert json.loads((tmp_path / CONFIG).read_text())["target_parameters"]


def test_a_directory_is_left_alone(tmp_path):
    truth = trained("llava", peft.LoraConfig(r=4, target_modules=r"language_model\.model\..*q_proj"), tmp_path)
    before = {each.name: each.read_bytes() for each in Path(tmp_path).iterdir()}
    assert_close(logits(compiler.load(make("llava"), tmp_path).eval()), logits(truth), rtol=0, atol=2e-4)
    assert {each.name: each.read_bytes() for each in Path(tmp_path).iterdir()} == before

"""Today's names, as transformers says them."""

import transformers as hf
from torch import nn

from peftc.passes.plan.earlier import Slot
from peftc.runtime.base.earlier import EarlierNames
from tests import zoo
from tests.zoo import DECODER, TEXT, WIDTHS


def test_renamed():
    vision = hf.CLIPVisionConfig(**WIDTHS, image_size=28, patch_size=14)
    model = hf.LlavaForConditionalGeneration(hf.LlavaConfig(text_config=hf.LlamaConfig(**TEXT), vision_config=vision))
    names = EarlierNames(model)
    today = {
        "language_model.model.layers.0.mlp.up_proj.weight": "model.language_model.layers.0.mlp.up_proj.weight",
        "language_model.lm_head.weight": "lm_head.weight",
        "vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias": "model.vision_tower.encoder.layers.0.mlp.fc1.bias",
    }
    assert {name: names(name).name for name in today} == today
    assert {name: names(name).name for name in model.state_dict()} == {name: name for name in model.state_dict()}


def test_stacked():
    names = EarlierNames(zoo.make("moe"))
    found = names("model.layers.0.mlp.experts.3.up_proj.weight")
    assert found.slot == Slot("model.layers.0.mlp.experts.gate_up_proj", 3, 1, 2)
    assert found.others(2, 0) == "model.layers.0.mlp.experts.2.gate_proj.weight"
    assert names("model.layers.0.mlp.experts.1.down_proj.weight").slot == Slot(
        "model.layers.0.mlp.experts.down_proj", 1
    )


def test_stacked_and_renamed():
    names = EarlierNames(hf.MixtralForCausalLM(hf.MixtralConfig(**DECODER, num_local_experts=4)))
    found = names("model.layers.0.block_sparse_moe.experts.2.w3.weight")
    assert found.slot == Slot("model.layers.0.mlp.experts.gate_up_proj", 2, 1, 2)
    assert found.others(0, 0) == "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    assert names("model.layers.0.block_sparse_moe.gate.weight").name == "model.layers.0.mlp.gate.weight"


def test_what_is_not_transformers():
    assert EarlierNames(nn.Linear(2, 2))("a.weight").name == "a.weight"

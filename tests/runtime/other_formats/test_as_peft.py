"""LoRA files of diffusers and kohya: by their documented keys on a small model, and as diffusers itself writes them."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close

from peftc import compiler


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj_in = nn.Conv2d(4, 6, 3, padding=1)
        self.to_q = nn.Linear(6, 5, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(5, 4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.proj_in(x).flatten(2).mT
        return self.to_out[0](torch.tanh(self.to_q(hidden))).mT.reshape(x.shape)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mid_block = Block()
        self.up_blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.mid_block(x)
        for each in self.up_blocks:
            x = x + each(x)
        return x


X = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(3))
RANKS = {"mid_block.proj_in": (2, 6.0), "mid_block.to_q": (3, 3.0), "up_blocks.1.to_out.0": (2, 1.0)}


def drawn(ranks=RANKS):
    """Tensors of LoRA by module: A, B, alpha; and a model into which they are merged."""
    made, merged = {}, Net().eval()
    torch.manual_seed(7)
    for name, (rank, alpha) in ranks.items():
        weight = merged.get_submodule(name).weight
        a = torch.randn(rank, *weight.shape[1:])
        b = torch.randn(weight.shape[0], rank, *(1,) * (weight.dim() - 2))
        made[name] = (a, b, alpha)
        with torch.no_grad():
            weight += alpha / rank * (b.flatten(1) @ a.flatten(1)).reshape(weight.shape)
    return made, merged


def kohya(made, part="lora_unet_"):
    found = {}
    for name, (a, b, alpha) in made.items():
        flat = part + name.replace(".", "_")
        found |= {f"{flat}.lora_down.weight": a, f"{flat}.lora_up.weight": b, f"{flat}.alpha": torch.tensor(alpha)}
    return found


def diffusers(made, ends, part="unet.", *, alphas=True):
    found = {}
    for name, (a, b, alpha) in made.items():
        found |= {f"{part}{name}{ends[0]}": a, f"{part}{name}{ends[1]}": b}
        found |= {f"{part}{name}.alpha": torch.tensor(alpha)} if alphas else {}
    return {key: each.contiguous() for key, each in found.items()}


ENDS = {
    "peft": (".lora_A.weight", ".lora_B.weight"),
    "down": (".lora.down.weight", ".lora.up.weight"),
    "layer": (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
}


def outputs(model):
    with torch.no_grad():
        return model.eval()(X)


def refused(path, model=None):
    with pytest.raises(compiler.CheckpointError) as caught:
        compiler.load(model or Net(), path)
    (diagnostic,) = caught.value.diagnostics
    return diagnostic


# --- by the documented keys ---


def test_kohya(tmp_path):
    made, merged = drawn()
    save_file(kohya(made), tmp_path / "style.safetensors")
    base = Net()
    for path in (tmp_path / "style.safetensors", tmp_path, str(tmp_path)):  # the file, or a directory with it alone
        adapted = compiler.load(base, path)
        assert_close(outputs(adapted), outputs(merged))
    with pytest.raises(AssertionError):
        assert_close(outputs(adapted), outputs(base))
    adapted.save_pretrained(tmp_path / "again")  # and is an adapter as any other
    assert_close(outputs(compiler.load(base, tmp_path / "again")), outputs(merged))
    assert_close(outputs(adapted.merge_and_unload()), outputs(merged))


@pytest.mark.parametrize("ends", ENDS)
def test_diffusers(tmp_path, ends):
    made, merged = drawn()
    save_file(diffusers(made, ENDS[ends]), tmp_path / "pytorch_lora_weights.safetensors")
    assert_close(outputs(compiler.load(Net(), tmp_path)), outputs(merged))


def test_without_alphas_the_scale_is_one(tmp_path):
    ranks = {name: (rank, float(rank)) for name, (rank, _) in RANKS.items()}
    made, merged = drawn(ranks)
    save_file(diffusers(made, ENDS["peft"], alphas=False), tmp_path / "pytorch_lora_weights.safetensors")
    assert_close(outputs(compiler.load(Net(), tmp_path)), outputs(merged))


def test_processors_of_earlier_releases(tmp_path):
    made, merged = drawn({"mid_block.to_q": (2, 2.0), "mid_block.to_out.0": (2, 2.0)})
    (a, b, _), (c, d, _) = made.values()
    keys = {"to_q_lora.down": a, "to_q_lora.up": b, "to_out_lora.down": c, "to_out_lora.up": d}
    for part in ("unet.", ""):
        found = {f"{part}mid_block.processor.{name}.weight": each for name, each in keys.items()}
        save_file(found, tmp_path / "pytorch_lora_weights.safetensors")
        assert_close(outputs(compiler.load(Net(), tmp_path)), outputs(merged))


def test_the_fields_in_the_metadata(tmp_path):
    made, merged = drawn({"mid_block.to_q": (2, 6.0), "up_blocks.0.to_q": (2, 6.0)})
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["mid_block.to_q", "up_blocks.0.to_q"]}
    text = json.dumps({f"unet.{name}": value for name, value in fields.items()})
    found = diffusers(made, ENDS["peft"], alphas=False)
    save_file(found, tmp_path / "pytorch_lora_weights.safetensors", metadata={"lora_adapter_metadata": text})
    assert_close(outputs(compiler.load(Net(), tmp_path)), outputs(merged))
    save_file(found, tmp_path / "pytorch_lora_weights.safetensors", metadata={"lora_adapter_metadata": "{"})
    assert refused(tmp_path).code == "E303"


def test_what_is_for_another_part_is_told_and_left(tmp_path):
    made, merged = drawn()
    text = {
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(2, 4),
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(4, 2),
    }
    save_file({**kohya(made), **text}, tmp_path / "style.safetensors")
    with pytest.warns(UserWarning, match="also weights for lora_te"):
        adapted = compiler.load(Net(), tmp_path / "style.safetensors")
    assert_close(outputs(adapted), outputs(merged))


def test_two_files_side_by_side_in_one_model(tmp_path):
    made, merged = drawn()
    save_file(kohya(made), tmp_path / "a.safetensors")
    save_file(diffusers(made, ENDS["down"]), tmp_path / "b.safetensors")
    adapted = compiler.load(Net(), tmp_path / "a.safetensors", adapter_name="a")
    adapted.load_adapter(tmp_path / "b.safetensors", "b")
    adapted.set_adapter("b")
    assert_close(outputs(adapted), outputs(merged))
    assert "several files" in refused(tmp_path).message


# --- refused ---


@pytest.mark.parametrize(
    ("keys", "code", "message"),
    [
        (("blocks.0.weight",), "E370", "of no format that is known"),
        (("lora_unet_mid_block_to_q.hada_w1_a",), "E371", "LoHa"),
        (("lora_unet_mid_block_to_q.lokr_w1",), "E371", "LoKr"),
        (("lora_unet_mid_block_to_q.lora_down.weight", "lora_unet_mid_block_to_q.dora_scale"), "E371", "DoRA"),
        (("lora_unet_mid_block_to_q.lora_down.weight", "lora_unet_mid_block_to_q.strange"), "E371", "strange"),
        (("lora_unet_input_blocks_1_1_to_q.lora_down.weight",), "E372", "weights for lora_unet"),
        (("lora_unet_mid_block_to_q.lora_down.weight",), "E372", "weights for lora_unet"),  # its other half is missing
        (("text_encoder.layers.0.fc1.lora_A.weight",), "E372", "weights for text_encoder"),
    ],
)
def test_what_is_not_read_is_named(tmp_path, keys, code, message):
    save_file({each: torch.ones(2, 6) for each in keys}, tmp_path / "x.safetensors")
    model = Net()
    found = refused(tmp_path / "x.safetensors", model)
    assert found.code == code
    assert message in found.message
    assert "x.safetensors" in found.where
    assert type(model) is Net


def test_a_module_of_another_size_is_none_of_the_file_s(tmp_path):
    made, _ = drawn()
    a, b, alpha = made["mid_block.to_q"]
    save_file(kohya({**made, "mid_block.to_q": (torch.ones(3, 7), b, alpha)}), tmp_path / "x.safetensors")
    found = refused(tmp_path / "x.safetensors")
    assert found.code == "E372"
    assert "mid_block_to_q" in found.help
    assert a.shape == (3, 6)


def test_two_parts_that_fit_are_not_guessed_between(tmp_path):
    made, _ = drawn()
    both = {**kohya(made, "lora_te1_"), **kohya(made, "lora_te2_")}
    save_file({key: each.clone() for key, each in both.items()}, tmp_path / "x.safetensors")
    assert "lora_te1 and lora_te2 both fit" in refused(tmp_path / "x.safetensors").message


def test_a_damaged_file_and_a_pickle(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    assert refused(tmp_path / "x.safetensors").code == "E307"
    torch.save({}, tmp_path / "x.bin")
    assert refused(tmp_path / "x.bin").code == "E301"


def test_commands_that_need_no_model_say_what_it_is(tmp_path):
    made, _ = drawn()
    save_file(diffusers(made, ENDS["peft"]), tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(compiler.CheckpointError, match="another library's file"):
        compiler.inspect(tmp_path)


# --- PEFT's own layout, with what other trainers add to it ---


def test_configs_of_ms_swift_and_unsloth(tmp_path):
    """Both write PEFT's files: ms-swift with fields of its own, unsloth with a regular expression for the targets."""
    import peft

    theirs = peft.get_peft_model(
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), peft.LoraConfig(r=2, target_modules=["0", "1"])
    )
    with torch.no_grad():
        for each in theirs.parameters():
            each.add_(torch.randn_like(each) * 0.3)
    theirs.save_pretrained(tmp_path)
    base = theirs.get_base_model()
    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    plain.load_state_dict(
        {name: base.get_submodule(name[0]).base_layer.state_dict()[name[2:]] for name in plain.state_dict()}
    )
    written = tmp_path / "adapter_config.json"
    fields = json.loads(written.read_text())
    fields |= {"lora_dtype": None, "lorap_lr_ratio": None, "lorap_emb_lr": 1e-06}
    layers = r"\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|k_proj))"
    fields["target_modules"] = rf"(?:.*?(?:0|1|language|text).*?)|(?:{layers})"
    written.write_text(json.dumps(fields))
    x = torch.randn(3, 4)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        assert_close(compiler.load(plain, tmp_path).eval()(x), theirs.eval()(x))


# --- as diffusers writes them ---

THEIRS = Path(__file__).with_name("written_by_diffusers.py")


@pytest.mark.skipif(
    subprocess.run([sys.executable, "-c", "import diffusers"], capture_output=True).returncode != 0,
    reason="diffusers is not installed",
)
@pytest.mark.parametrize("case", ["peft_keys", "old_keys", "metadata", "kohya", "text_encoder"])
def test_files_that_diffusers_wrote(tmp_path, case):
    """In a process of its own: diffusers changes classes of transformers when it is imported."""
    done = subprocess.run([sys.executable, str(THEIRS), case, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]

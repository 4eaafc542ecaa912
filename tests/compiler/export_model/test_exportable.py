"""Merged checkpoints: what transformers would have saved, written weight by weight, complete or not at all."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from peftc import compiler
from peftc.compiler import UsageError
from peftc.runtime.files.tensor_file import TYPES, Entry, write_tensors
from peftc.runtime.model import merging
from tests.compiler.commands.cli_help import peftc
from tests.matrix import wide

LORA = "adapter a = lora(rank = 4) { on all linear }"


def llama(**options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        **options,
    )
    return transformers.LlamaForCausalLM(config).eval()


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=128, n_positions=64)
    return transformers.GPT2LMHeadModel(config).eval()


def moe():
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        hidden_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        num_experts=4,
        num_experts_per_tok=2,
        head_dim=16,
    )
    return transformers.Qwen3MoeForCausalLM(config).eval()


def adapted(model, spec=LORA):
    made = compiler.apply(model, spec)
    for each in made.adapter_bank.parameters():
        nn.init.normal_(each, std=0.1)
    return made.eval()


# A model, a spec, and whether its weights are merged one after the other.
CASES = {
    "llama": (llama, LORA, True),
    "llama, in bfloat16": (lambda: llama().to(torch.bfloat16), LORA, True),
    "llama, tied": (lambda: llama(tie_word_embeddings=True), LORA, True),
    "gpt2, transposed and tied": (gpt2, "adapter a = dora(rank = 4) { on c_attn, c_fc, c_proj }", True),
    "llama, no bias to scale": (llama, "adapter a = ia3 { on k_proj, down_proj }", True),
    "two adapters": (llama, f"{LORA} adapter b = lora(rank = 2) {{ on q_proj }} activate a + 0.5 * b", True),
    "a trained copy": (llama, "adapter a = lora(rank = 4) { on q_proj  train lm_head }", False),
    "a tied weight, once": (lambda: llama(tie_word_embeddings=True), "adapter a = lora { on lm_head }", False),
    "other tensors in the file": (moe, LORA, False),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_as_transformers_would_save_it(case, tmp_path, monkeypatch):
    make, spec, streamed = CASES[case]
    made = adapted(make(), spec)
    found = []
    monkeypatch.setattr(merging, "can_stream", lambda *given: found.append(can_stream(*given)) or found[-1])
    files = made.export(tmp_path / "ours", max_shard_size="60KB")
    assert found == [streamed]
    plain = made.merge_and_unload()
    plain.save_pretrained(tmp_path / "theirs", max_shard_size="60KB")
    written = {each.name for each in (tmp_path / "theirs").iterdir()}
    assert set(files) == written | {"manifest.json"}
    assert sum(each.endswith(".safetensors") for each in written) > 1
    for name in written:
        ours, theirs = tmp_path / "ours" / name, tmp_path / "theirs" / name
        if name.endswith(".json"):
            assert json.loads(ours.read_text()) == json.loads(theirs.read_text()), name
        else:
            left, right = load_file(ours), load_file(theirs)
            assert left.keys() == right.keys()
            assert all(left[key].dtype == right[key].dtype and torch.equal(left[key], right[key]) for key in left)
    again, wanted = (type(plain).from_pretrained(tmp_path / each).eval() for each in ("ours", "theirs"))
    ids = torch.arange(12)[None] + 5
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, wanted(input_ids=ids).logits)


can_stream = merging.can_stream


def test_the_manifest(tmp_path):
    made = adapted(llama())
    files = made.export(tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["merged"]["a"]["method"] == "lora"
    assert compiler.read_spec(manifest["merged"]["a"]["spec"]).adapters[0].name == "a"
    assert manifest["model"] == {
        "architecture": "LlamaForCausalLM",
        "id": None,
        "revision": None,
        "fingerprint": made.base_fingerprint(),
    }
    assert set(manifest["files"]) == set(files) - {"manifest.json"}
    for name, facts in manifest["files"].items():
        content = (tmp_path / "out" / name).read_bytes()
        assert facts == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_the_model_stays_as_it_is(tmp_path):
    base = llama()
    made = adapted(base)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    ids = torch.arange(6)[None]
    wanted = made(input_ids=ids).logits
    made.export(tmp_path / "out")
    assert torch.equal(made(input_ids=ids).logits, wanted)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    made.merge_adapter()
    made.export(tmp_path / "merged")
    one, other = (load_file(tmp_path / each / "model.safetensors") for each in ("out", "merged"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_of_a_quantized_base(tmp_path):
    spec = f"base {{ quantize = nf4(double_quant = true) }} {LORA}"
    made = adapted(llama(), spec)
    with pytest.raises(UsageError, match="E523"):
        made.export(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    made.export(tmp_path / "out", quantized="dequantize")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(plain.model.layers[0].mlp.up_proj) is nn.Linear
    wanted = made.merge_and_unload(quantized="dequantize").state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in plain.state_dict().items())


@pytest.mark.filterwarnings("ignore")
def test_refused(tmp_path):
    made = adapted(llama())
    target = tmp_path / "out"
    with pytest.raises(UsageError, match="E522"):
        adapted(llama(), "adapter a = prefix(length = 2)").export(target)
    with pytest.raises(UsageError, match="E591"):
        adapted(nn.Sequential(nn.Linear(4, 4)), "adapter a = lora(rank = 2) { on all linear }").export(target)
    with torch.no_grad():
        made.adapter_bank.a.model__layers__1__mlp__down_proj.B[0, 0] = torch.nan
    with pytest.raises(UsageError, match="E520"):
        made.export(target, safe_merge=True, max_shard_size="60KB")
    assert list(tmp_path.iterdir()) == [], "nothing is left of what was begun"
    target.mkdir()
    (target / "mine.txt").write_text("kept")
    with pytest.raises(UsageError, match="E551"):
        made.export(target)
    assert (target / "mine.txt").read_text() == "kept"
    made.export(target, force=True)
    made.export(target)  # an unchanged earlier export
    assert not (target / "mine.txt").exists()
    made.delete_adapter("a")
    with pytest.raises(UsageError, match="E525"):
        made.export(tmp_path / "other")


KILLED = """
import sys, torch, transformers
from peftc import compiler
torch.manual_seed(0)
config = transformers.LlamaConfig(hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4,
                                  vocab_size=2000)
made = compiler.apply(transformers.LlamaForCausalLM(config), "adapter a = lora { on all linear }")
print("ready", flush=True)
for _ in sys.stdin:
    made.export(sys.argv[1], max_shard_size="4MB", force=True)
    print("done", flush=True)
"""


@pytest.mark.parametrize("part", wide([0.1, 0.3, 0.5, 0.7, 0.9, 1.0], ["0.5"]))
def test_killed_at_any_moment_it_leaves_nothing_half_written(part, tmp_path):
    target = tmp_path / "out"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}

    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(target)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    )
    assert process.stdout.readline() == "ready\n"
    begun = time.monotonic()
    process.stdin.write("go\n")
    process.stdin.flush()
    assert process.stdout.readline() == "done\n"
    taken = time.monotonic() - begun
    complete = {each.name: each.read_bytes() for each in target.iterdir()}
    assert sum(name.endswith(".safetensors") for name in complete) > 3
    process.stdin.write("go\n")
    process.stdin.flush()
    time.sleep(part * taken)
    process.send_signal(signal.SIGKILL)
    process.wait()
    held = {each.name: each.read_bytes() for each in target.iterdir()} if target.exists() else {}
    assert held in ({}, complete), "what is under the name is whole"


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = llama()
    base.save_pretrained("base")
    made = adapted(base)
    made.save_pretrained("adapter")
    done = peftc("export", "adapter", "base", "-o", "out", "--max-shard-size", "60KB", "--json")
    assert done.code == 0, done.err
    facts = json.loads(done.out)
    assert facts["directory"] == "out"
    assert facts["adapters"] == ["default"]
    assert set(facts["files"]) == {each.name for each in Path("out").iterdir()}
    again = transformers.AutoModelForCausalLM.from_pretrained("out").eval()
    ids = torch.arange(9)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, made(input_ids=ids).logits, rtol=0, atol=1e-5)
    done = peftc("export", "adapter", "base", "-o", "out")
    assert "default, merged" in done.out
    assert "out, 4 files, " in done.out
    spec = Path("packed.adapter")
    spec.write_text(f"base {{ quantize = int8() }} {LORA}")
    done = peftc("export", "packed.adapter", "base", "-o", "packed")
    assert done.code == 1
    assert "--quantized requantize" in done.err
    assert not Path("packed").exists()


# --- the file ---


def test_every_type_is_read_again(tmp_path):
    values = {str(kind).removeprefix("torch."): torch.arange(6).reshape(2, 3).to(kind) for kind in TYPES}
    values |= {"empty": torch.zeros(0, 4), "number": torch.tensor(3.5), "view": torch.arange(12.0).reshape(3, 4).T}
    entries = [Entry(name, each.dtype, tuple(each.shape), lambda each=each: each) for name, each in values.items()]
    write_tensors(tmp_path / "all.safetensors", entries)
    with safe_open(tmp_path / "all.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(values)
        for name, wanted in values.items():
            found = file.get_tensor(name)
            assert found.dtype == wanted.dtype
            assert found.shape == wanted.shape
            assert torch.equal(
                found.contiguous().view(-1).view(torch.uint8), wanted.contiguous().view(-1).view(torch.uint8)
            )

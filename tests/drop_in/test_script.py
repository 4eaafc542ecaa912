"""A script for PEFT with only its import changed, from training to the Hub and back, against PEFT's own run of it."""

import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

from tests.drop_in.hub import hub

SCRIPT = Path(__file__).parent / "script.py"


def run(package, kind, directory, address):
    directory.mkdir()
    own = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_x", "HF_HUB_DISABLE_XET": "1"}
    own |= {"HF_HOME": str(directory / "home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, str(SCRIPT), package, kind, str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | own)
    assert done.returncode == 0, done.stderr[-3000:]
    printed = [line for line in done.stdout.splitlines() if line.startswith("trainable params")]
    return load_file(directory / "found.safetensors"), printed


@pytest.mark.parametrize("kind", ["causal", "classifier", "seq2seq", "images"])
def test_only_the_import_is_changed(kind, tmp_path):
    with hub() as server:
        theirs, told = run("peft", kind, tmp_path / "theirs", server.address)
        ours, said = run("peftc.peft", kind, tmp_path / "ours", server.address)
        assert server.files[f"me/{kind}-peftc-peft"].keys() >= server.files[f"me/{kind}-peft"].keys() - {
            ".gitattributes"
        }
    assert said == told != []
    assert ours.keys() == theirs.keys()
    for name, wanted in theirs.items():
        torch.testing.assert_close(
            ours[name], wanted, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert (ours["trained"] - ours["start"]).abs().max() > 1e-2
    for name in ("loaded", "merged", "downloaded"):
        torch.testing.assert_close(ours[name], ours["trained"], rtol=1e-4, atol=1e-4)
    assert torch.equal(ours["disabled"], ours["start"])


def test_what_is_pushed_peft_reads(tmp_path):
    with hub() as server:
        ours, _ = run("peftc.peft", "causal", tmp_path / "ours", server.address)
        files = server.files["me/causal-peftc-peft"]
    for path, content in files.items():
        (tmp_path / path).write_bytes(content)
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    base = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()
    read = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    ids = torch.tensor([[1, 5, 9, 17, 23], [2, 3, 4, 40, 41]])
    with torch.no_grad():
        torch.testing.assert_close(read(ids).logits, ours["trained"], rtol=1e-4, atol=1e-4)
    assert b"library_name: peft" in files["README.md"]

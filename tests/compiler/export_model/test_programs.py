"""`peftc export` and `compiler.export`: what they name, load and say. What programs compute is tested in parity."""

import json
import os
import re
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from torch import nn

from peftc import compiler
from peftc.compiler import CheckpointError, UsageError
from peftc.compiler.export_model.export_options import ExportOptions
from peftc.compiler.export_model.output import check_target
from tests.compiler.commands.cli_help import peftc
from tests.torch_only import read_bank

CLAUSES = "on q_proj, v_proj"
IDS = torch.arange(3, 12)[None]


def draw(model, seed):
    torch.manual_seed(seed)
    for each in model.adapter_bank.parameters():
        nn.init.normal_(each, std=0.3)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a base, its tokenizer, and two checkpoints for it."""
    place = tmp_path_factory.mktemp("place")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    base = transformers.LlamaForCausalLM(config).eval()
    base.save_pretrained(place / "base")
    words = {**{f"w{index}": index for index in range(63)}, "<unk>": 63}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>").save_pretrained(place / "base")
    adapted = compiler.apply(base, f"adapter a = lora(rank = 2) {{ {CLAUSES} }}")
    for seed, name in enumerate(("a", "b")):
        draw(adapted, seed)
        adapted.save_pretrained(place / name)
    return place


@pytest.fixture
def here(place, monkeypatch, tmp_path):
    """Inside of it, with a directory to write to."""
    monkeypatch.chdir(place)
    return tmp_path


def logits(*names):
    """Of the base with these checkpoints, active together."""
    adapted = compiler.load(transformers.AutoModelForCausalLM.from_pretrained("base"), names[0]).eval()
    for each in names[1:]:
        adapted.load_adapter(each, each)
    adapted.set_adapter(["default", *names[1:]])
    with torch.no_grad():
        return adapted(input_ids=IDS).logits


def ran(directory, **inputs):
    module = torch.export.load(directory / "forward.pt2").module()
    return module(input_ids=IDS, attention_mask=torch.ones_like(IDS), **inputs)["logits"]


def test_several_checkpoints_routed(here):
    out = here / "out"
    done = peftc("export", "a", "base", "--also", "b=b", "-o", out, "--format", "pt2", "--adapters", "routed",
                 "--entry", "forward")  # fmt: skip
    assert done.code == 0, done.err
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["artifact"]["adapter_names"] == ["default", "b"]
    assert {name: each["method"] for name, each in manifest["adapters"].items()} == {"default": "lora", "b": "lora"}
    assert "merged" not in manifest
    assert (out / "tokenizer.json").exists()
    for index, name in enumerate(("a", "b")):
        found = ran(out, adapter_ids=torch.tensor([index]), bank=read_bank(out))
        torch.testing.assert_close(found, logits(name), rtol=0, atol=1e-5)


def test_what_the_command_says_of_a_base_without_a_tokenizer(place, tmp_path, monkeypatch, golden):
    monkeypatch.chdir(tmp_path)
    Path("bare").mkdir()
    for each in ("config.json", "model.safetensors"):
        Path("bare", each).write_bytes((place / "base" / each).read_bytes())
    command = ["export", f"first={place}/a", "bare", "--also", f"second={place}/b", "-o", "out", "--format", "pt2"]
    limits = ["--max-batch-size", 4, "--max-length", 32, "--max-drift", 1e-3, "--min-agreement", 0.5]
    done = peftc(*command, "--adapters", "inputs", *limits)
    assert done.code == 0, done.err
    assert "no tokenizer" in done.err
    assert "--ids" in done.err
    assert not list(Path("out").glob("tokenizer*"))
    said, drift = re.sub(r"[\d.]+ kB", "SIZE", done.out).split("drift ")
    assert "of the largest; 100 % of choices the same" in drift
    golden("cli/export_inputs.txt", "\n".join(line.rstrip() for line in said.splitlines()) + "\n")
    artifact = json.loads(Path("out", "manifest.json").read_text())["artifact"]
    assert artifact["adapter_files"] == {"first": "adapters/first.safetensors", "second": "adapters/second.safetensors"}


def test_the_facts(here):
    out = here / "out"
    done = peftc("export", "a", "base", "-o", out, "--format", "pt2", "--entry", "forward", "--json")
    assert done.code == 0, done.err
    facts = done.json
    assert facts["directory"] == str(out)
    assert (facts["format"], facts["adapters"], facts["placed"]) == ("pt2", ["default"], "merged")
    assert set(facts["files"]) == {each.name for each in out.iterdir()}
    assert facts["bytes"] == sum(each.stat().st_size for each in out.iterdir() if each.name != "manifest.json")
    (entry,) = facts["entries"]
    assert (entry["name"], entry["file"]) == ("forward", "forward.pt2")
    assert entry["inputs"] == {"input_ids": ["batch", "sequence"], "attention_mask": ["batch", "sequence"]}
    assert entry["outputs"] == {"logits": ["batch", "sequence", 64]}
    assert facts["dimensions"]["batch"] == {"min": 1, "max": None}
    assert facts["drift"]["relative"] < 1e-5
    assert facts["drift"]["agreement"] == 1
    assert facts["tokenizer"]
    torch.testing.assert_close(ran(out), logits("a"), rtol=0, atol=1e-5)


def test_checkpoints_merged_together_and_one_of_them(here):
    for options, names in (((), ("a", "b")), (("--adapter", "b"), ("b",))):
        out = here / f"out{len(options)}"
        done = peftc("export", "a", "base", "--also", "b=b", "-o", out, *options, "--json")
        assert done.code == 0, done.err
        assert done.json["adapters"] == (["default", "b"] if len(names) == 2 else ["b"])
        assert "tokenizer.json" in done.json["files"], "a checkpoint has its tokenizer beside it"
        plain = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
        with torch.no_grad():
            torch.testing.assert_close(plain(IDS).logits, logits(*names), rtol=0, atol=1e-5)


def weighted(weights):
    """The logits of the base with these checkpoints active, with weights."""
    adapted = compiler.load(transformers.AutoModelForCausalLM.from_pretrained("base"), "a", adapter_name="a").eval()
    adapted.load_adapter("b", "b")
    adapted.set_adapter(weights)
    with torch.no_grad():
        return adapted(input_ids=IDS).logits


def test_weights_of_what_is_merged(here):
    wanted = weighted({"a": 0.7, "b": -0.3})
    assert not torch.allclose(wanted, weighted({"a": 1, "b": 1}), atol=1e-3)
    given = ("a=a", "base", "--also", "b=b", "--adapter", "a=0.7", "--adapter", "b=-.3")
    done = peftc("export", *given, "-o", here / "checkpoint")
    assert done.code == 0, done.err
    assert "0.7 * a + -0.3 * b, merged" in done.out
    with torch.no_grad():
        plain = transformers.AutoModelForCausalLM.from_pretrained(here / "checkpoint").eval()(IDS).logits
    torch.testing.assert_close(plain, wanted, rtol=0, atol=1e-5)
    done = peftc("export", *given, "-o", here / "out", "--format", "pt2", "--entry", "forward", "--json")
    assert done.json["weights"] == {"a": 0.7, "b": -0.3}
    torch.testing.assert_close(ran(here / "out"), wanted, rtol=0, atol=1e-5)
    merged = json.loads((here / "out" / "manifest.json").read_text())["merged"]
    assert {name: each["weight"] for name, each in merged.items()} == {"a": 0.7, "b": -0.3}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--adapter", "a=1", "--adapter", "a"), "'a' is named twice"),
        (("--adapter", "a=0.5", "--format", "pt2", "--adapters", "routed"), "what is not merged has no weight"),
        (
            (
                "--adapter",
                "c=0.5",
            ),
            "E510",
        ),
    ],
)
def test_weights_that_mean_nothing(here, options, message):
    done = peftc("export", "a=a", "base", "--also", "b=b", "-o", here / "out", *options)
    assert done.code != 0
    assert message in " ".join(done.err.replace("│", " ").split())
    assert not (here / "out").exists()


@pytest.mark.parametrize("program", [{}, {"format": "pt2", "entry": "forward", "max_drift": 1e-4}])
def test_what_is_merged_is_said_and_nothing_else_changes(here, program):
    adapted = compiler.load(transformers.AutoModelForCausalLM.from_pretrained("base"), "a", adapter_name="a").eval()
    adapted.load_adapter("b", "b", is_trainable=True)
    state = adapted._adapter_state
    trained = {name for name, each in adapted.named_parameters() if each.requires_grad}
    before = state.active, {name: id(each) for name, each in adapted.state_dict(keep_vars=True).items()}
    with torch.no_grad():
        own = adapted.eval()(input_ids=IDS).logits
    adapted.export(here / "out", adapter_names={"b": 0.5}, **program)
    assert before == (state.active, {name: id(each) for name, each in adapted.state_dict(keep_vars=True).items()})
    assert trained == {name for name, each in adapted.named_parameters() if each.requires_grad}
    with torch.no_grad():
        assert torch.equal(adapted(input_ids=IDS).logits, own)
        if program:
            found = ran(here / "out")
        else:
            found = transformers.AutoModelForCausalLM.from_pretrained(here / "out").eval()(IDS).logits
    torch.testing.assert_close(found, weighted({"b": 0.5}), rtol=0, atol=1e-5)
    with pytest.raises(UsageError, match="E510"):
        adapted.export(here / "none", adapter_names=["zz"], **program)
    adapted.merge_adapter()
    with pytest.raises(UsageError, match=r"E516.*which adapters are to be is said"):
        adapted.export(here / "none", adapter_names=["b"], **program)
    assert not (here / "none").exists()


def test_the_twin_takes_a_mapping(here):
    found = compiler.find_model("base")
    facts = compiler.export({"x": "a", "y": "b"}, found, here / "out", adapter_names="y")
    assert facts.adapters == ("y",)
    assert facts.placed == "merged"
    with pytest.raises(UsageError, match="E525"):
        compiler.export({}, found, here / "none")
    with pytest.raises(UsageError, match="E640"):
        compiler.export("a", found, here / "none", format="pt2", max_shard_size="1GB")
    assert not (here / "none").exists()


def test_no_tokenizer_is_made_up(here):
    """GPT-2's class makes one without any tokens where its files are not."""
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2, n_positions=64
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(here / "gpt2")
    spec = here / "spec.adapter"
    spec.write_text("adapter a = lora(rank = 2)")
    assert peftc("export", spec, here / "gpt2", "-o", here / "out").code == 0
    assert not list((here / "out").glob("tokenizer*"))


def test_a_module_of_a_factory(here, monkeypatch):
    """Its example inputs have places, and a program's inputs have names."""
    monkeypatch.chdir(here)
    Path("factories.py").write_text((Path(__file__).parents[1] / "factories.py").read_text())
    Path("net.adapter").write_text("adapter a = lora(rank = 2) { on first, second }")
    done = peftc("export", "net.adapter", "factories:good", "-o", "out", "--format", "pt2", "--json")
    sys.modules.pop("factories")
    assert done.code == 0, done.out
    assert done.json["entries"][0]["inputs"] == {"x": ["batch", 8]}
    (output,) = torch.export.load("out/forward.pt2").module()(x=torch.ones(5, 8)).values()
    assert output.shape == (5, 4)


def test_the_drift_of_a_checkpoint_is_measured_where_it_has_a_limit(here):
    done = peftc("export", "a", "base", "-o", here / "out", "--min-agreement", 1, "--json")
    assert done.code == 0, done.err
    assert done.json["drift"]["agreement"] == 1
    assert json.loads((here / "out" / "manifest.json").read_text())["drift"]["inputs"] == "drawn"
    adapted = compiler.load(transformers.AutoModelForCausalLM.from_pretrained("base"), "a").to(torch.bfloat16)
    with pytest.raises(UsageError, match="E648"):
        adapted.export(here / "rounded", max_drift=0.0)
    assert not (here / "rounded").exists()


# --- adapters that come later ---


def test_adapters_added_to_an_artifact(here):
    out = here / "out"
    done = peftc("export", "a", "base", "-o", out, "--format", "pt2", "--adapters", "inputs", "--entry", "forward")
    assert done.code == 0, done.err
    program = (out / "forward.pt2").read_bytes()
    done = peftc("export", "late=b", "base", "--into", out, "--json")
    assert done.json == {"directory": str(out), "files": ["adapters/late.safetensors"]}, done.err
    assert (out / "forward.pt2").read_bytes() == program
    artifact = compiler.Artifact.load(out)  # every file is what the manifest says
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    for name, checkpoint in (("default", "a"), ("late", "b")):
        found = artifact("forward", {**inputs, "adapter": artifact.adapter(name)})["logits"]
        torch.testing.assert_close(found, logits(checkpoint), rtol=0, atol=1e-5)
    manifest = json.loads((out / "manifest.json").read_text())
    assert set(manifest["adapters"]) == {"default", "late"}
    assert check_target(out) is None  # still an unchanged export


def test_adapters_that_cannot_be_added(here):
    base = transformers.AutoModelForCausalLM.from_pretrained("base")
    adapted = compiler.apply(base, LATE)
    adapted.export(here / "out", format="pt2", adapters="inputs", entry="forward", adapter_names="first")
    before = {each.name: each.read_bytes() for each in (here / "out").rglob("*") if each.is_file()}
    for name, reason in (("wide", "float32"), ("more", "adapts model.layers.0.self_attn.k_proj too"), ("ia3", "no ")):
        with pytest.raises(UsageError, match=f"E646.*{reason}"):
            adapted.export_adapters(here / "out", name)
    with pytest.raises(UsageError, match="E511"):
        adapted.export_adapters(here / "out", "first")
    with pytest.raises(UsageError, match="E510"):
        adapted.export_adapters(here / "out", "frist")
    torch.manual_seed(1)
    other = compiler.apply(type(base)(base.config), "adapter late = lora(rank = 2) { on q_proj, v_proj }")
    with pytest.raises(UsageError, match=r"E654.*another base"):
        other.export_adapters(here / "out")
    assert {each.name: each.read_bytes() for each in (here / "out").rglob("*") if each.is_file()} == before
    with torch.no_grad():
        adapted.adapter_bank.first.get_parameter("model__layers__0__self_attn__q_proj.B").fill_(1)
    assert adapted.export_adapters(here / "out", "first", force=True) == ("adapters/first-1.safetensors",)
    replaced = compiler.Artifact.load(here / "out").adapter("first")
    assert (replaced["model.layers.0.self_attn.q_proj.B"] == 1).all()
    assert [each.name for each in (here / "out" / "adapters").iterdir()] == ["first-1.safetensors"]
    adapted.export(here / "merged", format="pt2", entry="forward")
    with pytest.raises(UsageError, match="E640"):
        adapted.export_adapters(here / "merged", "first")
    with pytest.raises(CheckpointError, match="E600"):
        adapted.export_adapters("a", "first")


# --- what is refused before anything is loaded ---

LATE = """
adapter first = lora(rank = 2) { on q_proj, v_proj }
adapter wide = lora(rank = 4) { on q_proj, v_proj }
adapter more = lora(rank = 2) { on q_proj, v_proj, k_proj }
adapter ia3 = ia3
activate first
"""

REFUSED = {
    "an entry of a checkpoint": ("--entry", "forward"),
    "a batch of a checkpoint": ("--max-batch-size", 2),
    "a length of a checkpoint": ("--max-length", 2),
    "inputs of a checkpoint": ("--adapters", "inputs"),
    "shards of programs": ("--format", "pt2", "--max-shard-size", "1GB"),
    "a safe merge of what is not merged": ("--format", "pt2", "--adapters", "routed", "--safe-merge"),
    "an unknown format": ("--format", "torch"),
    "no rows": ("--format", "pt2", "--max-batch-size", 0),
    "no tokens": ("--format", "pt2", "--max-length", 0),
    "a share above one": ("--format", "pt2", "--min-agreement", 99),
    "a drift below zero": ("--format", "pt2", "--max-drift", -1),
    "a place to add to beside one to write": ("--into", "a"),
    "a checkpoint without a name": ("--also", "b"),
    "a name twice": ("--also", "default=b"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, here):
    done = peftc("export", "a", "base", "-o", here / "out", *REFUSED[case], "--json")
    assert done.code == 2, done.out
    assert done.codes == ["usage"]
    assert not (here / "out").exists()


def test_a_checkpoint_beside_a_spec(here):
    spec = here / "spec.adapter"
    spec.write_text("adapter a = lora(rank = 2)")
    done = peftc("export", spec, "base", "--also", "b=b", "-o", here / "out")
    assert done.code == 2
    assert "a spec names all of its" in done.err


def test_the_options_that_have_a_meaning():
    limits = {"max_drift": 0.1, "min_agreement": 0.9}
    assert ExportOptions(max_shard_size="1GB", safe_merge=True, **limits).unmeant() is None
    every = {"entry": "forward", "max_batch_size": 1, "max_length": 9, "example_inputs": {"x": 1}, **limits}
    assert ExportOptions("pt2", **every, safe_merge=True).unmeant() is None
    assert ExportOptions("onnx", "routed", **every, adapter_names=["a"]).unmeant() is None


def test_a_name_that_is_a_directory(here, monkeypatch):
    """`x=y` is a directory's name first."""
    monkeypatch.chdir(here)
    (here / "x=y").mkdir()
    done = peftc("export", "x=y", "nowhere", "-o", "out", "--json")
    assert done.codes == ["E302"]
    assert done.json["errors"][0]["file"] == "x=y"


# --- what stands in the way ---


@pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
def test_a_format_that_is_not_installed(missing, here, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)  # as if it were not
    done = peftc("export", "a", "base", "-o", here / "out", "--format", "onnx", "--json")
    assert done.code == 1
    assert done.codes == ["E652"]
    assert missing in done.json["errors"][0]["message"]
    assert list(here.iterdir()) == []


def test_a_directory_that_holds_something_else(here):
    (here / "out").mkdir()
    (here / "out" / "mine.txt").write_text("kept")
    command = ("export", "a", "base", "-o", here / "out", "--json")
    done = peftc(*command)
    assert (done.code, done.codes) == (3, ["E551"])
    assert [each.name for each in here.rglob("*")] == ["out", "mine.txt"]
    assert peftc(*command, "--force").code == 0
    assert not (here / "out" / "mine.txt").exists()


@contextmanager
def as_nobody():
    """Root may write anywhere."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_place_that_is_read_only():
    adapted = compiler.apply(nn.Sequential(nn.Linear(4, 4)), "adapter a = lora(rank = 2) { on all linear }")
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        place.chmod(0o555)
        with as_nobody(), pytest.raises(UsageError, match=r"E550.*cannot write: Permission denied"):
            adapted.export(place / "out", format="pt2", example_inputs={"input": torch.ones(2, 4)})
        assert list(place.iterdir()) == []
        place.chmod(0o755)
        adapted.export(place / "out", format="pt2", example_inputs={"input": torch.ones(2, 4)})
        assert (place / "out" / "forward.pt2").exists()

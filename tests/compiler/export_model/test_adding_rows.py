"""Adapters that come to an artifact later, held against the live model with that adapter alone."""

import json

import pytest
import torch
import transformers
from torch import nn
from torch.testing import assert_close

from peftc import compiler
from peftc.compiler import Artifact, UsageError
from tests.compiler.commands.cli_help import peftc
from tests.compiler.export_model.routed import (
    BASE,
    IDS,
    adapted,
    check_rows,
    contents,
    draw,
    export,
    given,
    llama,
    spec,
)
from tests.matrix import wide
from tests.torch_only import TorchOnly

# Of which the first is exported; the others come later.
LATER = {
    "ranks": (
        "lora(rank = 4) { on q_proj, v_proj }",
        "lora(rank = 2, alpha = 7) { on q_proj, v_proj }",
        "lora(rank = 4) { on v_proj }",
        "lora(rank = 1) { on layers[1].self_attn.q_proj }",
    ),
    "products": ("loha(rank = 4) { on q_proj, v_proj }", "loha(rank = 2) { on v_proj }"),
    "scales": ("ia3 { on k_proj, down_proj }", "ia3 { on down_proj }"),
    "norms of weights": ("dora(rank = 2) { on q_proj, v_proj }", "dora(rank = 2) { on v_proj }"),
    "shared projections": ("vera(rank = 4) { on q_proj, v_proj }", "vera(rank = 4) { on v_proj }"),
    "rotations": ("oft(block = 4) { on q_proj, o_proj }", "oft(block = 4) { on o_proj }"),
    "copies": ("lora(rank = 2) { on q_proj  train lm_head, norm }", "lora(rank = 1) { on q_proj  train norm }"),
    "tokens": ("lora(rank = 2) { on q_proj  tokens [5, 9, 4] }", "lora(rank = 2) { on q_proj  tokens [7] }"),
    "prompts": ("prompt(length = 2)", "prompt(length = 2)"),
}


@pytest.mark.parametrize("case", wide(LATER, ("ranks", "scales", "norms of weights", "shared projections")))
def test_one_that_comes_later(case, tmp_path):
    made = adapted(spec(*LATER[case]))
    directory = export(made, tmp_path / "out", "a")
    program = (directory / "forward.pt2").read_bytes()
    later = list("bcd"[: len(LATER[case]) - 1])
    assert made.export_adapters(directory, later) == tuple(f"adapters/{name}.safetensors" for name in later)
    assert (directory / "forward.pt2").read_bytes() == program
    check_rows(made, directory, [*later, *([BASE] if case != "prompts" else []), "a"])


def test_up_to_the_rank_that_there_is_room_for(tmp_path):
    made = adapted(
        spec("lora(rank = 2) { on q_proj, v_proj }", "lora(rank = 8) { on q_proj }", "lora(rank = 9) { on q_proj }")
    )
    directory = export(made, tmp_path / "out", "a", rank=8)
    made.export_adapters(directory, "b")
    check_rows(made, directory, ["b", BASE, "a"])
    before = contents(directory)
    with pytest.raises(UsageError, match=r"(?s)E655.*'c' is larger.*\[9, 16\].*\[8, 16\].*rank=9"):
        made.export_adapters(directory, ["a", "c"], force=True)
    assert contents(directory) == before


def test_any_number_comes_and_one_takes_the_place_of_another(tmp_path):
    """There is no capacity: what was exported for one serves twelve."""
    made = adapted(spec("lora(rank = 2) { on q_proj }"))
    directory = export(made, tmp_path / "out", "a")
    names = [f"n{number}" for number in range(11)]
    for name in names:
        made.add_adapter(f"adapter {name} = lora(rank = 1) {{ on q_proj }}")
        draw(made, name)
    made.export_adapters(directory, names)
    check_rows(made, directory, [*reversed(names), BASE, "a"])
    draw(made, "n3")
    with pytest.raises(UsageError, match="E511"):
        made.export_adapters(directory, "n3")
    assert made.export_adapters(directory, "n3", force=True) == ("adapters/n3-1.safetensors",)
    check_rows(made, directory, ["n3", "n4", BASE])


REFUSED = {
    "another site": (
        "lora(rank = 2) { on q_proj, k_proj }",
        "E646",
        "it adapts .*self_attn.k_proj, which the artifact",
    ),
    "another method": ("ia3 { on q_proj }", "E646", "layers.0.self_attn.q_proj is computed in another way"),
    "one that is near": ("dora(rank = 2) { on q_proj }", "E646", "computed in another way"),
    "a copy": ("lora(rank = 2) { on q_proj  train lm_head }", "E646", "it adapts lm_head, which the artifact does not"),
    "a prompt": ("prompt(length = 2)", "E646", "it adapts"),
    "a rank": ("lora(rank = 5) { on q_proj }", "E655", r"\[5, 16\], and there is room for \[4, 16\]"),
}
OF_OTHER_SIZES = {
    "a rank that is in no product": ("dora(rank = {}) {{ on q_proj }}", "E646", "not float32"),
    "a block": ("oft(block = {}) {{ on q_proj }}", "E646", ""),
    "a prompt's length": ("prompt(length = {})", "E646", "@prompt is computed in another way"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, tmp_path):
    late, code, reason = REFUSED[case]
    made = adapted(spec("lora(rank = 4) { on q_proj }", late))
    directory = export(made, tmp_path / "out", "a")
    before = contents(directory)
    with pytest.raises(UsageError, match=f"(?s){code}.*{reason}"):
        made.export_adapters(directory, "b")
    assert contents(directory) == before


@pytest.mark.parametrize("case", wide(OF_OTHER_SIZES, ("a rank that is in no product",)))
def test_other_sizes_are_refused_where_zeros_would_change_something(case, tmp_path):
    text, code, reason = OF_OTHER_SIZES[case]
    for first, late in ((4, 2), (2, 4)):
        made = adapted(spec(text.format(first), text.format(late)))
        directory = export(made, tmp_path / f"{first}", "a")
        before = contents(directory)
        with pytest.raises(UsageError, match=f"(?s){code}.*{reason}"):
            made.export_adapters(directory, "b")
        assert contents(directory) == before


def test_projections_of_another_seed_are_refused(tmp_path):
    """They are in the program, for all adapters."""
    made = adapted(spec("vera(rank = 4) { on q_proj }", "vera(rank = 4, seed = 5) { on q_proj }"))
    directory = export(made, tmp_path / "out", "a")
    with pytest.raises(UsageError, match=r"E646.*another [AB] at .*q_proj, which is one for all"):
        made.export_adapters(directory, "b")


def test_of_two_stacks_each_program_takes_its_own(tmp_path):
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_decoder_layers=1, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config).eval()
    made = adapted(spec("lora(rank = 4) { on q, v }", "lora(rank = 2) { on decoder.**.q }"), model, std=1.0)
    made.export(tmp_path / "out", format="pt2", adapters="routed", adapter_names="a")
    made.export_adapters(tmp_path / "out", "b")
    artifact = Artifact.load(tmp_path / "out")
    assert len({entry.file for entry in artifact.manifest.entries.values()}) == 2
    names = ["b", BASE, "a"]
    found = artifact.generate(IDS.repeat(3, 1), max_new_tokens=4, adapter=names, eos_token_id=())
    for row, name in enumerate(names):
        if name != BASE:
            made.set_adapter(name)
        speaker = model if name == BASE else made
        wanted = speaker.generate(IDS, max_new_tokens=4, do_sample=False, eos_token_id=None)
        assert torch.equal(found[row], wanted[0]), name


class Net(nn.Module):
    """A module that nobody knows how to call."""

    def __init__(self):
        super().__init__()
        self.mix, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.mix(x).relu())


def test_a_module_of_ones_own(tmp_path):
    """How it was called is in the manifest."""
    torch.manual_seed(0)
    net = Net()
    made = adapted(spec("lora(rank = 3) { on mix, head }", "lora(rank = 1) { on head }"), net)
    x = torch.randn(3, 4)
    made.export(tmp_path / "out", format="pt2", adapters="routed", adapter_names="a", example_inputs={"x": x})
    made.export_adapters(tmp_path / "out", "b")
    found = Artifact.load(tmp_path / "out")("forward", {"x": x, "adapter_ids": torch.tensor([1, -1, 0])})
    with torch.no_grad():
        wanted = [net(x)]
        for name in "ab":
            made.set_adapter(name)
            wanted.append(made(x))
    (output,) = found.values()
    assert_close(output, torch.stack([wanted[2][0], wanted[0][1], wanted[1][2]]), rtol=1e-5, atol=1e-5)


def test_by_commands_and_in_another_process(tmp_path, monkeypatch):
    """Checkpoints in, tokens out: of `peftc run`, and of a process that has torch and nothing else."""
    monkeypatch.chdir(tmp_path)
    base = llama()
    base.save_pretrained("base")
    made = adapted(spec("lora(rank = 2) { on q_proj, v_proj }", "lora(rank = 6) { on q_proj }"), base, std=0.5)
    made.save_pretrained("saved")
    done = peftc("export", "first=saved/a", "base", "-o", "out", "--format", "pt2", "--adapters", "routed", "--rank", 6)
    assert done.code == 0, done.err
    done = peftc("export", "late=saved/b", "base", "--into", "out")
    assert done.code == 0, done.err
    names = ["late", BASE, "first"]
    wanted = []
    for name in names:
        if name != BASE:
            made.set_adapter({"late": "b", "first": "a"}[name])
        speaker = base if name == BASE else made
        wanted.append(speaker.generate(IDS, max_new_tokens=5, do_sample=False, eos_token_id=None)[0, 5:].tolist())
    assert wanted[0] != wanted[1] != wanted[2]
    text = ",".join(map(str, IDS[0].tolist()))
    chosen = [each for name in names for each in ("--ids", text, "--adapter", name)]
    done = peftc("run", "out", *chosen, "--max-new-tokens", 5, "--json")
    assert done.code == 0, done.err
    ends = json.loads(((tmp_path / "out") / "manifest.json").read_text())["artifact"]["generation"]["eos_token_id"]
    for found, right in zip(done.json["completions"], wanted, strict=True):
        assert found["ids"] == right[: next((at + 1 for at, each in enumerate(right) if each in ends), None)]
    process = TorchOnly(tmp_path)
    ids = IDS.repeat(3, 1)
    try:
        (tokens,) = process.generate(
            tmp_path / "out", turns=[(ids, torch.ones_like(ids))], steps=5, adapter_ids=torch.tensor([1, -1, 0])
        )
    finally:
        process.close()
    assert tokens.tolist() == wanted


def test_into_what_was_exported_before_there_were_banks(tmp_path):
    made = adapted(spec("lora(rank = 2) { on q_proj }", "lora(rank = 2) { on q_proj }"))
    directory = export(made, tmp_path / "out", "a")
    manifest = json.loads((directory / "manifest.json").read_text())
    for entry in manifest["artifact"]["entries"].values():
        entry["inputs"] = [each for each in entry["inputs"] if each["name"] != "bank"]
    del manifest["artifact"]["bank"]
    manifest["artifact"] |= {"format": 1, "adapter_files": {}}
    (directory / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match=r"(?s)E640.*hold their adapters"):
        made.export_adapters(directory, "b")
    artifact = Artifact.load(directory)
    with pytest.raises(UsageError, match=r"(?s)E615.*\[-1\]"):
        artifact("forward", given(artifact, IDS, [BASE]))


def test_the_spec_may_be_that_of_another_model_object(tmp_path):
    """What was exported from one object takes adapters of another with the same weights."""
    made = adapted(spec("lora(rank = 4) { on q_proj, v_proj }"))
    directory = export(made, tmp_path / "out", "a")
    other = compiler.apply(llama(), "adapter late = lora(rank = 2) { on v_proj }").eval()
    draw(other, "late")
    other.export_adapters(directory, "late")
    artifact = Artifact.load(directory)
    found = artifact("forward", given(artifact, IDS.repeat(2, 1), ["late", "a"]))["logits"]
    with torch.no_grad():
        assert_close(found[0], other(input_ids=IDS, use_cache=False).logits[0], rtol=1e-5, atol=1e-5)

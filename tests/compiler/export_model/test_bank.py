import json

import pytest
import torch
from safetensors.torch import load_file

from peftc.compiler import Artifact, UsageError
from peftc.compiler.export_model.bank import read_bank
from tests.compiler.export_model.routed import BASE, IDS, adapted, check_rows, export, given, llama, spec
from tests.matrix import wide

# Adapters that are exported together, in specs: of different ranks and sites, of different methods at different sites.
TOGETHER = {
    "ranks": ("lora(rank = 4) { on q_proj, v_proj }", "lora(rank = 2, alpha = 7) { on q_proj, v_proj }"),
    "sites": ("lora(rank = 2) { on q_proj, layers[1].mlp.up_proj }", "lora(rank = 3) { on v_proj, q_proj }"),
    "by pattern": ("lora(rank = 2) { on q_proj  on v_proj with rank = 5, alpha = 2 }", "lora(rank = 4) { on v_proj }"),
    "products": ("loha(rank = 4) { on q_proj }", "loha(rank = 2) { on q_proj, v_proj }"),
    "scales": ("ia3 { on k_proj, down_proj }", "ia3 { on k_proj, v_proj }"),
    "norms of weights": ("dora(rank = 2) { on q_proj, v_proj }", "dora(rank = 2) { on v_proj, k_proj }"),
    "shared projections": ("vera(rank = 4) { on q_proj, v_proj }", "vera(rank = 4) { on v_proj, k_proj }"),
    "rotations": ("oft(block = 4) { on q_proj }", "oft(block = 4) { on q_proj, o_proj }"),
    "copies": ("lora(rank = 2) { on q_proj  train lm_head }", "lora(rank = 1) { on v_proj  train norm }"),
    "tokens": ("lora(rank = 2) { on q_proj  tokens [5, 9] }", "lora(rank = 2) { on q_proj  tokens [4, 7, 9] }"),
    "biases": ("lora(rank = 2) { on q_proj  train layers[0].input_layernorm }", "lora(rank = 2) { on q_proj }"),
    "methods": ("lora(rank = 2) { on q_proj }", "ia3 { on k_proj, down_proj }"),
    "what no one trains": ("ln_tuning", "lora(rank = 2) { on q_proj }"),
}


@pytest.mark.parametrize("case", wide(TOGETHER, ("ranks", "scales", "norms of weights", "shared projections")))
def test_rows_have_their_own_or_none(case, tmp_path):
    made = adapted(spec(*TOGETHER[case]))
    export(made, tmp_path / "out", "a", "b", max_drift=1e-5)
    check_rows(made, tmp_path / "out", ["b", BASE, "a"])


def test_what_one_has_less_is_zeros(tmp_path):
    """The file of an adapter of rank 1 has the memory of rank 4, and the base's file is nothing at all."""
    made = adapted(spec("lora(rank = 4) { on q_proj }", "lora(rank = 1) { on q_proj }"))
    directory = export(made, tmp_path / "out", "a", "b")
    wide, thin, base = (load_file(directory / "adapters" / f"{name}.safetensors") for name in ("a", "b", BASE))
    name = "model.layers.0.self_attn.q_proj.A"
    assert wide[name].shape == thin[name].shape == base[name].shape == (4, 16)
    own = made.adapter_bank.b.get_parameter("model__layers__0__self_attn__q_proj.A")
    assert torch.equal(thin[name][:1], own)
    assert not thin[name][1:].any()
    assert not any(each.any() for each in base.values())


def test_room_for_a_rank(tmp_path):
    made = adapted(spec("lora(rank = 4) { on q_proj  on v_proj with rank = 1 }"))
    directory = export(made, tmp_path / "out", "a", rank=6)
    tensors = load_file(directory / "adapters" / "a.safetensors")
    assert {each.shape[0] for name, each in tensors.items() if name.endswith(".A")} == {6}
    check_rows(made, directory, ["a", BASE])


def test_what_no_one_trains_is_in_the_program(tmp_path):
    """Projections that are drawn once for all are no part of any adapter's file; others are."""
    alike = adapted(spec("vera(rank = 4) { on q_proj }", "vera(rank = 4) { on q_proj }"))
    bank = read_bank(alike, ["a", "b"])
    assert {path.rpartition(".")[2] for path in bank.constants} == {"A", "B"}
    directory = export(alike, tmp_path / "alike", "a", "b")
    assert max(each.numel() for each in load_file(directory / "adapters" / "a.safetensors").values()) == 16
    facts = json.loads((directory / "manifest.json").read_text())["artifact"]["bank"]
    assert facts["base"] is True
    assert set(facts["constants"]) == bank.constants
    other = adapted(spec("vera(rank = 4) { on q_proj }", "vera(rank = 4, seed = 5) { on q_proj }"))
    assert not read_bank(other, ["a", "b"]).constants
    directory = export(other, tmp_path / "other", "a", "b")
    check_rows(other, directory, ["a", "b", BASE])


Q, V = "on q_proj", "on v_proj"
REFUSED = {
    "methods at a site": ((f"lora(rank = 2) {{ {Q} }}", f"ia3 {{ {Q} }}"), {}, "E646", "q_proj"),
    "a rank that is in no product": ((f"dora(rank = 2) {{ {Q} }}", f"dora(rank = 4) {{ {Q} }}"), {}, "E646", "q_proj"),
    "ranks of projections": ((f"vera(rank = 2) {{ {V} }}", f"vera(rank = 4) {{ {V} }}"), {}, "E646", "v_proj"),
    "prompts of other lengths": (("prompt(length = 2)", "prompt(length = 3)"), {}, "E646", "'a' and 'b'"),
    "a smaller rank": (
        (f"lora(rank = 2) {{ {Q} }}", f"lora(rank = 4) {{ {Q} }}"),
        {"rank": 3},
        "E649",
        "'b' has 4",
    ),
    "a rank of none": (("ia3", "ia3"), {"rank": 3}, "E640", "rank has no meaning"),
    "no rank": (("ia3", "ia3"), {"rank": 0}, "E649", "rank cannot be 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, tmp_path):
    specs, options, code, reason = REFUSED[case]
    made = adapted(spec(*specs))
    with pytest.raises(UsageError, match=f"(?s){code}.*{reason}"):
        export(made, tmp_path / "out", "a", "b", **options)
    assert not (tmp_path / "out").exists()


def test_what_stands_in_front_has_no_row_of_the_base(tmp_path):
    """A prompt does so in every row: naming the base is refused, and the numbers begin with the first adapter."""
    made = adapted(spec("prompt(length = 2)", "prompt(length = 2)"))
    directory = export(made, tmp_path / "out", "a", "b", max_drift=1e-5)
    assert not (directory / "adapters" / f"{BASE}.safetensors").exists()
    check_rows(made, directory, ["b", "a"])
    artifact = Artifact.load(directory)
    with pytest.raises(UsageError, match=r"(?s)E615.*\[-1, 0\]"):
        artifact("forward", given(artifact, IDS.repeat(2, 1), [BASE, "a"]))


def test_the_model_stays_as_it_is(tmp_path):
    base = llama()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    made = adapted(spec(*TOGETHER["copies"]), base)
    own = {name: value.clone() for name, value in made.adapter_bank.state_dict().items()}
    made.set_adapter("b")
    made.export(tmp_path / "out", format="pt2", adapters="routed", entry="forward", rank=8)
    assert made.active_adapters() == ["b"]
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert all(torch.equal(value, own[name]) for name, value in made.adapter_bank.state_dict().items())

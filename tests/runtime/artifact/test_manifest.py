import json
from dataclasses import replace

import pytest
import torch

from peftc.grammar.diagnostics import CheckpointError
from peftc.runtime.peft_format.manifest import (
    AdapterFacts,
    Manifest,
    compare,
    fingerprint,
    from_json,
    read_manifest,
    spec_digest,
    write_manifest,
)


@pytest.fixture
def manifest():
    spec = "adapter a = lora() { on q_proj }\n"
    return Manifest(
        base_id="some/model",
        base_revision="abc",
        base_class="LlamaForCausalLM",
        fingerprint="f" * 64,
        spec=spec,
        spec_sha256=spec_digest(spec),
        versions={"peftc": "0.1.0", "torch": "2.13.0"},
        seed=3,
        adapters={"a": AdapterFacts("lora", 128)},
    )


def read(text):
    return from_json(json.loads(text), where="peftc_manifest.json")


def test_round_trip(manifest, tmp_path):
    assert read(manifest.to_json()) == manifest
    write_manifest(tmp_path / "new", manifest)
    assert read_manifest(tmp_path / "new") == manifest
    assert [each.name for each in (tmp_path / "new").iterdir()] == ["peftc_manifest.json"]


def test_a_checkpoint_without_a_manifest(tmp_path):
    assert read_manifest(tmp_path) is None


def test_unknown_fields_of_the_same_format_are_ignored(manifest):
    value = json.loads(manifest.to_json()) | {"weather": "fine"}
    assert from_json(value, where="x") == manifest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, r"E361.*format 2, this peftc reads up to 1"),
        ({"format": "one"}, "E360.*not a peftc manifest"),
        ({"fingerprint": None}, "E360.*'fingerprint' is not a text"),
        ({"seed": True}, "E360.*'seed' is not a whole number or null"),
        ({"versions": {"torch": 2}}, "E360.*'versions' is not an object of texts"),
        ({"adapters": {"a": {"method": "lora"}}}, "E360.*'adapters'"),
        ({"adapters": [1]}, "E360.*'adapters'"),
    ],
)
def test_refusals(manifest, change, message):
    with pytest.raises(CheckpointError, match=message):
        from_json(json.loads(manifest.to_json()) | change, where="x")


def test_the_fingerprint_depends_on_names_shapes_types_and_contents_only():
    torch.manual_seed(0)
    a, b = torch.randn(30, 40), torch.randn(5)
    expected = fingerprint([("a", a), ("b", b)])
    assert fingerprint([("b", b.clone()), ("a", a.clone())]) == expected
    assert fingerprint([("a", a.t().contiguous().t()), ("b", b)]) == expected
    last = a.clone()
    last[-1, -1] += 1
    others = [
        [("a", a)],
        [("a", a), ("c", b)],
        [("a", a.reshape(40, 30)), ("b", b)],
        [("a", a.double()), ("b", b)],
        [("a", last), ("b", b)],
        [("a", a), ("b", b + 1)],
    ]
    found = [fingerprint(each) for each in others]
    assert expected not in found
    assert len(set(found)) == len(found)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3.0),
        torch.zeros(0, 4),
        torch.ones(3, dtype=torch.bfloat16),
        torch.arange(200, dtype=torch.uint8),
        torch.tensor([True, False]),
        torch.nn.Parameter(torch.ones(2, 2)),
    ],
)
def test_any_tensor_has_a_fingerprint(tensor):
    assert len(fingerprint([("x", tensor)])) == 64


def test_differences_are_told(manifest):
    assert compare(manifest, "f" * 64, base_class="LlamaForCausalLM", base_id="moved/elsewhere") == ()
    first, second = compare(manifest, "0" * 64, base_class="GPT2LMHeadModel")
    assert first == "the adapter was trained on a LlamaForCausalLM, this model is a GPT2LMHeadModel"
    assert "'some/model' at revision abc" in second
    assert "000000000000, expected ffffffffffff" in second


def test_weights_that_are_stored_in_another_way_are_not_compared(manifest):
    (said,) = compare(manifest, "0" * 64, base_class="LlamaForCausalLM", quantized="nf4")
    assert said.startswith("the adapter was trained on dense weights, this model has quantized weights (nf4):")
    packed = replace(manifest, quantized="nf4")
    assert read(packed.to_json()) == packed
    assert compare(packed, "f" * 64, base_class="LlamaForCausalLM", quantized="nf4") == ()
    (same,) = compare(packed, "0" * 64, base_class="LlamaForCausalLM", quantized="nf4")
    assert "fingerprint 000000000000" in same
    (other,) = compare(packed, "f" * 64, base_class="LlamaForCausalLM")
    assert "quantized weights (nf4), this model has dense weights" in other


def test_a_manifest_from_before_bases_could_be_quantized_is_one_of_dense_weights(manifest):
    old = json.loads(manifest.to_json())
    del old["quantized"]
    assert from_json(old, where="here") == manifest

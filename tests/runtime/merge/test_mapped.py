import pytest
import torch
from torch import nn

from peftc import compiler
from peftc.grammar.diagnostics import UsageError
from peftc.runtime.merge.mapped import mapped_tensors
from peftc.runtime.merge.merge import merged_tensors
from peftc.runtime.merge.merged_checkpoint import is_one_by_one

SPECS = {
    "weights": "adapter a = lora(rank = 2) { on all linear }",
    "biases too": "adapter a = ia3 { on all linear }",
    "two": "adapter a = lora(rank = 2) { on all linear }\nadapter b = ia3 { on all linear }\nactivate a + b",
}


def adapted_by(spec, dtype=torch.float32):
    torch.manual_seed(0)
    adapted = compiler.apply(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype), spec)
    for each in adapted.adapter_bank.parameters():
        nn.init.normal_(each)
    return adapted


def active(adapted):
    state = adapted._adapter_state
    return [(state.adapter(name), weight) for name, weight in state.active]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_they_are_the_merged_tensors(spec, dtype, tmp_path):
    adapted = adapted_by(spec, dtype)
    assert is_one_by_one(adapted, active(adapted))
    mapped = mapped_tensors(adapted, active(adapted), tmp_path / "merged.safetensors", safe=True)
    merged = merged_tensors(adapted, active(adapted))
    assert mapped.keys() == merged.keys()
    for name, tensor in mapped.items():
        assert torch.equal(tensor, merged[name]), name
        assert not torch.equal(tensor, adapted.get_parameter(name)), name
        # A program that is written takes whole storages along.
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def test_writing_to_them_changes_no_file(tmp_path):
    adapted, path = adapted_by(SPECS["weights"]), tmp_path / "merged.safetensors"
    mapped = mapped_tensors(adapted, active(adapted), path, safe=False)
    before = path.read_bytes()
    with torch.no_grad():
        mapped["0.weight"].zero_()
    assert path.read_bytes() == before


def test_what_is_not_finite_is_refused(tmp_path):
    adapted = adapted_by(SPECS["weights"])
    nn.init.constant_(adapted.adapter_bank.a.get_submodule("0").A, float("inf"))
    with pytest.raises(UsageError, match="E520"):
        mapped_tensors(adapted, active(adapted), tmp_path / "merged.safetensors", safe=True)


def test_what_needs_more_than_its_own_site_is_not_one_by_one():
    adapted = adapted_by('adapter a = lora(rank = 2) {\n on "0"\n train "2"\n}')
    assert not is_one_by_one(adapted, active(adapted))

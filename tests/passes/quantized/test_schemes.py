"""Every way to store a weight packed: computed as its library does, packed and unpacked, shared and left alone."""

import copy
from types import SimpleNamespace
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from peftc.grammar.diagnostics import UsageError
from peftc.passes.quantized.packed_operators import PACKED_LINEAR, QUANTIZED_LINEAR, UNPACK, packed_linear, unpacked
from peftc.passes.quantized.schemes import known
from peftc.passes.quantized.schemes.known import Packed, packed
from peftc.passes.quantized.schemes.packing import Packing, from_text
from tests.passes.quantized.storages import STORES, eight_bit, four_bit, hqq

OUT, IN = 96, 64

every = pytest.mark.parametrize("name", STORES)
by_library = pytest.mark.parametrize("name", ["nf4 double", "int8 with outliers", "torchao int4", "hqq 4"])

# Of what packing a weight in [-1/8, 1/8] loses: the largest error.
LOSSES = {"nf4": 0.025, "fp4": 0.03, "int8": 0.001, "float8_e4m3fn": 0.008, "int4": 0.02, "int3": 0.03}
LOSSES |= {"hqq8": 0.001, "hqq4": 0.02, "hqq3": 0.04, "hqq2": 0.08}


def dense(dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(IN, OUT, bias, dtype=dtype).requires_grad_(False)


def stored(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    return STORES[name](dense(dtype)).eval()


def held_by(module: nn.Module) -> Packed:
    held = packed(module)
    assert held is not None
    return held


def inputs(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.randn(3, 5, IN, generator=torch.Generator().manual_seed(1))
    x[1, 2, 7] = 20.0  # an outlier
    return x.to(dtype)


def called(module: nn.Module, x: torch.Tensor, training: bool = False, **options: Any) -> torch.Tensor:
    """The operator on what the module holds."""
    held = held_by(module)
    run = options.get("run", PACKED_LINEAR)
    return run(x, options.get("bias", module.bias), list(held.parts), held.packing.text, training)


# --- as the library ---


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_linear_is_the_library_s(name, dtype):
    module, x = stored(name, dtype), inputs(dtype)
    for training in (False, True):
        module.train(training)
        theirs = module(x.requires_grad_())  # with a gradient, in which bitsandbytes is what it says
        assert torch.equal(called(module, x, training), theirs.detach())
        assert torch.equal(called(module, x, training, run=packed_linear), theirs)
    with pytest.raises(AssertionError):
        assert_close(called(module, x), module.bias.expand(3, 5, OUT))


@every
def test_unpacking_is_the_library_s(name):
    module = stored(name)
    held = held_by(module)
    match module:
        case bnb.nn.Linear4bit():
            theirs = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        case bnb.nn.Linear8bitLt():
            theirs = bnb.functional.int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
        case nn.Linear():
            theirs = module.weight.dequantize()
        case _:
            theirs = module.dequantize()
    assert_close(held.unpack(), theirs, rtol=1e-6 if held.packing.scheme == "bitsandbytes-8bit" else 0, atol=0)
    assert (held.unpack() - dense().weight).abs().max() < LOSSES[held.packing.label]
    assert held.packing.dtype == theirs.dtype


@every
@pytest.mark.parametrize("run", [PACKED_LINEAR, packed_linear], ids=["operator", "function"])
def test_gradients(name, run):
    module, x = stored(name), inputs().requires_grad_()
    bias = module.bias.detach().clone().requires_grad_()
    made = called(module, x, bias=bias, run=run)
    seed = torch.randn(made.shape, generator=torch.Generator().manual_seed(2))
    made.backward(seed)
    kind = held_by(module).packing.compute or x.dtype
    assert torch.equal(x.grad, (seed.to(kind) @ held_by(module).unpack().to(kind)).to(x.dtype))
    assert_close(bias.grad, seed.sum((0, 1)))


@every
def test_the_library_s_gradient(name):
    module, x, y = stored(name), inputs().requires_grad_(), inputs().requires_grad_()
    called(module, x).square().sum().backward()
    module(y).square().sum().backward()
    assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["torchao int8", "torchao int4", "torchao float8", "hqq 4"])
def test_an_activation_of_another_type(name):
    """As when the norms of a bfloat16 model are held in float32: some libraries then refuse."""
    module, x = stored(name, torch.bfloat16), inputs()
    weight, bias = held_by(module).unpack().float(), module.bias.float()
    made = called(module, x)
    assert made.dtype == x.dtype
    assert_close(made, nn.functional.linear(x, weight, bias), rtol=0.01, atol=0.01)


# --- operators ---


@by_library
def test_the_operators_keep_torch_s_rules(name):
    held, x = held_by(stored(name)), inputs().requires_grad_()
    parts, text = list(held.parts), held.packing.text
    bias = torch.ones(OUT, requires_grad=True)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    more = (*checks, "test_aot_dispatch_dynamic")
    torch.library.opcheck(PACKED_LINEAR, (x, bias, parts, text, True), test_utils=more)
    torch.library.opcheck(PACKED_LINEAR, (x.detach(), None, parts, text, False), test_utils=checks)
    torch.library.opcheck(UNPACK, (parts, text), test_utils=checks)
    torch.library.opcheck(QUANTIZED_LINEAR, (x.detach(), held.unpack(), None), test_utils=checks[:2])


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fake_results(name, dtype):
    module, x = stored(name, dtype), inputs(dtype)
    held = held_by(module)
    stored_parts = held.parts
    with FakeTensorMode() as mode:
        parts = [mode.from_tensor(each) for each in stored_parts]
        fake = PACKED_LINEAR(mode.from_tensor(x), None, parts, held.packing.text, False)
        weight = UNPACK(parts, held.packing.text)
    real, true = called(module, x), held.unpack()
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())
    assert (weight.shape, weight.dtype, weight.stride()) == (true.shape, true.dtype, true.stride())
    assert torch.equal(unpacked(held.parts, held.packing.text), true)


@every
def test_a_packing_survives_as_text(name):
    packing = held_by(stored(name)).packing
    assert from_text(packing.text) == packing
    assert hash(from_text(packing.text)) == hash(packing)
    assert held_by(stored(name)).packing == packing
    assert (packing.out_features, packing.in_features) == (OUT, IN)


@every
def test_a_packed_weight_counts_as_the_dense_one(name):
    model = nn.ModuleDict({"own": stored(name), "norm": nn.LayerNorm(4)})
    bias = OUT if "bias" in model["own"]._parameters else 0  # HQQ's is no parameter
    assert known.parameter_count(model) == OUT * IN + bias + 8
    assert known.parameter_count(nn.ModuleDict({"own": dense(), "norm": nn.LayerNorm(4)})) == OUT * IN + OUT + 8


def test_packings_tell_apart_what_is_not_stored_alike():
    assert len({held_by(stored(name)).packing for name in STORES}) == len(STORES)


# --- sharing and packing ---


def snapshot(module: nn.Module) -> list[torch.Tensor]:
    """The bytes of its parts: as numbers some are not equal to themselves."""
    return [each.flatten().clone().view(torch.uint8) for each in held_by(module).parts]


@every
def test_a_shared_module_is_over_the_same_storage(name):
    module = stored(name)
    before, training = snapshot(module), module.training
    weight, bias = module._parameters.copy(), module.bias
    shared = held_by(module).scheme.share(module)
    mine, theirs = held_by(shared), held_by(module)
    assert mine.packing == theirs.packing
    for own, other in zip(mine.parts, theirs.parts, strict=True):
        # What HQQ makes in inference mode cannot be shared: torch.compile refuses it.
        assert own.data_ptr() == other.data_ptr() or other.is_inference()
        assert not own.is_inference()
    assert isinstance(shared.bias, nn.Parameter)
    assert shared.bias is shared._parameters["bias"]
    assert shared.bias.data_ptr() == bias.data_ptr()
    assert all(shared._parameters[key] is not each for key, each in weight.items() if each is not None)
    assert not any(each.requires_grad for each in shared.parameters())

    shared._parameters["bias"] = None
    shared.train(not training)
    x = inputs()
    tolerance = 0.02 if mine.packing.compute == torch.bfloat16 else 1e-5
    assert_close(shared(x) + bias, module.train(not training)(x), atol=tolerance, rtol=tolerance)
    assert module.bias is bias
    assert module._parameters == weight
    assert all(map(torch.equal, snapshot(module), before))
    assert held_by(copy.deepcopy(shared)).packing == theirs.packing


@every
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_a_weight_that_is_packed_again(name, bias):
    module = STORES[name](dense(bias=bias)).eval()
    held = held_by(module)
    before = snapshot(module)
    wanted = held.unpack() + 0.02 * torch.randn(OUT, IN, generator=torch.Generator().manual_seed(3))
    again = held.scheme.pack(wanted, module)
    made = held_by(again)
    assert type(again) is type(module)
    assert made.packing == held.packing
    assert [(each.shape, each.dtype) for each in made.parts] == [(each.shape, each.dtype) for each in held.parts]
    assert (made.unpack() - wanted).abs().max() < 1.8 * LOSSES[held.packing.label]
    assert (made.unpack() - held.unpack()).abs().max() > 0.02
    x = inputs().requires_grad_()
    assert torch.equal(again(x), called(again, x))
    assert all(map(torch.equal, snapshot(module), before))
    assert (again.bias is None) == (module.bias is None)


@every
def test_what_was_unpacked_packs_to_nearly_the_same(name):
    module = stored(name)
    held = held_by(module)
    again = held_by(held.scheme.pack(held.unpack(), module)).unpack()
    lost = (again - held.unpack()).abs().max()
    # HQQ looks for other scales; double quantization rounds them.
    assert lost < {"nf4 double": 2e-3}.get(name, LOSSES[held.packing.label] if name.startswith("hqq") else 1e-6)
    if held.packing.scheme == "torchao":
        assert lost == 0.0


def test_blocks_that_do_not_change_stay_as_they_are_stored():
    """torchao would choose another scale for them."""
    module = stored("torchao int8")
    held = held_by(module)
    wanted = held.unpack()
    wanted[0] += 0.05
    numbers, scale, _ = held_by(held.scheme.pack(wanted, module)).parts
    assert torch.equal(numbers[1:], held.parts[0][1:])
    assert torch.equal(scale[1:], held.parts[1][1:])
    assert not torch.equal(scale[0], held.parts[1][0])


def test_a_weight_of_another_type_is_packed_in_the_old_one():
    module = stored("torchao int4", torch.bfloat16)
    held = held_by(module)
    assert held_by(held.scheme.pack(held.unpack().float() + 0.01, module)).packing == held.packing


# --- what libraries do to their modules ---


@pytest.mark.parametrize("double", [False, True])
def test_a_module_that_bitsandbytes_repacked(double):
    """On a CPU with AVX-512 BF16, calling a Linear4bit without a gradient reorders its codes in place."""
    if not bnb.functional.has_avx512bf16():
        pytest.skip("this CPU has no AVX-512 BF16")
    module = four_bit("nf4", double)(dense()).eval()
    weight = held_by(module).unpack()
    module.support_avx512bf16_for_cpu = True
    with torch.no_grad():
        module(inputs())
    assert module.weight.quant_state.packing_format_for_cpu
    codes = module.weight.data.clone()
    shared = held_by(module).scheme.share(module)
    assert_close(held_by(shared).unpack(), weight, rtol=0.01, atol=1e-3)  # its scales are in bfloat16 now
    assert held_by(shared).packing.dtype == torch.float32
    assert torch.equal(module.weight.data, codes)
    assert module.weight.quant_state.packing_format_for_cpu


def test_eight_bits_after_a_call_are_where_bitsandbytes_moved_them():
    module = eight_bit(6.0)(dense()).eval()
    before = snapshot(module)
    module(inputs())
    assert module.state.SCB is not None
    assert all(map(torch.equal, snapshot(module), before))
    assert all(map(torch.equal, snapshot(held_by(module).scheme.share(module)), before))


def test_hqq_without_its_settings_packs_by_what_is_to_be_seen():
    module = stored("hqq 4")
    settings, module.quant_config = module.quant_config, None
    bare = held_by(module).scheme.pack(dense().weight, module)
    module.quant_config = settings
    assert all(map(torch.equal, snapshot(bare), snapshot(held_by(module).scheme.pack(dense().weight, module))))


def test_hqq_that_keeps_its_first_layer():
    kept = nn.Linear(IN, OUT)
    settings = {**copy.deepcopy(stored("hqq 4").quant_config), "offload_meta": False}
    module = type(stored("hqq 4"))(kept, settings, del_orig=False, compute_dtype=torch.float32, device="cpu")
    assert dict(module.named_children()) == {"linear_layer": kept}
    shared = held_by(module).scheme.share(module)
    assert not list(shared.children())
    assert dict(module.named_children()) == {"linear_layer": kept}
    assert_close(shared(inputs()), module(inputs()))


# --- what is of no scheme ---


def test_what_is_not_packed():
    raw = bnb.nn.Linear4bit(IN, OUT)  # quantized when it goes to a device
    half = bnb.nn.Linear8bitLt(IN, OUT, has_fp16_weights=True)
    scaled = hqq(4)(dense())
    del scaled.meta["zero"]
    for each in (dense(), nn.LayerNorm(4), nn.Embedding(4, 4), raw, half, scaled):
        assert packed(each) is None


# --- schemes of one's own ---


class Nothing:
    """A scheme that knows one module."""

    name, backend = "nothing", "torch"

    def packing(self, module: nn.Module) -> Packing | None:
        return Packing(self.name, "none", 1, 1, torch.float32) if isinstance(module, nn.Identity) else None


@pytest.fixture
def own():
    scheme: Any = Nothing()
    known.register(scheme)
    yield scheme
    if scheme in known.known_schemes():
        known.unregister("nothing")


def test_a_scheme_of_one_s_own(own):
    held = held_by(nn.Identity())
    assert held.scheme is own
    assert known.scheme_of(held.packing) is own
    assert known.known_schemes()[0] is own
    other: Any = Nothing()
    known.register(other)
    assert held_by(nn.Identity()).scheme is other
    assert len(known.known_schemes()) == len(known.SCHEMES) + 1
    known.unregister("nothing")
    assert packed(nn.Identity()) is None
    with pytest.raises(UsageError, match=r"E524.*'nothing', which no scheme here is called") as refused:
        known.scheme_of(held.packing)
    assert "known.register" in str(refused.value)
    known.register(own)


def test_names_that_are_taken_or_unknown():
    taken: Any = SimpleNamespace(name="hqq", backend="hqq")
    with pytest.raises(UsageError, match=r"E524.*peftc has a scheme called 'hqq'"):
        known.register(taken)
    for name in ("hqq", "never"):
        with pytest.raises(UsageError, match=f"E524.*no scheme called '{name}' was registered"):
            known.unregister(name)

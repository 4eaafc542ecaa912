"""Starts that change the model, and what training drops: distributed as peft's, method by method."""

import copy
import warnings

import peft
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peftc import compiler
from peftc.grammar.diagnostics import CheckpointError, UsageError

ON = dict(target_modules=["lin"])
FREQUENCIES = dict(n_frequency=900, init_weights=False, **ON)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.lin, self.norm = nn.Embedding(64, 64), nn.Linear(64, 64), nn.LayerNorm(64)

    def forward(self, x):
        return self.norm(self.lin(self.emb(x)))


def _base():
    torch.manual_seed(0)
    return Net().eval()


def _usual(name, **more):
    return lambda: getattr(peft, f"{name}Config")(init_weights=False, **ON, **more)


STARTS = {
    "ia3": lambda: peft.IA3Config(feedforward_modules=[], init_ia3_weights=False, **ON),
    "ia3 feedforward": lambda: peft.IA3Config(feedforward_modules=["lin"], init_ia3_weights=False, **ON),
    "lora": lambda: peft.LoraConfig(init_lora_weights=False, **ON),
    "lora at an embedding": lambda: peft.LoraConfig(init_lora_weights=False, target_modules=["emb"]),
    "lora gaussian": lambda: peft.LoraConfig(init_lora_weights="gaussian", **ON),
    "lora orthogonal": lambda: peft.LoraConfig(init_lora_weights="orthogonal", **ON),
    "dora": lambda: peft.LoraConfig(init_lora_weights=False, use_dora=True, **ON),
    "adalora": lambda: peft.AdaLoraConfig(init_lora_weights=False, total_step=10, **ON),
    "hira": _usual("Hira"),
    "hira at an embedding": lambda: peft.HiraConfig(init_weights=False, target_modules=["emb"]),
    "hira gaussian": lambda: peft.HiraConfig(init_weights="gaussian", **ON),
    "fourierft": lambda: peft.FourierFTConfig(**FREQUENCIES),
    "waveft": lambda: peft.WaveFTConfig(**FREQUENCIES),
    "c3a": _usual("C3A", block_size=32),
    "miss": _usual("Miss", r=8),
    "shira": _usual("Shira", r=4),
    "unilora": _usual("UniLora"),
    "supertuning": _usual("Supertuning", sparsity=0.8),
    "supertuning with a rank": _usual("Supertuning", sparsity=0.8, r=4, lora_alpha=8),
    "glora": _usual("Glora"),
    "glora of vectors": _usual("Glora", config_A_B="vector", config_C="vector", config_D_E="vector"),
    "glora of numbers": _usual("Glora", config_A_B="constant", config_C="vector", config_D_E="constant"),
    "gralora": _usual("Gralora"),
    "gralora hybrid": _usual("Gralora", hybrid_r=4),
    "peanut": _usual("Peanut", depth=2),
    "psoft": _usual("Psoft", r=16),
    "psoft of any matrix": _usual("Psoft", r=16, psoft_orth=False),
    "deft": _usual("Deft", init_scale=3.0),
    "vera": _usual("Vera", r=64),
    "pvera": _usual("Pvera", r=64),
    "loha": _usual("LoHa"),
    "lokr": _usual("LoKr"),
    "lokr lycoris": lambda: peft.LoKrConfig(init_weights="lycoris", **ON),
    "hra": _usual("HRA"),
    "beft": _usual("Beft"),
    "boft": _usual("BOFT"),
    "delora": _usual("Delora"),
    "frod": _usual("Frod"),
    "oft": _usual("OFT"),
    "randlora": _usual("RandLora"),
    "road": _usual("Road"),
    "tinylora uniform": lambda: peft.TinyLoraConfig(init_weights="uniform", **ON),
    "trainable tokens": lambda: peft.TrainableTokensConfig(
        token_indices=list(range(32)), target_modules=["emb"], init_weights=False
    ),
}
AS_THE_BASE = ("lora gaussian", "lora orthogonal", "hira gaussian", "lokr lycoris")


def _put(name, how, base):
    if how == "applied":
        return compiler.apply(base, STARTS[name]()).eval()
    adapted = compiler.apply(base, "adapter seed = lora(rank = 1) { on lin }")
    adapted.add_adapter(STARTS[name]().to_dict(), "default")
    return adapted.eval()


def _numbers(tensors):
    """Of many adapters: how each tensor's numbers lie, and how many there are."""
    found = {}
    for key in tensors[0]:
        values = torch.cat([each[key].detach().float().flatten() for each in tensors])
        found[key] = torch.stack([values.mean(), values.std(), values.abs().quantile(0.9)]), len(values)
    return found


@pytest.mark.parametrize(
    ("name", "how"), [*((name, "applied") for name in STARTS), ("ia3", "added"), ("loha", "added"), ("vera", "added")]
)
def test_a_start_lies_as_pefts(name, how):
    base, theirs, ours = _base(), [], []
    for _ in range(8):
        made = peft.get_peft_model(copy.deepcopy(base), STARTS[name]())
        theirs.append(peft.get_peft_model_state_dict(made, save_embedding_layers=False))
        ours.append(_put(name, how, base).adapter_state_dict("default"))
    wanted = _numbers(theirs)
    found = _numbers([{key: each[key] for key in each if key in wanted} for each in ours])
    assert found
    for key, (numbers, count) in found.items():
        scale = wanted[key][0][2].clamp(min=1e-3)
        assert ((numbers - wanted[key][0]).abs() / scale).max() < 0.05 + 4 / count**0.5, (key, numbers, wanted[key])
    moved = (_put(name, how, base)(torch.arange(8)) - base(torch.arange(8))).abs().max()
    assert (moved < 1e-4) if name in AS_THE_BASE else (moved > 1e-3)


def test_prefixes_start_from_nothing_where_a_config_says_so():
    base = LlamaForCausalLM(
        LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    for more in ({}, {"prefix_projection": True, "encoder_hidden_size": 8}):
        config = peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM", init_weights="zero", **more)
        assert not compiler.apply(base, config).adapter_state_dict("default")["prompt_embeddings"].any()


REFUSED = {
    "loftq": (dict(init_lora_weights="loftq", loftq_config={"loftq_bits": 4}), "quantize = nf4"),
    "corda": (dict(init_lora_weights="corda"), "calibration="),
    "lora_ga": (dict(init_lora_weights="lora_ga"), "'pissa' and 'eva'"),
    "mica": (dict(init_lora_weights="mica"), "'pissa' and 'olora'"),
    "unheard of": (dict(init_lora_weights="unheard_of"), "known here: true"),
    "eva as it is by default": (dict(init_lora_weights="eva"), "EvaConfig(rho=1.0)"),
    "a number": (dict(init_lora_weights=3), "known here: true"),
}


@pytest.mark.parametrize("which", REFUSED)
@pytest.mark.parametrize("dora", [False, True])
def test_other_starts_are_refused_with_what_to_do(which, dora):
    said, help = REFUSED[which]
    fields = {"peft_type": "LORA", "target_modules": ["lin"], "use_dora": dora, **said}
    with pytest.raises(CheckpointError, match=r"E322.*'init_lora_weights'") as caught:
        compiler.apply(_base(), fields)
    assert any(help in each.help for each in caught.value.diagnostics)


def test_numbers_that_nobody_chose_are_no_start():
    with pytest.raises(CheckpointError, match=r"'init_weights' = false(.|\n)*uniform"):
        compiler.apply(_base(), peft.TinyLoraConfig(init_weights=False, **ON))


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_starts_from_the_weight(start):
    config = peft.LoraConfig(r=4, init_lora_weights=start, **ON)
    base = _base()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        ours = compiler.apply(base, config).eval()
    assert any("pissa_niter_4" in str(each.message) for each in told) is (start == "pissa_niter_4")
    theirs = peft.get_peft_model(_base(), peft.LoraConfig(r=4, init_lora_weights=start.split("_")[0], **ON))
    wanted = peft.get_peft_model_state_dict(theirs)
    for key, value in ours.adapter_state_dict("default").items():
        torch.testing.assert_close(value.abs(), wanted[key].abs(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours(torch.arange(8)), base(torch.arange(8)), atol=1e-5, rtol=1e-5)


def test_eva_asks_for_the_batches_it_starts_from():
    config = peft.LoraConfig(r=4, init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.0), **ON)
    with pytest.raises(UsageError, match="E554"):
        compiler.apply(_base(), config)
    adapted = compiler.apply(_base(), config, calibration=[(torch.arange(64),)])
    assert adapted.adapter_plan("default").spec.rule.name == "eva"


def _all(**more):
    return dict(target_modules=["lin"], init_weights=False, **more)


DROPPED = {
    "loha rows": lambda: peft.LoHaConfig(**_all(rank_dropout=0.4)),
    "loha whole": lambda: peft.LoHaConfig(**_all(module_dropout=0.3)),
    "lokr rows": lambda: peft.LoKrConfig(**_all(rank_dropout=0.4)),
    "lokr rows, scaled": lambda: peft.LoKrConfig(**_all(rank_dropout=0.4, rank_dropout_scale=True)),
    "lokr rows and whole": lambda: peft.LoKrConfig(**_all(rank_dropout=0.2, module_dropout=0.3)),
    "boft": lambda: peft.BOFTConfig(**_all(boft_block_size=4, boft_dropout=0.4)),
    "boft, less than a block": lambda: peft.BOFTConfig(**_all(boft_block_size=4, boft_dropout=0.1)),
    "oft": lambda: peft.OFTConfig(**_all(oft_block_size=4, r=0, module_dropout=0.5)),
    "delora": lambda: peft.DeloraConfig(**_all(r=4, module_dropout=0.3)),
    "hira": lambda: peft.HiraConfig(**_all(r=4, hira_dropout=0.3)),
    "miss": lambda: peft.MissConfig(**_all(r=4, miss_dropout=0.3)),
    "miss, not divided": lambda: peft.MissConfig(**_all(r=5, miss_dropout=0.3)),
    "miss mini": lambda: peft.MissConfig(**{**_all(r=4, mini_r=6, miss_dropout=0.3), "init_weights": "mini"}),
    "randlora": lambda: peft.RandLoraConfig(**_all(r=4, randlora_dropout=0.3)),
}


class Lin(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(24, 24)

    def forward(self, x):
        return self.lin(x)


@pytest.mark.parametrize("name", DROPPED)
def test_what_training_drops_is_dropped_as_often(name, tmp_path):
    torch.manual_seed(0)
    base, x = Lin(), torch.randn(3, 24)
    theirs = peft.get_peft_model(copy.deepcopy(base), DROPPED[name]())
    with torch.no_grad():
        for each in theirs.parameters():
            each.mul_(2 if each.requires_grad else 1)
    theirs.save_pretrained(tmp_path)
    loaded = compiler.load(base, tmp_path, is_trainable=True)
    fresh = compiler.apply(base, DROPPED[name]())
    with torch.no_grad():
        for one, other in zip(fresh.adapter_bank.parameters(), loaded.adapter_bank.parameters(), strict=True):
            one.copy_(other)
    plain = base(x)

    def draws(model, count=600):
        with torch.no_grad():
            return torch.stack([model.train()(x) - plain for _ in range(count)])

    wanted = draws(theirs)
    for ours in (loaded, fresh):
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), atol=1e-5, rtol=1e-5)
        found = draws(ours)
        spread = wanted.std(0)
        assert ((found.mean(0) - wanted.mean(0)).abs() < 6 * (2 / 600) ** 0.5 * spread + 1e-5).all()
        assert ((found.std(0) - spread).abs() < 0.25 * spread + 1e-5).all()
        gone = [(each.abs() < 1e-6).float().mean() for each in (found, wanted)]
        assert (gone[0] - gone[1]).abs() < 0.05
        torch.testing.assert_close(ours.eval().merge_and_unload()(x), theirs.eval()(x), atol=1e-5, rtol=1e-5)
        again = tmp_path / "again"
        ours.save_pretrained(again)
        fields, said = peft.PeftConfig.from_pretrained(again).to_dict(), DROPPED[name]().to_dict()
        dropouts = [each for each in said if each.endswith(("dropout", "dropout_scale")) and name != "oft"]
        assert {each: fields[each] for each in dropouts} == {each: said[each] for each in dropouts}


@pytest.mark.parametrize("trainable", [True, False])
def test_frozen_or_not_it_is_drawn_in_every_call_and_its_gradient_is_of_that_draw(trainable):
    torch.manual_seed(0)
    base, x = Lin(), torch.randn(3, 24)
    config = peft.LoHaConfig(target_modules=["lin"], init_weights=False, rank_dropout=0.5, inference_mode=not trainable)
    ours = compiler.apply(base, config).train()
    outputs = [ours(x) for _ in range(4)]
    assert len({each.detach().sum().item() for each in outputs}) == 4
    if trainable:
        output = ours(x)
        output.sum().backward()
        idle = (output - base(x)).abs().max(0).values < 1e-6
        assert 0 < idle.sum() < 24
        gradient = ours.adapter_bank.default.lin.w1_a.grad.abs().sum(1)
        assert ((gradient < 1e-6) == idle).all()

"""Starts from data are peft's: EVA's directions, CorDA's factors and what it takes out of the base."""

import copy
import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from peft.tuners.lora import eva
from peft.utils.incremental_pca import IncrementalPCA
from torch import nn
from torch.testing import assert_close

from peftc import compiler
from peftc.compiler.api import adapt
from tests.matrix import wide
from tests.parity.cases.case import MODELS, TARGETS

RANK = 4


def batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(5, 64, (4, 30))
    mask = torch.ones_like(ids)
    mask[:2, :5] = 0  # peft's EVA does not count padding either
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def base(request: pytest.FixtureRequest) -> tuple[str, nn.Module]:
    torch.manual_seed(0)
    model = MODELS[request.param]().eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    return request.param, model


def started(base: tuple[str, nn.Module], spec: str, batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    name, model = base
    adapted = adapt(model)
    adapted.add_adapter(f"adapter a = {spec} {{ on {', '.join(TARGETS[name])} }}", calibration=batches)
    return {key: each.detach() for key, each in adapted.adapter_state_dict("a").items()}


@torch.no_grad()
def test_evas_directions(base: tuple[str, nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    name, model = base
    # Of several batches peft forgets after each what is not leading, which by default it looks for with random numbers.
    batches = [batch()]
    monkeypatch.setattr(eva, "IncrementalPCA", lambda **options: IncrementalPCA(**{**options, "lowrank": False}))
    ours = started(base, f"eva(rank = {RANK})", batches)
    config = peft.LoraConfig(
        r=RANK,
        target_modules=TARGETS[name],
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=1, tau=0.99),
        task_type="CAUSAL_LM",
        fan_in_fan_out=name == "gpt2",
    )
    wrapped = peft.get_peft_model(copy.deepcopy(model), config)
    peft.initialize_lora_eva_weights(wrapped, batches, show_progress_bar=False)
    theirs = peft.get_peft_model_state_dict(wrapped)
    assert set(ours) == set(theirs)
    for key, each in ours.items():
        if "lora_B" in key:
            assert not each.any()
            continue
        assert_close(each @ each.T, torch.eye(RANK), rtol=0, atol=1e-5)
        cosines = torch.linalg.svdvals(each @ theirs[key].T)
        assert_close(cosines, torch.ones(RANK), rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("mode", wide(["ipm", "kpm"], ("ipm",)))
def test_cordas_factors(base: tuple[str, nn.Module], mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # peft's module wants the package attrs, for what dataclasses does as well.
    monkeypatch.setitem(sys.modules, "attr", SimpleNamespace(dataclass=dataclasses.dataclass))
    from peft.tuners.lora.corda import preprocess_corda

    name, model = base
    sample = {"input_ids": batch()["input_ids"].reshape(1, -1)[:, :64]}  # peft takes samples one by one
    ours = started(base, f'corda(rank = {RANK}, alpha = 6, mode = "{mode}")', [sample])
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=6,
        target_modules=TARGETS[name],
        init_lora_weights="corda",
        corda_config=peft.tuners.lora.config.CordaConfig(corda_method=mode),
        fan_in_fan_out=name == "gpt2",
    )
    whole = copy.deepcopy(model)
    preprocess_corda(whole, config, run_model=lambda: whole(**sample))
    wrapped = peft.get_peft_model(whole, config)
    theirs = peft.get_peft_model_state_dict(wrapped)
    for key in (key for key in theirs if "lora_A" in key):
        site = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        other = key.replace("lora_A", "lora_B")
        wanted = theirs[other] @ theirs[key]
        assert_close(ours[other] @ ours[key], wanted, rtol=0, atol=1e-3 * float(wanted.abs().max()))
        # peft divides the inputs by their largest number, so its A is ours times one number, and B is ours divided.
        ratios = ours[key].norm(dim=1) / theirs[key].norm(dim=1)
        assert_close(ratios, ratios.mean().expand_as(ratios), rtol=1e-3, atol=0)
        U, weight = ours[key.replace("lora_A.weight", "corda_U")], model.get_submodule(site).weight
        weight = weight.T if name == "gpt2" else weight
        left = wrapped.get_submodule(f"base_model.model.{site}.base_layer").weight
        assert_close(weight - U @ U.T @ weight, left.T if name == "gpt2" else left, rtol=0, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("mode", wide(["ipm", "kpm"], ("ipm",)))
def test_corda_starts_as_the_base_and_is_loaded_without_data(
    base: tuple[str, nn.Module], mode: str, tmp_path: Path
) -> None:
    name, model = base
    inputs = batch()
    spec = f'adapter a = corda(rank = {RANK}, mode = "{mode}") {{ on {", ".join(TARGETS[name])} }}'
    adapted = compiler.apply(model, spec, calibration=[inputs])
    plain = model(**inputs).logits
    assert_close(adapted(**inputs).logits, plain, rtol=0, atol=1e-5 * float(plain.abs().max()))
    with adapted.disable_adapter():
        assert_close(adapted(**inputs).logits, plain, rtol=0, atol=1e-6 * float(plain.abs().max()))
    for key, each in adapted.named_parameters():
        if "adapter_bank" in key:
            each.add_(torch.randn_like(each) * 0.1)
    adapted.save_pretrained(tmp_path)
    assert_close(compiler.load(model, tmp_path)(**inputs).logits, adapted(**inputs).logits, rtol=0, atol=0)

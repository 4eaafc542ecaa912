"""All methods at once: a batch with a row for each, on models of every kind, is as every row is alone."""

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from peftc import compiler
from tests.parity.cases.case import Case
from tests.parity.method_cases import CASES
from tests.parity.mixed.test_models import MODELS, VOCABULARY, alone, inputs_of, row_of


def cases(model: str) -> list[Case]:
    """One of each method that adapts the linear layers it is told to, and is for the model's."""
    kind = "gpt2" if model == "gpt2" else "llama"
    fitting = [each for each in CASES if kind in each.models and not each.targets and not each.embeddings]
    return list({each.method: each for each in reversed(fitting)}.values())


def made(name: str) -> tuple[Any, list[str]]:
    torch.manual_seed(0)
    factory, (query, *others) = MODELS[name]
    target = others[0] if name == "bert" else query  # what changes its output
    model = compiler.apply(factory().eval(), f"adapter low = lora(rank = 2) {{ on {target} }}").eval()
    inputs = called(name, 2)
    for case in cases(name):
        spec = f"adapter a = {case.method}({case.arguments}) {{ on {target} {case.clauses} }}"
        model.add_adapter(spec, case.method, calibration=[inputs])
        for each in model.adapter_bank.get_submodule(case.method).parameters():
            each.data.add_(torch.randn_like(each) * case.std)
    model.set_adapter("low")
    return model, [case.method for case in cases(name)]


def called(name: str, rows: int) -> dict[str, torch.Tensor]:
    inputs = inputs_of(name, max(rows, 4))
    if name in ("t5", "whisper"):
        inputs["decoder_input_ids"] = torch.randint(3, VOCABULARY, (max(rows, 4), 5))
    return {key: each[:rows] for key, each in inputs.items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_every_row_is_as_it_is_alone(name: str) -> None:
    model, methods = made(name)
    assert len(methods) > 15
    names = [*methods, "__base__"]
    inputs = called(name, len(names))
    mixed = model(**inputs, adapter_names=names).logits
    wanted = [alone(model, each, lambda r=row: model(**row_of(inputs, r)).logits[0]) for row, each in enumerate(names)]
    moved = 0
    for row, (each, want) in enumerate(zip(names, wanted, strict=True)):
        aligned = want.dim() > 1 and "attention_mask" in inputs and "decoder_input_ids" not in inputs
        seen = inputs["attention_mask"][row].bool() if aligned else slice(None)
        limit = 2e-5 * float(want.abs().max().clamp(min=1))
        assert_close(mixed[row][seen], want[seen], rtol=0, atol=limit, msg=lambda m, each=each: f"{each}: {m}")
        plain = alone(model, "__base__", lambda r=row: model(**row_of(inputs, r)).logits[0])
        moved += int((plain[seen] - want[seen]).abs().max() > 2 * limit)
    assert moved == len(methods)
    if name == "bert":
        return
    inputs.pop("decoder_input_ids", None)
    more = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False)
    mixed = model.generate(**inputs, adapter_names=names, **more)
    for row, each in enumerate(names):
        text = alone(model, each, lambda r=row: model.generate(**row_of(inputs, r), **more))
        assert torch.equal(mixed[row : row + 1], text), each

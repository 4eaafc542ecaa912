"""Rows of one batch that have adapters of their own, for every method: each row is as it is alone."""

import pytest
import torch
from torch.testing import assert_close

from tests.parity.cases.case import TARGETS, Case
from tests.parity.method_cases import Base, batch, make_base, moved, pairs

everywhere = pairs(lambda case, name: name in case.models or not case.targets)


@pytest.fixture(scope="module")
def base(request: pytest.FixtureRequest) -> Base:
    return make_base(request.param)


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
@everywhere
def test_rows_are_as_they_are_alone(case: Case, base: Base) -> None:
    name, _, adapted = base
    inputs = batch(rows=5)
    names = ["made", "__base__", "low", "made", "other"]
    low = f"adapter low = lora(rank = 3) {{ on {TARGETS[name][0]} }}"
    try:
        adapted.add_adapter(low)
        adapted.add_adapter(f"adapter other = ia3 {{ on {', '.join(TARGETS[name])} }}")
        adapted.add_adapter(case.spec(name), "made", calibration=[inputs])
        for each, std in (("low", 0.3), ("other", 0.3), ("made", case.std)):
            adapted.set_adapter(each)
            moved(adapted, f"adapter_bank.{each}", std)
        adapted.set_adapter("low")
        mixed = adapted(**inputs, adapter_names=names).logits
        for row, each in enumerate(names):
            alone = {key: value[row : row + 1] for key, value in inputs.items()}
            if each == "__base__":
                with adapted.disable_adapter():
                    wanted = adapted(**alone).logits[0]
            else:
                adapted.set_adapter(each)
                wanted = adapted(**alone).logits[0]
            seen = inputs["attention_mask"][row].bool() if wanted.dim() > 1 else slice(None)
            limit = max(case.tolerance, 1e-5) * float(wanted.abs().max())
            assert_close(mixed[row][seen], wanted[seen], rtol=0, atol=limit)
        adapted.set_adapter("made")
        assert (mixed[0] - adapted(**{key: value[1:2] for key, value in inputs.items()}).logits[0]).abs().max() > 1e-3
    finally:
        adapted.delete_adapter(adapted._adapter_state.names())

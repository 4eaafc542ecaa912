"""Every built-in method against peft: outputs both ways, merging, and the start is the base exactly."""

import copy
from pathlib import Path

import peft
import pytest
import torch
from torch.testing import assert_close

from peftc.grammar.spec.library import builtin_methods
from tests.parity.cases import low_rank
from tests.parity.cases.case import Case
from tests.parity.method_cases import (
    CASES,
    Base,
    batch,
    make_base,
    moved,
    theirs,
    where_it_has_not,
    where_peft_has_it,
)


@pytest.fixture(scope="module")
def base(request: pytest.FixtureRequest) -> Base:
    return make_base(request.param)


def close(found: torch.Tensor, wanted: torch.Tensor, case: Case) -> None:
    assert_close(found, wanted, rtol=0, atol=case.tolerance * float(wanted.abs().max()))


def test_every_method_is_here() -> None:
    """But those that change no weight: test_prefix, test_prompt, test_cpt, test_adaption_prompt and test_tokens.

    And one that needs a quantized base, test_loftq, and one whose calls say tasks: tests/parity/mixed/test_tasks.
    """
    changing = {name for name, rule in builtin_methods().items() if rule.prompt is None and not rule.rows}
    assert {each.method for each in (*CASES, *low_rank.UNSAVED)} == changing - {"loftq", "poly"}


@pytest.mark.filterwarnings("ignore")
@where_peft_has_it
def test_both_ways(case: Case, base: Base, tmp_path: Path) -> None:
    name, model, adapted = base
    inputs = batch()
    with torch.no_grad():
        plain = model(**inputs).logits
        wrapped = theirs(case, name, model)
        wrapped.save_pretrained(tmp_path / "theirs")
        expected = wrapped(**inputs).logits
        assert (expected - plain).abs().max() > 1e-3
        adapted.load_adapter(tmp_path / "theirs", "loaded")
        try:
            close(adapted(**inputs).logits, expected, case)
            adapted.add_adapter(case.spec(name), "made", calibration=[inputs])
            if case.starts_as_base:
                assert_close(adapted(**inputs).logits, plain, rtol=0, atol=case.start_tolerance)
            moved(adapted, "adapter_bank.made", case.std)
            unmerged = adapted(**inputs).logits
            assert (unmerged - plain).abs().max() > 1e-3
            adapted.save_pretrained(tmp_path, selected_adapters=["made"])
            back = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "made").eval()
            close(back(**inputs).logits, unmerged, case)

            adapted.merge_adapter()
            close(adapted(**inputs).logits, unmerged, case)
            adapted.unmerge_adapter()
            assert torch.equal(adapted(**inputs).logits, unmerged)
        finally:
            adapted.delete_adapter(adapted._adapter_state.names())


@pytest.mark.filterwarnings("ignore")
@where_it_has_not
def test_where_peft_has_none(case: Case, base: Base) -> None:
    name, model, _ = base
    with pytest.raises((NotImplementedError, TypeError, ValueError)):
        theirs(case, name, model)

"""A file's tensor and the base's are compared in the type with fewer digits."""

import pytest
import torch

from peftc.runtime.peft_format.same_base import is_same

VALUES = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_either_may_have_been_rounded(narrow: torch.dtype) -> None:
    assert is_same(VALUES, VALUES.to(narrow))
    assert is_same(VALUES.to(narrow), VALUES)
    assert not is_same(VALUES + 1, VALUES.to(narrow))
    assert not is_same(VALUES + 1e-5, VALUES)


def test_what_cannot_be_compared_is_not_the_same() -> None:
    assert not is_same(VALUES, VALUES[:3])
    assert not is_same(VALUES, VALUES.to("meta"))

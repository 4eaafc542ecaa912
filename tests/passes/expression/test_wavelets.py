"""The filters of wavelets: what makes them one, and that they are peft's."""

import math

import numpy as np
import pytest
from peft.tuners.waveft.wavelet import Wavelet

from peftc.grammar.algebra.functions import WAVELETS
from peftc.passes.expression.wavelets import low_pass

every_family = pytest.mark.parametrize("family", WAVELETS)


@every_family
def test_shifts_by_two_are_orthonormal(family: str) -> None:
    taps = np.array(low_pass(family))
    products = [taps[shift:] @ taps[: len(taps) - shift] for shift in range(0, len(taps), 2)]
    assert np.abs(np.array(products) - np.eye(1, len(products))).max() < 1e-6
    assert abs(taps.sum() - math.sqrt(2)) < 1e-12


@every_family
def test_they_are_pefts(family: str) -> None:
    assert np.abs(np.array(low_pass(family)) - Wavelet(family).rec_lo).max() < 1e-6


def test_what_is_left_out_of_pefts_is_not_orthonormal() -> None:
    taps = np.array(Wavelet("coif4").rec_lo)
    assert abs(taps @ taps - 1) > 1e-3 or abs(taps[2:] @ taps[:-2]) > 1e-3

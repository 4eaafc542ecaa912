"""The low-pass filters of orthonormal wavelets, computed from what defines them."""

import functools
import itertools
import math
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

Filter = npt.NDArray[np.float64]

# Of a symlet and its mirror image, these are by convention the one with its energy late.
_LATE = (4, 5, 6, 8, 9, 10)

# Where Newton's method starts, for the solution that is called the coiflet.
_COIFLETS = {
    1: (-0.07, 0.34, 0.85, 0.38, -0.07, -0.02),
    2: (0.02, -0.04, -0.07, 0.39, 0.81, 0.42, -0.08, -0.06, 0.02, 0.01, -0.0, -0.0),
    3: (-0.0, 0.01, 0.02, -0.07, -0.06, 0.41, 0.79, 0.43, -0.07, -0.08, 0.03, 0.02, -0.01, -0.0, 0.0, 0.0, -0.0, -0.0),
}


@functools.cache
def low_pass(family: str) -> tuple[float, ...]:
    """The filter of `db1` to `db10`, `sym2` to `sym10` or `coif1` to `coif3`, with which signals are put together."""
    name, order = family.rstrip("0123456789"), int(family.lstrip("abcdefghijklmnopqrstuvwxyz"))
    match name:
        case "db":
            found = next(_factorisations(order))  # all roots inside the unit circle
        case "sym":
            found = _straightest(order)
        case _:
            found = _coiflet(order)
    return tuple(float(each) for each in found)


def _factorisations(order: int) -> Iterator[Filter]:
    """Every real orthonormal filter of `2 * order` taps whose wavelet has `order` vanishing moments."""
    halves: Iterable[complex] = (
        np.roots([math.comb(order - 1 + k, k) for k in reversed(range(order))]) if order > 1 else ()
    )
    groups: list[list[list[complex]]] = []
    for each in halves:
        if each.imag < -1e-7:
            continue  # its conjugate comes with the other
        pair = sorted(np.roots([1, -2 + 4 * each, 1]), key=abs)
        groups.append([[z.real] if abs(each.imag) < 1e-7 else [z, z.conjugate()] for z in pair])
    for choice in itertools.product((0, 1), repeat=len(groups)):
        roots = [root for group, pick in zip(groups, choice, strict=True) for root in group[pick]]
        taps = np.real(np.poly(np.concatenate([-np.ones(order), roots])))
        yield taps * math.sqrt(2) / taps.sum()


def _straightest(order: int) -> Filter:
    """The filter whose phase is nearest to a straight line."""
    best = min(_factorisations(order), key=lambda taps: round(_bend(taps), 4))
    place = np.arange(len(best))
    is_late = float((place * best**2).sum()) > (len(best) - 1) / 2
    return best if is_late == (order in _LATE) else best[::-1]


def _bend(taps: Filter) -> float:
    frequencies = np.linspace(1e-3, math.pi - 0.05, 400)
    phase = np.unwrap(np.angle(np.exp(-1j * np.outer(frequencies, np.arange(len(taps)))) @ taps))
    slope = (phase @ frequencies) / (frequencies @ frequencies)
    return float(np.abs(phase - slope * frequencies).max())


def _coiflet(order: int) -> Filter:
    """Orthonormal, with `2 * order` vanishing moments of the wavelet and one less of the scaling function."""
    taps, size = np.array(_COIFLETS[order], float), 6 * order
    place = (np.arange(size) - 2 * order) / (3 * order)
    signs = (-1.0) ** np.arange(size)
    for _ in range(60):
        rows, misses = [], []
        for shift in range(0, size, 2):
            row = np.zeros(size)
            row[: size - shift] += taps[shift:]
            row[shift:] += taps[: size - shift]
            rows.append(row)
            misses.append(float(taps[shift:] @ taps[: size - shift]) - (shift == 0))
        for moment in range(2 * order):
            rows += [signs * place**moment, place**moment]
            misses += [float(rows[-2] @ taps), float(rows[-1] @ taps) - (math.sqrt(2) if moment == 0 else 0)]
        taps = taps - np.linalg.lstsq(np.array(rows), np.array(misses), rcond=None)[0]
    return taps

import pytest
import torch

from peftc.passes.route import by_seat

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def anew():
    by_seat.has_kernel.cache_clear()
    yield
    by_seat.has_kernel.cache_clear()


def test_other_devices_have_none():
    assert not by_seat.has_kernel(torch.device("cpu"))
    assert not by_seat.has_kernel(torch.device("meta"))


def test_without_triton_there_is_none(monkeypatch, recwarn):
    monkeypatch.setattr(by_seat, "find_spec", lambda name: None)
    assert not by_seat.has_kernel(CUDA)
    assert not recwarn


def test_one_that_fails_is_left_aside_and_said_so(monkeypatch):
    def fails(device, dtype):
        raise RuntimeError("no such card\nmore")

    monkeypatch.setattr(by_seat, "find_spec", lambda name: object())
    monkeypatch.setattr(by_seat, "_is_right", fails)
    with pytest.warns(UserWarning, match="left aside: RuntimeError: no such card$"):
        assert not by_seat.has_kernel(CUDA)
    assert not by_seat.has_kernel(CUDA)  # and is not tried again


@pytest.mark.parametrize("right", [False, True])
def test_one_is_compared_with_what_it_should_give(right, monkeypatch):
    def multiplied(x, matrix, seats):
        return torch.bmm(x, matrix[seats if right else seats.flip(0)])

    monkeypatch.setattr(by_seat, "multiplied_by_seat", multiplied)
    assert by_seat._is_right(torch.device("cpu"), torch.float32) is right

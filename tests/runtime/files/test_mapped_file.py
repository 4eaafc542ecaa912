"""Tensors are read out of their file as safetensors reads them, of every type that it has."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from peftc.runtime.files.mapped_file import DamagedFileError, map_tensors
from peftc.runtime.files.tensor_file import TYPES, Entry, write_tensors


@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_every_type_is_read_as_it_was_written(kind, tmp_path):
    bits = torch.arange(1, 1 + 4 * kind.itemsize, dtype=torch.uint8)
    value = (bits % 2 if kind is torch.bool else bits).view(kind).reshape(2, 2)
    write_tensors(tmp_path / "ours", [Entry.like("x", value, lambda: value)])
    save_file({"x": value}, tmp_path / "theirs")
    for file in ("ours", "theirs"):
        for read in (map_tensors, load_file):
            found = read(tmp_path / file)["x"]
            assert (found.dtype, found.shape) == (kind, (2, 2))
            assert torch.equal(found.view(torch.uint8), value.view(torch.uint8))


def test_what_is_written_into_a_tensor_stays_out_of_its_file(tmp_path):
    save_file({"x": torch.ones(3)}, tmp_path / "a")
    map_tensors(tmp_path / "a")["x"].zero_()
    assert map_tensors(tmp_path / "a")["x"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("cut", [0, 4, 20, -1])
def test_half_a_file_is_damaged(cut, tmp_path):
    save_file({"x": torch.ones(3)}, tmp_path / "a")
    (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes()[:cut])
    with pytest.raises(DamagedFileError):
        map_tensors(tmp_path / "a")

from pathlib import Path

import pytest
import torch

from peftc.compiler.export_model.sink import sink

FULL = Path("/dev/full")  # a file of Linux that is on a disk without room


def program():
    return torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(3, 2),))


def test_what_is_written_is_there(tmp_path):
    with sink(tmp_path / "a.pt2") as file:
        torch.export.save(program(), file)
    loaded = torch.export.load(tmp_path / "a.pt2").module()
    assert loaded(torch.ones(3, 2)).shape == (3, 2)


@pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full")
def test_a_full_disk_is_told_when_all_is_written():
    with pytest.raises(OSError, match="No space left"), sink(FULL) as file:
        torch.export.save(program(), file)

"""The matrix that `python -m tests.parity` prints."""

import re

import pytest

from tests.parity import __main__ as matrix


@pytest.mark.filterwarnings("ignore")
def test_a_row_for_every_way_and_a_pair_of_columns_for_every_model(capsys: pytest.CaptureFixture[str]) -> None:
    matrix.main(["beft", "ia3"])
    rows = [[each.strip() for each in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    found = {row[0]: row[1:] for row in rows if row and row[0] in ("beft", "ia3")}
    assert set(found) == {"beft", "ia3"}
    for method, cells in found.items():
        errors = [float(each) for each in cells if re.fullmatch(r"\de[+-]\d\d", each)]
        assert len(errors) >= 4, method
        assert max(errors) < 1e-5

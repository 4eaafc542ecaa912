import pytest
import torch
from torch import nn

from peftc.runtime.base.replaced import put


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3, bias=False)).eval()


def objects(made):
    return {name: id(each) for name, each in [*made.state_dict(keep_vars=True).items(), *made.named_modules()]}


def test_put_again_it_undoes_itself():
    made = model()
    before = objects(made)
    new = {"0": nn.Linear(3, 3).train(), "0.bias": None, "2.bias": torch.ones(3), "1.running_mean": torch.ones(3)}
    was = put(made, new)
    assert made[0] is new["0"]
    assert not made[0].training
    assert made[0].bias is None
    assert isinstance(made[2].bias, nn.Parameter)
    assert objects(made) != before
    put(made, was)
    assert objects(made) == before


class InterruptedError(BaseException):
    """As a keyboard's."""


@pytest.mark.parametrize("error", [KeyError, InterruptedError])
def test_all_or_none(error):
    class Stops(dict):
        def items(self):
            yield from super().items()
            raise error

    made = model()
    before = objects(made)
    with pytest.raises(error):
        put(made, Stops({"0": nn.Linear(3, 3), "0.bias": None, "2.bias": torch.ones(3)}))
    assert objects(made) == before


def test_a_name_that_is_not_there_changes_nothing():
    made = model()
    before = objects(made)
    with pytest.raises(KeyError):
        put(made, {"0.bias": None, "0.nothing": torch.ones(3)})
    assert objects(made) == before

import inspect
from dataclasses import fields
from pathlib import Path

import pytest

from peftc import compiler
from peftc.runtime.peft_format.load_options import LoadOptions

# What is said of the model, not of how a checkpoint is read.
APART = {"self", "model", "peft_model_id", "adapter_name", "prepare_for_kbit_training", "regions", "progress"}
APART |= {"torch_device", "hotswap"}  # PEFT's, which changes nothing; and which adapter it takes the place of


@pytest.mark.parametrize("function", [compiler.load, compiler.AdaptedModel.load_adapter])
def test_every_argument_of_loading_is_an_option_with_its_default(function):
    parameters = inspect.signature(function).parameters.values()
    given = {each.name: each.default for each in parameters if each.name not in APART}
    assert given == {each.name: each.default for each in fields(LoadOptions)}


@pytest.mark.parametrize(("given", "expected"), [(None, None), ("here", Path("here")), (Path("here"), Path("here"))])
def test_where_downloads_are_kept(given, expected):
    assert LoadOptions(cache_dir=given).cache == expected

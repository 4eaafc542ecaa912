"""apply on plain modules; transformers' models are tested against peft in tests/parity."""

from collections import namedtuple
from dataclasses import dataclass

import peft
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from peftc import compiler
from peftc.compiler.api import adapt
from peftc.compiler.example_calls import prepare
from peftc.grammar.diagnostics import ModelError, SpecError
from peftc.grammar.spec.elaborate import read_spec

SPEC = "adapter a = lora(rank = 2, alpha = 4) { on all linear }"


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.second = nn.Linear(5, 3)

    def forward(self, x, y=None, *, scale: float = 1.0):
        hidden = torch.tanh(self.first(x)) * scale
        return self.second(hidden if y is None else hidden + y)


def moved(adapted):
    """With parameters away from their no-op values."""
    torch.manual_seed(0)
    for parameter in adapted.adapter_bank.parameters():
        nn.init.normal_(parameter)
    return adapted


def agrees(model, adapted, *args, **kwargs):
    """Disabled it is the model, merged it is the adapted, and adapted it is something else."""
    output = adapted(*args, **kwargs)
    with adapted.disable_adapter():
        assert_close(adapted(*args, **kwargs), model(*args, **kwargs))
    assert_close(adapted.merge_and_unload()(*args, **kwargs), output)
    with pytest.raises(AssertionError):
        assert_close(output, model(*args, **kwargs))
    return output


def test_from_a_path_a_text_and_a_spec(tmp_path):
    path = tmp_path / "a.adapter"
    path.write_text(SPEC)
    outputs = []
    model = Net().eval()
    for spec in (path, str(path), SPEC, read_spec(SPEC)):
        torch.manual_seed(0)
        adapted = compiler.apply(model, spec).eval()
        assert adapted.active_adapters() == ["a"]
        outputs.append(moved(adapted)(torch.ones(2, 4)))
    assert all(torch.equal(outputs[0], each) for each in outputs)


def test_a_missing_file():
    with pytest.raises(SpecError) as caught:
        compiler.apply(Net(), "no/such/file.adapter")
    assert "no/such/file.adapter" in str(caught.value)


def test_a_fresh_adapter_changes_nothing():
    model = Net().eval()
    x = torch.randn(3, 4)
    assert torch.equal(compiler.apply(model, SPEC).eval()(x), model(x))


def test_the_result_is_of_the_models_class():
    model = Net()
    adapted = compiler.apply(model, SPEC)
    assert isinstance(adapted, Net)
    assert type(adapted).__name__ == "Net"
    assert adapted.first.weight.data_ptr() == model.first.weight.data_ptr()
    trained = {name for name, each in adapted.named_parameters() if each.requires_grad}
    assert trained == {f"adapter_bank.a.{site}.{role}" for site in ("first", "second") for role in "AB"}
    assert all(each.requires_grad for each in model.parameters())


@pytest.mark.parametrize(
    "inputs",
    [(torch.ones(2, 4),), [torch.ones(2, 4)], {"x": torch.ones(2, 4)}, torch.ones(2, 4)],
    ids=["tuple", "list", "mapping", "tensor"],
)
def test_example_inputs(inputs, monkeypatch):
    adapted = compiler.apply(Net().eval(), SPEC, example_inputs=inputs)
    monkeypatch.setattr("peftc.compiler.api.Tracer", None)  # what was traced is not traced again
    assert adapted(torch.ones(5, 4)).shape == (5, 3)
    assert adapted(x=torch.ones(1, 4)).shape == (1, 3)


def test_example_inputs_that_do_not_fit():
    with pytest.raises(TypeError, match=r"Net\.forward has no argument 'z'"):
        compiler.apply(Net(), SPEC, example_inputs={"z": torch.ones(2, 4)})
    with pytest.raises(ModelError, match="E402"):
        compiler.apply(Net(), SPEC, example_inputs=(torch.ones(2, 7),))


def test_prepare_says_what_it_traced():
    call = prepare(adapt(Net().eval()), {"x": torch.ones(2, 4), "scale": 2.0})
    assert [name for name, _ in call.signature.arguments] == ["scale", "x"]


def test_arguments_by_place_by_name_and_left_out():
    model = Net().eval()
    adapted = moved(compiler.apply(model, SPEC).eval())
    x, y = torch.randn(3, 4), torch.randn(3, 5)
    agrees(model, adapted, x)
    both = agrees(model, adapted, x, y, scale=0.5)
    assert_close(adapted(y=y, x=x, scale=0.5), both)
    assert not torch.allclose(adapted(x, y, scale=2.0), both)
    with pytest.raises(TypeError, match="multiple values for argument 'x'"):
        adapted(x, x=x)
    with pytest.raises(TypeError, match="takes from 2 to 3 positional arguments but 4 were given"):
        adapted(x, y, 0.5)


def test_numbers_that_are_equal_and_not_the_same():
    """2 and 2.0 and True: a graph holds the one it saw."""

    class Kinds(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x, kind):
            return self.linear(x) * (3.0 if kind is True else 1.0) + (0.5 if isinstance(kind, float) else 0.0)

    model = Kinds().eval()
    adapted = compiler.apply(model, SPEC).eval()
    x = torch.randn(2, 4)
    for kind in (1, True, 1.0):
        assert_close(adapted(x, kind), model(x, kind), msg=repr(kind))


@pytest.mark.parametrize("order", [((1, 4), (6, 4)), ((6, 4), (1, 4)), ((2, 3, 4), (1, 1, 4)), ((1, 3, 4), (5, 2, 4))])
def test_sizes(order):
    model = Net().eval()
    adapted = moved(compiler.apply(model, SPEC).eval())
    for shape in order:
        agrees(model, adapted, torch.randn(shape))


def test_a_vector_without_a_batch():
    model = Net().eval()
    agrees(model, moved(compiler.apply(model, SPEC).eval()), torch.randn(4))


Pair = namedtuple("Pair", "main rest")


@dataclass
class Found:
    main: torch.Tensor
    rest: list[torch.Tensor]
    note: str = "fine"


SHAPES = {
    "tuple": lambda h, o: (o, h),
    "list": lambda h, o: [o, h],
    "dict": lambda h, o: {"main": o, "rest": {"hidden": h}},
    "named tuple": lambda h, o: Pair(o, [h, None]),
    "dataclass": lambda h, o: Found(o, [h]),
    "with constants": lambda h, o: (o, 3, "x", None),
    "an input": lambda h, o: (o, o),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_outputs(shape):
    class Shaped(Net):
        def forward(self, x):
            hidden = self.first(x)
            return SHAPES[shape](hidden, self.second(hidden))

    model = Shaped().eval()
    adapted = compiler.apply(model, SPEC).eval()
    x = torch.randn(2, 4)
    ours, theirs = adapted(x), model(x)
    assert type(ours) is type(theirs)
    assert_close(flat(ours), flat(theirs))


def flat(value):
    if isinstance(value, Found):
        return [value.main, *value.rest]
    if isinstance(value, dict):
        return [value["main"], value["rest"]["hidden"]]
    found = []
    for each in value:
        found += flat(each) if isinstance(each, list | tuple) else [each]
    return [each for each in found if isinstance(each, torch.Tensor)]


def test_running_statistics_are_the_adapted_models_own():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)).train()
    adapted = moved(compiler.apply(model, SPEC).train())
    x = torch.randn(8, 4) + 3.0
    for _ in range(3):
        adapted(x)
    assert adapted[1].num_batches_tracked == 3
    assert adapted[1].running_mean.abs().max() > 0
    assert model[1].num_batches_tracked == 0
    assert not model[1].running_mean.any()
    plain = adapted.merge_and_unload().eval()
    assert_close(plain(x), adapted.eval()(x))


def test_running_statistics_are_those_the_model_would_have():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)).train()
    adapted = compiler.apply(model, SPEC).train()
    for rows in (8, 3, 5):
        x = torch.randn(rows, 4)
        assert_close(adapted(x), model(x))
    for (name, ours), (_, theirs) in zip(adapted[1].named_buffers(), model[1].named_buffers(), strict=True):
        assert_close(ours, theirs, msg=name)


def test_training_moves_the_adapter_and_nothing_else():
    model = Net()
    adapted = moved(compiler.apply(model, SPEC))
    before = {name: each.clone() for name, each in adapted.named_parameters()}
    optimizer = torch.optim.SGD([each for each in adapted.parameters() if each.requires_grad], lr=0.1)
    adapted(torch.randn(6, 4)).square().sum().backward()
    optimizer.step()
    changed = {name for name, each in adapted.named_parameters() if not torch.equal(each, before[name])}
    assert changed == {name for name in before if name.startswith("adapter_bank.")}
    assert all(each.grad is None for each in model.parameters())


def test_a_root_that_is_the_linear():
    model = nn.Linear(4, 3).eval()
    with pytest.raises(SpecError, match="E201"):
        compiler.apply(model, SPEC)
    agrees(model, moved(compiler.apply(model, "adapter a = lora(rank = 2) { on weight }").eval()), torch.randn(2, 4))


def test_names_that_look_alike_when_flat():
    """Slots flatten dots: `a.b` and `a__b` are two sites."""

    class Alike(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.ModuleDict({"b": nn.Linear(4, 4)})
            self.a__b = nn.Linear(4, 4)

        def forward(self, x):
            return self.a["b"](x) + 2 * self.a__b(x)

    model = Alike().eval()
    agrees(model, moved(compiler.apply(model, SPEC).eval()), torch.randn(2, 4))


def test_a_wrapped_model_is_refused():
    wrapped = peft.get_peft_model(Net(), peft.LoraConfig(target_modules=["first"]))
    with pytest.raises(ModelError, match=r"E406.*wrapped by peft(.|\n)*model\.unload"):
        compiler.apply(wrapped, SPEC)


# --- where regions begin ---

BASE = 'base { regions = "modules" } '


def regions_of(adapted):
    return adapted.region_partition().asked


def test_a_spec_says_where_regions_begin():
    assert regions_of(compiler.apply(Net(), SPEC)) == "layers"
    assert regions_of(compiler.apply(Net(), BASE + SPEC)) == "modules"
    whole = compiler.apply(Net(), BASE.replace("modules", "model") + SPEC).region_partition()
    assert (whole.asked, whole.whole) == ("model", 'asked for by regions = "model"')


def test_what_is_passed_wins_over_the_spec():
    adapted = compiler.apply(Net(), BASE + SPEC, regions="layers")
    assert regions_of(adapted) == "layers"
    with pytest.raises(compiler.UsageError, match="E573"):
        compiler.apply(Net(), BASE + SPEC, regions="")


def test_a_checkpoint_keeps_what_its_spec_said(tmp_path):
    model = Net()
    compiler.apply(model, BASE + SPEC, regions="model").save_pretrained(tmp_path / "said")
    loaded = compiler.load(model, tmp_path / "said")
    assert regions_of(loaded) == "modules", "not what was passed beside it"
    assert regions_of(compiler.load(model, tmp_path / "said", regions="layers")) == "layers"
    loaded.save_pretrained(tmp_path / "again")
    assert regions_of(compiler.load(model, tmp_path / "again")) == "modules"
    text = compiler.decompile(tmp_path / "again", name="a")
    assert text.startswith('base {\n    regions = "modules"\n}\n')
    assert regions_of(compiler.apply(model, text)) == "modules"


def test_a_checkpoint_that_says_nothing_of_regions(tmp_path):
    model = Net()
    compiler.apply(model, SPEC, regions="modules").save_pretrained(tmp_path / "unsaid")
    assert regions_of(compiler.load(model, tmp_path / "unsaid")) == "layers"
    assert "regions" not in compiler.decompile(tmp_path / "unsaid")
    (tmp_path / "unsaid" / "peftc_manifest.json").unlink()
    assert regions_of(compiler.load(model, tmp_path / "unsaid")) == "layers", "as peft writes it"


def test_a_checkpoint_beside_others_leaves_regions_as_they_are(tmp_path):
    model = Net()
    compiler.apply(model, BASE + SPEC).save_pretrained(tmp_path / "said")
    adapted = compiler.apply(model, SPEC)
    adapted.load_adapter(tmp_path / "said", "b")
    assert regions_of(adapted) == "layers"


def test_a_checkpoint_with_regions_that_are_none(tmp_path):
    compiler.apply(Net(), BASE + SPEC).save_pretrained(tmp_path / "said")
    file = tmp_path / "said" / "peftc_manifest.json"
    file.write_text(file.read_text().replace('"modules"', '"module"'))
    with pytest.raises(compiler.CheckpointError, match=r"E360.*'regions' is not model, layers, modules or null"):
        compiler.load(Net(), tmp_path / "said")

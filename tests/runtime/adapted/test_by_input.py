"""Routes: each token is given as much of each adapter as it says, or the call is refused."""

import copy
import gc
import pickle
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import DynamicCache

from peftc import compiler
from peftc.grammar.diagnostics import ModelError, UsageError
from tests import zoo
from tests.stack import Stack

SPEC = """adapter one = lora(rank = 2, alpha = 8) { on q_proj, v_proj }
adapter two = lora(rank = 5) { on q_proj, up_proj }
adapter six = ia3 { on k_proj }
adapter all = dora(rank = 2) { on o_proj }
activate one + two + six + all"""
NAMES = ("one", "two", "six", "all")
IDS = torch.randint(3, 64, (2, 6), generator=torch.Generator().manual_seed(0))
NUMBERS = torch.rand(2, 6, 4, generator=torch.Generator().manual_seed(1))


def made(spec: str = SPEC, name: str = "llama", **options: Any) -> Any:
    return zoo.noisy(compiler.apply(zoo.make(name), spec, **options).eval())


def logits(model: Any, ids: torch.Tensor = IDS, **more: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=ids, **more).logits
    return found


def by_hand(model: Any, numbers: torch.Tensor, places: bool = False) -> torch.Tensor:
    """The base's logits, each adapted module's output moved as far towards that with one adapter as numbers say."""
    base, order = zoo.make("llama"), model.get_route_places()
    plain = {name: {} for name in NAMES}
    for name in NAMES:
        model.set_route(None)
        model.set_adapter(name)
        merged = model.merge_and_unload()
        plain[name] = {path: each for path, each in merged.named_modules() if isinstance(each, nn.Linear)}
    for path, module in base.named_modules():
        if path in order:
            own = numbers[:, :, order.index(path)] if places else numbers

            def moved(_: Any, args: Any, y: torch.Tensor, path: str = path, own: torch.Tensor = own) -> torch.Tensor:
                changes = [own[..., i : i + 1] * (plain[name][path](args[0]) - y) for i, name in enumerate(NAMES)]
                return y + sum(changes)

            module.register_forward_hook(moved)
    with torch.no_grad():
        return logits(base)


@pytest.mark.parametrize("form", ["rows", "tokens", "places"])
@torch.no_grad()
def test_every_form_of_an_answer(form: str) -> None:
    model = made()
    model.set_route(lambda input_ids: NUMBERS)
    count = len(model.get_route_places())
    assert count == 5 * len(zoo.make("llama").model.layers)
    numbers = {"rows": NUMBERS[:, 0], "tokens": NUMBERS, "places": torch.rand(2, 6, count, 4)}[form]
    model.set_route(lambda input_ids: numbers)
    got = logits(model)
    assert (got - logits(zoo.make("llama"))).abs().max() > 0.01
    whole = numbers[:, None].expand(2, 6, 4) if form == "rows" else numbers
    assert_close(got, by_hand(model, whole, form == "places"), atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_all_of_one_and_nothing_of_any() -> None:
    model, alone = made(), made()
    alone.set_adapter("two")
    model.set_route(lambda input_ids: torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]))
    got = logits(model)
    assert_close(got[0], logits(alone)[0], atol=1e-5, rtol=1e-5)
    assert_close(got[1], logits(zoo.make("llama"))[1], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_what_a_route_is_given() -> None:
    model, base, seen = made(), zoo.make("llama"), []

    def route(hidden_states: torch.Tensor, input_ids: torch.Tensor, attention_mask: Any = None) -> torch.Tensor:
        seen.append((hidden_states, input_ids, attention_mask))
        return hidden_states[..., :4].sigmoid()

    model.set_route(route)
    logits(model)
    hidden, ids, mask = seen.pop()
    assert_close(hidden, base(input_ids=IDS, output_hidden_states=True).hidden_states[-1])
    assert torch.equal(ids, IDS)
    assert mask is None
    logits(model, attention_mask=torch.ones_like(IDS))
    assert seen.pop()[2] is not None


@torch.no_grad()
def test_beside_an_adapter_that_is_always_there() -> None:
    model, plain = made(), made()
    model.set_route(lambda input_ids: torch.zeros(2, 2), ["one", "two"])
    plain.set_adapter(["six", "all"])
    assert_close(logits(model), logits(plain), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_generation_sees_the_whole_text() -> None:
    model, steps = made(), []

    def route(input_ids: torch.Tensor) -> torch.Tensor:
        steps.append(input_ids.shape[1])
        return torch.stack([(input_ids % 5) / 5.0] * 4, -1)

    model.set_route(route)
    found = model.generate(input_ids=IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert steps == [6, 7, 8]
    text = IDS
    for _ in range(3):
        text = torch.cat([text, logits(model, text)[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, text)


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 4)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.layer(hidden_states).softmax(-1)
        return found


def trained(checkpointing: bool) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model, router = made(), Router()
    model.set_route(router)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    return model, router


@pytest.mark.parametrize("regions", ["layers", "modules"])
def test_a_module_is_trained_with_the_model(regions: Any) -> None:
    """Two calls before their backward passes: each is computed again with its own numbers."""
    found = []
    for checkpointing in (False, True):
        model, router = trained(checkpointing)
        assert "adapter_bank._route.layer.weight" in dict(model.named_parameters())
        losses = [model(input_ids=ids, labels=ids, use_cache=False).loss for ids in (IDS, IDS.flip(1))]
        torch.stack(losses).sum().backward()
        grads = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
        assert router.layer.weight.grad is not None
        assert router.layer.weight.grad.abs().max() > 0
        found.append(grads)
    assert found[0].keys() == found[1].keys()
    for name, each in found[0].items():
        assert_close(found[1][name], each, atol=1e-6, rtol=1e-4)


def test_a_gradient_against_a_difference() -> None:
    model = made().double().eval()
    weight = torch.full((2, 4), 0.3, dtype=torch.float64, requires_grad=True)
    model.set_route(lambda input_ids: weight)
    logits(model).square().sum().backward()
    step = torch.zeros_like(weight)
    step[1, 2] = 1e-2
    with torch.no_grad():
        ends = []
        for sign in (1, -1):
            model.set_route(lambda input_ids, sign=sign: weight + sign * step)
            ends.append(logits(model).square().sum())
    assert weight.grad is not None
    assert_close(weight.grad[1, 2], (ends[0] - ends[1]) / 2e-2, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_copies_and_pickles() -> None:
    model, _ = trained(False)
    model.eval()
    others = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    want = logits(model)
    for other in others:
        assert_close(logits(other), want)
        other.get_route().layer.weight.zero_()
        assert (logits(other) - want).abs().max() > 1e-5
        assert_close(logits(model), want)


@torch.no_grad()
def test_threads_have_numbers_of_their_own() -> None:
    model, barrier = made(), threading.Barrier(2)
    ids = [IDS, torch.flip(IDS, (1,))]

    def route(input_ids: torch.Tensor) -> torch.Tensor:
        barrier.wait(20)
        return torch.stack([(input_ids % 7) / 7.0] * 4, -1)

    model.set_route(lambda input_ids: torch.stack([(input_ids % 7) / 7.0] * 4, -1))
    wanted = [logits(model, each) for each in ids]
    model.set_route(route)
    got: dict[int, torch.Tensor] = {}

    def run(number: int) -> None:
        with torch.no_grad():
            got[number] = logits(model, ids[number])

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(60)
    for number, want in enumerate(wanted):
        assert_close(got[number], want)


@torch.no_grad()
def test_the_route_rests_with_its_adapters() -> None:
    model = made()
    model.set_route(lambda input_ids: NUMBERS[..., :2], ["one", "two"])
    want = logits(model)
    with model.disable_adapter():
        assert_close(logits(model), logits(zoo.make("llama")))
    model.set_adapter("six")
    plain = made()
    plain.set_adapter("six")
    assert_close(logits(model), logits(plain))
    model.set_adapter(["one", "two", "six", "all"])
    assert_close(logits(model), want)
    model.set_route(None)
    assert (logits(model) - want).abs().max() > 1e-3
    assert_close(logits(model), logits(made()))


# --- what is refused ---


def refused(code: str, model: Any, **more: Any) -> None:
    with pytest.raises((UsageError, ModelError), match=code):
        logits(model, **more)


@torch.no_grad()
def test_what_calls_are_refused() -> None:
    model = made()
    model.set_route(lambda input_ids: NUMBERS)
    want = logits(model)
    cache = zoo.make("llama")(input_ids=IDS, use_cache=True).past_key_values
    refused("E538", model, past_key_values=cache)
    refused("E538", model, adapter_names=["one", "two"])
    with pytest.raises(UsageError, match="E538"):
        model.generate(input_ids=IDS, max_new_tokens=2, use_cache=True)
    with pytest.raises(UsageError, match="E535"):
        model.model(IDS)
    with pytest.raises(UsageError, match="E536"):
        model.set_adapter("one")
    with pytest.raises(UsageError, match="E536"):
        model.delete_adapter("one")
    with pytest.raises(UsageError, match="E536"):
        model.merge_adapter(["one"])
    with pytest.raises(UsageError, match="E536"):
        model.merge_and_unload()
    assert model.active_adapters == list(NAMES)
    assert_close(logits(model), want)
    for wrong in (NUMBERS[..., :3], NUMBERS[:1], 0.5, NUMBERS.flatten()):
        model.set_route(lambda input_ids, wrong=wrong: wrong)
        refused("E537", model)
    model.set_route(lambda inputs_embeds: NUMBERS)
    refused("E537", model)


@torch.no_grad()
def test_a_compiler_is_refused() -> None:
    model = made()
    model.set_route(lambda input_ids: NUMBERS)
    want = logits(model)
    with pytest.raises(Exception, match="E538"):
        logits(torch.compile(model, backend="eager"))
    torch._dynamo.reset()
    assert_close(logits(model), want)


@pytest.mark.parametrize(
    ("code", "route", "names"),
    [
        ("E537", lambda hiden_states: NUMBERS, None),
        ("E537", lambda labels_of_mine: NUMBERS, None),
        ("E510", lambda input_ids: NUMBERS, ["one", "tow"]),
        ("E512", lambda input_ids: NUMBERS, ["one", "one"]),
        ("E536", lambda input_ids: NUMBERS, []),
    ],
)
@torch.no_grad()
def test_a_route_that_is_refused_changes_nothing(code: str, route: Any, names: Any) -> None:
    model = made()
    model.set_route(lambda input_ids: NUMBERS)
    want, before = logits(model), model.get_route()
    with pytest.raises(UsageError, match=code):
        model.set_route(route, names)
    assert model.get_route() is before
    assert_close(logits(model), want)


def test_an_adapter_of_which_there_is_no_part() -> None:
    model = made("adapter a = lora(rank = 2) { on q_proj }\nadapter b = lora(rank = 2) { on q_proj train lm_head }")
    with pytest.raises(UsageError, match="E513"):
        model.set_route(lambda input_ids: NUMBERS, ["a", "b"])
    assert model.get_route() is None


def test_one_graph_of_the_whole_model() -> None:
    model = made(regions="model")
    model.set_route(lambda input_ids: NUMBERS)
    refused("E538", model)


class Turned(nn.Module):
    """Rows and tokens change places before the adapted weight."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.fc(x.transpose(0, 1)).transpose(0, 1)
        return found


class Sorted(nn.Module):
    """Tokens are sorted by what they are before the adapted weight."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, 8)
        order = flat[:, 0].argsort()
        return torch.zeros_like(flat).index_copy(0, order, self.fc(flat[order])).view(x.shape)


class Backwards(nn.Module):
    """Tokens are read from the last to the first."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.fc(x.flip(1)).flip(1)
        return found


class Flat(nn.Module):
    """Rows and tokens are one axis where the adapted weight is."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.reshape(-1, 8)).view(x.shape)


def stack(kind: type[nn.Module]) -> Stack:
    torch.manual_seed(0)
    return Stack(kind() for _ in range(2))


def in_order(kind: type[nn.Module], regions: Any, tokens: int) -> None:
    base = stack(kind)
    spec = "adapter a = lora(rank = 2) { on fc }\nadapter b = lora(rank = 3) { on fc }\nactivate a + b"
    model = zoo.noisy(compiler.apply(base, spec, regions=regions).eval())
    x, numbers = torch.randn(5, tokens, 8), torch.rand(5, tokens, 2)
    plain = [each.weight for each in (layer.fc for layer in base.layers)]
    deltas = []
    for name in "ab":
        model.set_adapter(name)
        deltas.append(
            [layer.fc.weight - own for layer, own in zip(model.merge_and_unload().layers, plain, strict=True)]
        )
    model.set_adapter(["a", "b"])
    model.set_route(lambda x: numbers)
    got, want = model(x), x
    for place, layer in enumerate(base.layers):
        change = sum(numbers[..., i : i + 1] * (want @ each[place].T) for i, each in enumerate(deltas))
        want = layer.fc(want) + change
    assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tokens", [3, 5])
@torch.no_grad()
def test_rows_and_tokens_in_one_axis(tokens: int) -> None:
    in_order(Flat, "layers", tokens)


@pytest.mark.parametrize("kind", [Turned, Sorted, Backwards])
@pytest.mark.parametrize("tokens", [3, 5])
@torch.no_grad()
def test_tokens_in_another_order_are_refused(kind: type[nn.Module], tokens: int) -> None:
    with pytest.raises(ModelError, match="E425"):
        in_order(kind, "layers", tokens)


@pytest.mark.parametrize(("kind", "code"), [(Turned, "E535"), (Sorted, "E465"), (Flat, "E465")])
@torch.no_grad()
def test_modules_that_are_not_called_with_rows_of_tokens(kind: type[nn.Module], code: str) -> None:
    with pytest.raises((ModelError, UsageError), match=code):
        in_order(kind, "modules", 3)


# --- what one call has is no other's ---


def const(*numbers: float) -> Any:
    return lambda input_ids: torch.tensor([numbers]).expand(len(input_ids), -1)


@torch.no_grad()
def test_another_route_over_other_adapters() -> None:
    """Also back again, and after the first was taken away."""
    model = made()
    base, six = logits(zoo.make("llama")), made()
    six.set_adapter(["six", "all"])
    wanted = {2: logits(six), 4: base}
    for count in (2, 4, 2):
        model.set_route(const(*[0.0] * count), NAMES[:count])
        assert_close(logits(model), wanted[count], atol=1e-5, rtol=1e-5)
        if count == 4:
            model.set_route(None)


@torch.no_grad()
def test_an_empty_cache_is_not_filled_on_the_way() -> None:
    model = made()
    model.set_route(lambda hidden_states: hidden_states[..., :4].sigmoid())
    cache = DynamicCache(config=model.config)
    got = logits(model, past_key_values=cache, use_cache=True)
    assert cache.get_seq_length() == IDS.shape[1]
    assert_close(got, logits(model))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int64])
@torch.no_grad()
def test_an_answer_of_another_type(dtype: torch.dtype) -> None:
    model = made(SPEC.replace("o_proj", "o_proj, lm_head"))
    model.set_route(lambda input_ids: torch.tensor([[1, 0, 1, 1], [0, 1, 1, 0]]))
    want = logits(model)
    model.set_route(lambda input_ids: torch.tensor([[1, 0, 1, 1], [0, 1, 1, 0]]).to(dtype))
    got = logits(model)
    assert got.dtype is torch.float32
    assert_close(got, want)


@pytest.mark.parametrize("change", ["another route", "none", "disabled", "another adapter"])
@torch.no_grad()
def test_a_call_has_what_was_there_when_it_began(change: str) -> None:
    model = made()

    def route(input_ids: torch.Tensor) -> torch.Tensor:
        if change == "another route":
            model.set_route(const(0.0, 0.0), ["two", "one"])
        elif change == "none":
            model.set_route(None)
        elif change == "disabled":
            model.disable_adapters()
        else:
            model._adapter_state.activate((("six", 1.0),))
        return NUMBERS[..., :2]

    model.set_route(lambda input_ids: NUMBERS[..., :2], ["one", "two"])
    want = logits(model)
    model.set_route(route, ["one", "two"])
    assert_close(logits(model), want)


@torch.no_grad()
def test_logits_of_some_tokens() -> None:
    model = made(SPEC.replace("o_proj", "o_proj, lm_head"))
    model.set_route(lambda input_ids: torch.stack([(input_ids % 5) / 5.0] * 4, -1))
    for kept in (1, torch.tensor([3, 2, 1, 0])):
        refused("E538", model, logits_to_keep=kept)
    found = model.generate(input_ids=IDS, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    text = IDS
    for _ in range(2):
        text = torch.cat([text, logits(model, text)[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, text)
    with pytest.raises(UsageError, match=r"E538.*\n.*input_ids"):
        model.generate(inputs_embeds=model.get_input_embeddings()(IDS), max_new_tokens=2)


def test_what_becomes_active_is_trained_as_the_others() -> None:
    spec = "adapter one = lora(rank = 2) { on q_proj }\nadapter two = lora(rank = 2) { on q_proj }\nactivate one"
    model = compiler.apply(zoo.make("llama"), spec)
    model.set_route(const(0.5, 0.5), ["one", "two"])
    assert all(each.is_trainable for each in map(model._adapter_state.adapter, ("one", "two")))
    frozen = compiler.apply(zoo.make("llama"), spec)
    frozen.set_requires_grad("two", False)
    frozen.set_route(const(0.5, 0.5), ["one", "two"])
    assert not frozen._adapter_state.adapter("two").is_trainable


def test_nothing_of_adapters_that_are_gone_is_kept() -> None:
    model = made()
    model.set_route(const(0.5, 0.5), ["one", "two"])
    logits(model)
    gone = weakref.ref(model._adapter_state.adapter("two"))
    model.set_route(None)
    model.delete_adapter("two")
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(
    ("route", "code"),
    [(5, "E537"), (lambda hidden_states: hidden_states, "E538"), (lambda input_ids: input_ids, "E538")],
)
def test_models_that_no_route_is_for(route: Any, code: str) -> None:
    if callable(route) and "input_ids" in route.__code__.co_varnames:
        model = compiler.apply(zoo.make("t5"), "adapter a = lora { on q }")
    elif callable(route):
        model = compiler.apply(stack(Flat), "adapter a = lora { on fc }")
    else:
        model = made()
    with pytest.raises(UsageError, match=code):
        model.set_route(route)

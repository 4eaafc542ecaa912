from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from peftc.passes.insert.insert_delta import UnfitError
from peftc.passes.ir import pass_manager
from peftc.passes.ir.emit import Emit, Origin
from peftc.passes.optimize.clean import Clean
from peftc.passes.virtual_tokens.insert_prefix import CarryPrompt, InsertPrefix, cut_cache
from peftc.passes.virtual_tokens.insert_prompt import InsertPrompt

aten = torch.ops.aten
PREFIX, PROMPT = "adapter a = prefix(length = 3)", "adapter a = prompt(length = 3)"
TASKS = "adapter b = multitask_prompt(length = 2, tasks = 4)"
IDS = torch.tensor([[0, 5, 2, 6, 2], [1, 1, 5, 0, 3]])


def prefixed(lab, *specs, name="Reader"):
    active, graph = lab.active(name, *(specs or (PREFIX,))), lab.graph(name)
    insert = InsertPrefix(active.structure, active.slot_value, 2)
    return graph, active, insert, pass_manager.run(graph, [Clean(), insert]).changes["insert-prefix"]


def carried(lab, *specs, name="Reader"):
    active, graph = lab.active(name, *(specs or (PROMPT,))), lab.graph(name)
    insert = CarryPrompt(active.structure, 2)
    return graph, active, insert, pass_manager.run(graph, [Clean(), insert]).changes["carry-prompt"]


def text(past, name="Reader"):
    """A text after `past` tokens in a cache; the first row has padding."""
    mask = torch.ones(2, past + 5, dtype=torch.long)
    mask[0, :2] = 0
    given = {"input_ids": IDS, "position_ids": torch.arange(past, past + 5).repeat(2, 1), "attention_mask": mask}
    if name == "Judge":
        given |= {"attention_mask": torch.randn(2, 1, 5, past + 5), "target_labels": IDS.flip(1)}
    return given | {"past_0_key": torch.randn(2, 2, past, 4), "past_0_value": torch.randn(2, 2, past, 4)}


def plain(model, given, lead):
    """What the model says where it is told itself of keys and values `lead` `[rows, heads, length, size]` in front."""
    given, length = dict(given), lead[0].shape[2]
    if "target_labels" in given:
        given["labels"] = given.pop("target_labels")
    for name, own in zip(("past_0_key", "past_0_value"), lead, strict=True):
        given[name] = torch.cat([own.expand(2, -1, -1, -1), given[name]], 2)
    mask = given["attention_mask"]
    given["attention_mask"] = F.pad(mask, (length, 0), value=1.0 if mask.dim() == 2 else 0.0)
    given["position_ids"] = given["position_ids"] + length
    *own, keys, values = model(**given)
    return (*own, keys[:, :, length:], values[:, :, length:])


def as_heads(prefix):
    """`[length, 2 * 8]` as keys and values `[1, heads, length, size]`."""
    return tuple(each.unflatten(1, (2, 4)).transpose(0, 1)[None] for each in prefix.split(8, 1))


@pytest.mark.parametrize(("run", "file"), [(prefixed, "insert_prefix"), (carried, "carry_prompt")])
def test_golden(run, file, lab, golden):
    graph, _, _, change = run(lab)
    assert change.made > 0
    golden(f"passes/virtual_tokens/{file}.txt", lab.show(graph))


@pytest.mark.parametrize("past", [0, 4])
@pytest.mark.parametrize(
    ("name", "specs"),
    [("Reader", (PREFIX,)), ("Judge", (PREFIX,)), ("Reader", (PREFIX, "adapter b = prefix(length = 2)"))],
)
def test_numbers(name, specs, past, lab):
    graph, active, *_ = prefixed(lab, *specs, name=name)
    model, given = lab.model(name), text(past, name)
    prefix = torch.cat([active.tensor(position, "@cache", "P") for position in range(len(specs))])
    got = lab.results(graph, lab.tensors(name) | active.tensors, **given)
    assert_close(got, plain(model, given, as_heads(prefix)))
    assert got[-1].shape[2] == past + 5, "the caller's cache holds its own tokens"
    without = plain(model, given, as_heads(prefix[:0]))
    with pytest.raises(AssertionError):
        assert_close(got[0], without[0])


@pytest.mark.parametrize("name", ["Reader", "Judge"])
def test_numbers_of_what_is_carried(name, lab):
    graph, *_ = carried(lab, name=name)
    model, given = lab.model(name), text(4, name)
    lead = torch.randn(2, 1, 2, 3, 4).unbind()
    got = lab.results(graph, lab.tensors(name), **given, carried_0_key=lead[0], carried_0_value=lead[1])
    assert_close(got, plain(model, given, lead))
    assert got[-1].shape[2] == 9
    with pytest.raises(AssertionError):
        assert_close(got[0], plain(model, given, [each[:, :, :0] for each in lead])[0])


def test_a_text_goes_on_as_it_began(lab):
    """What insert-prompt leaves for later calls is what carry-prompt takes."""
    specs = (PROMPT, TASKS)
    active, start = lab.active("Reader", *specs), lab.graph("Reader")
    pass_manager.run(start, [Clean(), InsertPrompt(active.structure, active.slot_value, 2)])
    later, *_ = carried(lab, *specs)
    tensors, whole, tasks = lab.tensors("Reader") | active.tensors, text(0), torch.tensor([3, 1])
    said, keys, values, *left = lab.results(start, tensors, **whole, task_ids=tasks)
    first = {name: each[:, :2] for name, each in whole.items() if not name.startswith("past")}
    _, first_keys, first_values, *left = lab.results(start, tensors, **first, **text_cache(whole), task_ids=tasks)
    rest = {"input_ids": IDS[:, 2:], "position_ids": whole["position_ids"][:, 2:]}
    rest |= {"attention_mask": whole["attention_mask"], "past_0_key": first_keys, "past_0_value": first_values}
    got = lab.results(later, tensors, **rest, carried_0_key=left[0], carried_0_value=left[1])
    assert_close(got, (said[:, 2:], keys, values))
    assert left[0].shape == (2, 2, 5, 4), "a prompt by task is another one in every row"


def text_cache(given):
    return {name: each for name, each in given.items() if name.startswith("past")}


@pytest.mark.parametrize("run", [prefixed, carried])
def test_twice_is_once(run, lab):
    graph, _, insert, _ = run(lab)
    once = lab.show(graph)
    assert insert.run(graph).made == 0
    assert lab.show(graph) == once


def test_nothing_in_front_changes_nothing(lab):
    active, graph = lab.active("Reader", "adapter a = lora(rank = 2) { on query }"), lab.graph("Reader")
    before = lab.show(graph)
    for insert in (InsertPrefix(active.structure, active.slot_value, 2), CarryPrompt(active.structure, 2)):
        assert insert.run(graph) == pass_manager.Change()
    assert lab.show(graph) == before


def cached_graph(lab, layers=1, heads=2, size=4, side=""):
    """A graph by hand that gives its cache and its mask back."""
    hand = lab.hand()
    mask = hand.placeholder(f"{side}attention_mask", 2, 4, dtype=torch.int64)
    names = [f"past_{layer}_{part}" for layer in range(layers) for part in ("key", "value")]
    past = [hand.placeholder(name, 2, heads, 4, size) for name in names]
    return hand.done(hand.call(aten.clone.default, mask), *(hand.call(aten.clone.default, each) for each in past))


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"layers": 0}, "the call has no cache of keys and values"),
        ({"layers": 2}, "its config says 1 layers, and the cache has 2"),
        ({"heads": 4}, "its config says 2 heads of 4 numbers, and past_0_key has 4 of 4"),
        ({"size": 8}, "its config says 2 heads of 4 numbers, and past_0_key has 2 of 8"),
    ],
)
def test_another_cache_than_the_config_says_is_refused(sizes, reason, lab):
    active, graph = lab.active("Reader", PREFIX), cached_graph(lab, **sizes)
    before = lab.show(graph)
    with pytest.raises(UnfitError) as refused:
        InsertPrefix(active.structure, active.slot_value, 2).run(graph)
    assert (refused.value.reason, refused.value.site.kind) == (reason, "cache")
    assert lab.show(graph) == before


@pytest.mark.parametrize(("layers", "slots"), [(1, [0]), (2, [0, 0]), (3, [0, 4, 2]), (4, [0, 4, 0, 4])])
def test_layers_beside_an_encoder_read_the_places_that_files_are_made_for(layers, slots, lab):
    active, graph = lab.active("Reader", PREFIX), cached_graph(lab, layers, side="decoder_")
    (front,) = active.structure.fronts
    front = replace(front, site=replace(front.site, layers=layers))
    prefix = torch.randn(3, 2 * layers, 2, 4)
    structure = replace(active.structure, fronts=(front,))
    given = {f"past_{layer}_{part}": torch.randn(2, 2, 1, 4) for layer in range(layers) for part in ("key", "value")}

    def value(position, site, role, near):
        with near.meta["val"].fake_mode:
            return torch.empty(3, 16 * layers)

    # The outputs are copies of what the layers see: none is the cache's, so none is cut.
    InsertPrefix(structure, value, 0, encoder_decoder=True).run(graph)
    tensors = {"slots.p0__@cache.P": prefix.flatten(1)}
    mask, *seen = lab.results(graph, tensors, decoder_attention_mask=torch.zeros(2, 1), **given)
    assert mask.tolist() == [[1, 1, 1, 0]] * 2
    for index, (own, past) in enumerate(zip(seen, given.values(), strict=True)):
        slot = slots[index // 2] + index % 2
        assert_close(own, torch.cat([prefix[:, slot].transpose(0, 1).expand(2, -1, -1, -1), past], 2))


def test_only_the_caches_own_outputs_are_cut(lab):
    hand = lab.hand()
    said, own, cross = (hand.placeholder(name, 1, 1, 5, 2) for name in ("said", "own", "cross"))
    graph = hand.done(said, own, cross)
    emit = Emit(graph, graph.find_nodes(op="output")[0], Origin("test"), like=own)
    assert cut_cache(graph, emit, 1, 3, 0) == []
    assert cut_cache(graph, emit, 1, 3, 2) == [own]
    values = {name: torch.randn(1, 1, 5, 2) for name in ("said", "own", "cross")}
    got = lab.results(graph, {}, **values)
    assert_close(got, (values["said"], values["own"][:, :, 3:], values["cross"]))

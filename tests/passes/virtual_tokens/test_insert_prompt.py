from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from peftc.passes.insert.insert_delta import UnfitError
from peftc.passes.ir import pass_manager
from peftc.passes.optimize.clean import Clean
from peftc.passes.virtual_tokens.insert_prompt import IGNORED, InsertPrompt

aten = torch.ops.aten
PROMPT = "adapter a = prompt(length = 3)"
COMPATIBLE = "adapter a = prompt(length = 3, peft_compatible = true)"
TASKS = "adapter b = multitask_prompt(length = 2, tasks = 4, ranks = 2)"
LABELLED = """method m(length: int = 3) {
    on prompt
    param P[length, out] = normal saved "P"
    param L[length]      = zeros  saved "L"
    prompt' = P
    labels' = L
} adapter a = m"""
IDS = torch.tensor([[0, 5, 2, 6, 2], [1, 1, 5, 0, 3]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


def inserted(lab, *specs, name="Reader", graph=None, **options):
    active = lab.active(name, *(specs or (PROMPT,)))
    graph = lab.graph(name) if graph is None else graph
    insert = InsertPrompt(active.structure, active.slot_value, 2, **options)
    return graph, active, insert, pass_manager.run(graph, [Clean(), insert]).changes["insert-prompt"]


def encoder(lab):
    """A trace that takes no cache: an encoder's mask is as long as its text."""
    return lab.copy(lab.trace(lab.model("Reader"), *(torch.ones(2, 5, dtype=torch.int64) for _ in range(3))))


def text(name="Reader"):
    given = {"input_ids": IDS, "attention_mask": MASK, "position_ids": torch.arange(5).repeat(2, 1)}
    if name == "Judge":
        given |= {"attention_mask": torch.randn(2, 1, 5, 5), "target_labels": IDS.flip(1)}
    return given | {f"past_0_{each}": torch.zeros(2, 2, 0, 4) for each in ("key", "value")}


def plain(model, given, prompt, labels=IGNORED):
    """What the model says where it is told itself of embeddings `prompt` `[rows, length, 8]` in front."""
    given, length = dict(given), prompt.shape[1]
    ids, positions, mask = given.pop("input_ids"), given["position_ids"], given["attention_mask"]
    given["inputs_embeds"] = torch.cat([prompt, model.embed(ids)], 1)
    given["position_ids"] = torch.cat([torch.arange(length).repeat(2, 1), positions + length], 1)
    if mask.dim() == 2:
        given["attention_mask"] = F.pad(mask, (length, 0), value=1)
    else:
        front = torch.full((length, length), torch.finfo(mask.dtype).min).triu(1)
        front = F.pad(front, (0, mask.shape[3]), value=torch.finfo(mask.dtype).min)
        given["attention_mask"] = torch.cat([front.expand(2, 1, -1, -1), F.pad(mask, (length, 0))], 2)
    if "target_labels" in given:
        front = torch.as_tensor(labels).expand(2, length)
        given["labels"] = torch.cat([front, given.pop("target_labels")], 1)
    return model(**given)


def prompt_of(active):
    return active.tensor(0, "@prompt", "P")[None].expand(2, -1, -1)


def test_golden(lab, golden):
    graph, _, _, change = inserted(lab, TASKS)
    assert change.made > 0
    golden("passes/virtual_tokens/insert_prompt.txt", lab.show(graph))


@pytest.mark.parametrize("name", ["Reader", "Judge"])
@pytest.mark.parametrize("spec", [PROMPT, COMPATIBLE])
def test_numbers(name, spec, lab):
    graph, active, *_ = inserted(lab, spec, name=name)
    model, given = lab.model(name), text(name)
    *loss, said, keys, values, carried_keys, carried_values = lab.results(
        graph, lab.tensors(name) | active.tensors, **given
    )
    *wanted_loss, wanted, wanted_keys, wanted_values = plain(model, given, prompt_of(active))
    assert_close(loss, wanted_loss)
    assert_close(said, wanted if spec == COMPATIBLE else wanted[:, 3:])
    assert_close((keys, values), (wanted_keys[:, :, 3:], wanted_values[:, :, 3:]))
    assert_close((carried_keys, carried_values), (wanted_keys[:1, :, :3], wanted_values[:1, :, :3]))
    assert said.shape[1] == (8 if spec == COMPATIBLE else 5)
    without = plain(model, given, prompt_of(active)[:, :0])[-3]
    with pytest.raises(AssertionError):
        assert_close(said[:, -5:], without)


def test_numbers_of_tasks_beside_a_prompt_for_all(lab):
    graph, active, *_ = inserted(lab, PROMPT, TASKS)
    model, given, tasks = lab.model("Reader"), text(), torch.tensor([3, 1])
    shared, columns, rows = (active.tensor(1, "@prompt", role) for role in "PCR")
    own = torch.stack([shared * (columns[task] @ rows[task]) for task in tasks])
    tensors = lab.tensors("Reader") | active.tensors
    got = lab.results(graph, tensors, **given, task_ids=tasks)
    said, keys, values = plain(model, given, torch.cat([prompt_of(active), own], 1))
    assert_close(got, (said[:, 5:], keys[:, :, 5:], values[:, :, 5:], keys[:, :, :5], values[:, :, :5]))
    assert not torch.allclose(got[0], lab.results(graph, tensors, **given, task_ids=tasks.flip(0))[0])


def test_a_methods_own_labels_are_in_the_loss(lab):
    graph, active, *_ = inserted(lab, LABELLED, name="Judge")
    model, given, labels = lab.model("Judge"), text("Judge"), torch.tensor([4, IGNORED, 2])
    active.tensors["slots.p0__@prompt.L"] = labels.float()
    loss = lab.results(graph, lab.tensors("Judge") | active.tensors, **given)[0]
    assert_close(loss, plain(model, given, prompt_of(active), labels)[0])
    assert not torch.allclose(loss, plain(model, given, prompt_of(active))[0])


def test_virtual_tokens_of_an_encoder_stand_behind_padding(lab):
    """And nothing is cut off: what it says of them is for the decoder to read."""
    graph, active, *_ = inserted(lab, graph=encoder(lab), encoder_decoder=True)
    model, given, prompt = lab.model("Reader"), text(), active.tensor(0, "@prompt", "P")
    embedded = model.embed(IDS)
    rows = [torch.cat([embedded[0, :2], prompt, embedded[0, 2:]]), torch.cat([prompt, embedded[1]])]
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1] * 8])
    wanted = model(inputs_embeds=torch.stack(rows), attention_mask=mask)
    got = lab.results(graph, lab.tensors("Reader") | active.tensors, **given)
    assert_close(got, wanted)
    compatible = inserted(lab, COMPATIBLE, graph=encoder(lab), encoder_decoder=True)[0]
    first = lab.results(compatible, lab.tensors("Reader") | active.tensors, **given)
    assert_close(first, plain(model, given, prompt_of(active)))
    with pytest.raises(AssertionError):
        assert_close(first, wanted)


def test_embeddings_that_are_given_and_no_mask(lab):
    model = lab.model("Reader")
    graph = lab.copy(lab.trace(model, *[None] * 6, torch.zeros(2, 3, 8)))
    _, active, *_ = inserted(lab, graph=graph)
    given = torch.randn(2, 5, 8)
    got = lab.results(graph, lab.tensors("Reader") | active.tensors, inputs_embeds=given)
    said, keys, values = model(inputs_embeds=torch.cat([prompt_of(active), given], 1))
    assert_close(got, (said[:, 3:], keys[:, :, 3:], values[:, :, 3:], keys[:1, :, :3], values[:1, :, :3]))


@pytest.mark.parametrize("options", [{}, {"encoder_decoder": True}])
def test_twice_is_once(options, lab):
    graph = encoder(lab) if options else None
    graph, _, insert, _ = inserted(lab, PROMPT, TASKS, graph=graph, **options)
    once = lab.show(graph)
    assert insert.run(graph) == pass_manager.Change()
    assert lab.show(graph) == once


def test_nothing_in_front_changes_nothing(lab):
    active, graph = lab.active("Reader", "adapter a = lora(rank = 2) { on query }"), lab.graph("Reader")
    assert InsertPrompt(active.structure, active.slot_value, 2).run(graph) == pass_manager.Change()


def embedding(lab, weight="embed.weight", within="embed"):
    """Ids that are embedded, with a scale that the module applies; types and bounds beside them."""
    hand = lab.hand()
    ids, types, start = (hand.placeholder(name, *size, dtype=torch.int64) for name, *size in INPUTS)
    rows = hand.call(aten.embedding.default, hand.attribute(weight, 9, 8), ids)
    scaled = hand.call(aten.mul.Tensor, rows, 3.0)
    for node in (rows, scaled):
        node.meta["nn_module_stack"] = {"each": (within, torch.nn.Embedding)}
    return hand.done(
        hand.call(aten.neg.default, scaled), *(hand.call(aten.neg.default, each) for each in (types, start))
    )


INPUTS = (("input_ids", 2, 4), ("token_type_ids", 2, 4), ("start_positions", 2))


def test_what_else_a_call_says_of_its_tokens(lab):
    """Types get zeros, bounds move, and the prompt is put before what the module returns, after its scale."""
    active = lab.active("Reader", COMPATIBLE)
    graph = embedding(lab)
    weight, prompt = torch.randn(9, 8), active.tensor(0, "@prompt", "P")
    InsertPrompt(active.structure, active.slot_value, 0, filler=7).run(graph)
    given = {"input_ids": IDS, "token_type_ids": IDS + 1, "start_positions": torch.tensor([1, 4])}
    hidden, types, start = lab.results(graph, {"embed.weight": weight} | active.tensors, **given)
    assert_close(-hidden, torch.cat([prompt.expand(2, -1, -1), 3 * weight[IDS]], 1))
    assert torch.equal(-types, F.pad(IDS + 1, (3, 0)))
    assert (-start).tolist() == [4, 7]
    fillers = [node.args[2] for node in graph.find_nodes(op="call_function", target=aten.new_full.default)]
    assert sorted(fillers) == [0, 7], "an id that is the padding's would be masked by some models"


def test_a_decoder_that_reads_the_encoders_mask(lab):
    """A call with what the encoder made and no tokens for it: only the mask is too short."""
    hand = lab.hand()
    mask = hand.placeholder("attention_mask", 2, 5, dtype=torch.int64)
    graph = hand.done(hand.call(aten.neg.default, mask))
    _, _, insert, change = inserted(lab, graph=graph, encoder_decoder=True)
    assert change.made > 0
    wanted = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1] * 8])
    assert torch.equal(-lab.run(graph, {}, MASK), wanted)
    assert insert.run(graph) == pass_manager.Change()
    compatible = hand_mask(lab)
    inserted(lab, COMPATIBLE, graph=compatible, encoder_decoder=True)
    assert torch.equal(-lab.run(compatible, {}, MASK), F.pad(MASK, (3, 0), value=1))


def hand_mask(lab):
    hand = lab.hand()
    return hand.done(hand.call(aten.neg.default, hand.placeholder("attention_mask", 2, 5, dtype=torch.int64)))


def test_a_call_without_tokens_is_refused(lab):
    with pytest.raises(UnfitError, match="the call gives neither input_ids nor inputs_embeds"):
        inserted(lab, graph=hand_mask(lab))


def test_an_embedding_that_is_not_found_is_refused(lab):
    graph = embedding(lab, weight="other.weight")
    with pytest.raises(UnfitError, match="its output is not found in the graph"):
        inserted(lab, graph=graph)
    active = lab.active("Reader", PROMPT)
    (front,) = active.structure.fronts
    tied = replace(active.structure, fronts=(replace(front, site=replace(front.site, tied=("other.weight",))),))
    assert InsertPrompt(tied, active.slot_value, 0).run(embedding(lab, weight="other.weight")).made > 0

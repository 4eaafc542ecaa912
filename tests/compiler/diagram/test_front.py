from collections.abc import Mapping
from itertools import pairwise

import pytest
import torch
import transformers

from peftc import compiler
from peftc.compiler.diagram import build, diff, to_dot
from peftc.compiler.diagram.model import Node, Picture
from peftc.compiler.jobs import drawing

SPEC = """
adapter led = prefix(length = 3)
adapter said = prompt(length = 3)
adapter also = ptuning(length = 5, hidden = 4)
adapter tasks = multitask_prompt(length = 2, tasks = 3)
adapter seen = adaption_prompt(length = 3)
adapter words = lora(rank = 2) {
    on     q_proj
    tokens [3, 5] in embed_tokens, lm_head
}
"""


@pytest.fixture(scope="module")
def adapted():
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return compiler.apply(transformers.LlamaForCausalLM(config).eval(), SPEC)


def graphs(adapted, *names):
    adapted.set_adapter(list(names))
    ids = torch.ones((2, 6), dtype=torch.long)
    return drawing.graphs(adapted, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def titled(picture: Picture) -> Mapping[str, Node]:
    """Nodes by title, the one of an adapter by its name."""
    adapters = {node.id: picture.adapter_name(node.position or 0) for node in picture.nodes if node.kind == "adapter"}
    return {adapters.get(node.id, node.title): node for node in picture.nodes}


def lines(picture: Picture) -> set[tuple[str, str]]:
    names = {node.id: title for title, node in titled(picture).items()}
    return {(names[e.source], names[e.target]) for e in picture.edges if e.source in names and e.target in names}


def test_a_prefix_stands_in_front_of_every_layers_cache(adapted):
    before, after = graphs(adapted, "led")
    picture = build(after, names=("led",))
    found = titled(picture)
    assert found["led"].lines == ("keys and values of 3 virtual tokens", "P 3×32")
    assert {("led", "⊕"), ("past_*_key", "⊕"), ("past_*_value", "⊕"), ("⊕", "concat")} <= lines(picture)
    masks = [node for node in picture.nodes if node.title == "mask" and node.kind == "widened"]
    assert [node.lines for node in masks] == [("3 more in front",)]
    assert [each.fold.count for each in picture.clusters if each.fold] == [2]
    assert {node.title for node in diff(before, after, names=("led",)).nodes if node.status == "added"} == {
        "",
        "⊕",
        "mask",
    }


def test_prompts_stand_in_front_of_the_embeddings_and_are_cut_off_the_output(adapted):
    """Also where they are longer than the text that was traced."""
    picture = build(graphs(adapted, "said", "also")[1], names=("said", "also"))
    found = titled(picture)
    assert found["said"].lines == ("prompt of 3 virtual tokens", "P 3×16")
    assert found["also"].lines[0] == "prompt of 5 virtual tokens"
    assert found["ids"].lines == ("room for 8 in front",)
    assert found["text only"].lines == ("without the first 8",)
    way = ["input_ids", "ids", "embed_tokens", "⊕", "input_layernorm"]
    assert set(pairwise(way)) <= lines(picture)
    assert {("said", "⊕"), ("also", "⊕"), ("lm_head", "text only"), ("text only", "output")} <= lines(picture)
    assert found["input_layernorm"].kind == "norm"  # one node: it reads no weight of the prompt's
    text = to_dot(picture)
    assert "⊕: put in front of it" in text
    assert "made to fit what adapters put in front" in text


def test_a_call_that_names_no_task_is_drawn_with_the_first(adapted):
    found = titled(build(graphs(adapted, "tasks")[1], names=("tasks",)))
    assert found["task_ids"].kind == "input"
    assert found["tasks"].lines[:2] == ("prompt of 2 virtual tokens", "P 2×16")


def test_attention_to_a_prompt_and_rows_of_tokens_say_what_they_do(adapted):
    picture = build(graphs(adapted, "led", "seen")[1], names=("led", "seen"))
    said = titled(picture)["seen"].lines
    assert said == (
        "attention to learned prompts",
        "P 1×3×16, g 1",
        "k_proj, v_proj of them; attention",
        "× g",
        "o_proj",
    )
    before, after = graphs(adapted, "led", "words")
    rows = {node.module: node.lines for node in build(after).nodes if "rows 2×16" in node.lines}
    assert rows == {
        "model.embed_tokens": ("rows 2×16", "of 2 tokens, in place of the base's"),
        "lm_head": ("rows 2×16", "of 2 tokens, for their logits"),
    }
    struck = [each for node in diff(before, after).nodes for each in node.weights if each.status == "removed"]
    assert struck == []

"""A bench for passes: small traced graphs, texts a person can read, and graphs run on real tensors."""

import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.pytorch_utils import Conv1D

from peftc.compiler.pipeline.lower import copy_graph
from peftc.compiler.trace.trace import Tracer
from peftc.grammar.spec.elaborate import read_spec
from peftc.passes.foreign.transformers import argument_of
from peftc.passes.ir.emit import Origin, fake_like
from peftc.passes.ir.inputs import CacheSlot, InputSpec, describe
from peftc.passes.ir.roles import Role
from peftc.passes.ir.traced import Traced
from peftc.passes.plan.plan import IDS, ORDER, ROWS, AdapterPlan
from peftc.passes.plan.resolve import resolve, survey
from peftc.passes.plan.structure import (
    LOG_WEIGHT,
    Structure,
    copy_slot,
    float_of,
    rows_slot,
    site_slot,
    slot_role,
    structure_of,
    weighted,
)
from peftc.runtime.execution.call import read_call


class Two(nn.Module):
    """Two linears with an activation between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.second = nn.Linear(6, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


class Lookup(nn.Module):
    """An embedding, a Conv1D, and a parameter that is multiplied by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4, padding_idx=0)
        self.conv = Conv1D(6, 4)
        self.bag = Bag()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.bag(self.conv(self.embed(ids)))


class Bag(nn.Module):
    """A parameter held directly."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(5, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ self.table.T)


class Experts(nn.Module):
    """A stack of three experts in one parameter, all of them run."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(3, 4, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.matmul(x, self.stack.transpose(-1, -2))


class Tied(nn.Module):
    """An embedding whose weight is the head's too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.embed(ids)))


class Attention(nn.Module):
    """Grouped heads, repeated, under a mask that is true where a token may look."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(8, 8, bias=False)
        self.key = nn.Linear(8, 4, bias=False)
        self.value = nn.Linear(8, 4, bias=False)

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        query = self._heads(self.query(hidden), 4)
        key, value = (self._repeat(self._heads(each(hidden), 2)) for each in (self.key, self.value))
        first = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return nn.functional.scaled_dot_product_attention(first, key, value, attn_mask=mask)

    def _heads(self, x: torch.Tensor, count: int) -> torch.Tensor:
        return x.view(x.shape[0], x.shape[1], count, 2).transpose(1, 2)

    def _repeat(self, x: torch.Tensor) -> torch.Tensor:
        rows, heads, length, size = x.shape
        return x[:, :, None].expand(rows, heads, 2, length, size).reshape(rows, heads * 2, length, size)


class Seer(nn.Module):
    """Two layers that attend, by the operator and by hand, to tokens with learned positions."""

    config = SimpleNamespace(num_hidden_layers=2, num_attention_heads=2, head_dim=4, hidden_size=8)

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(9, 8)
        self.position_embeddings = nn.Embedding(16, 8)
        self.layers = nn.ModuleList([Looking(by_hand=False), Looking(by_hand=True)])

    def forward(self, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden = self.tokens(input_ids) + self.position_embeddings(torch.arange(input_ids.shape[1]))
        for layer in self.layers:
            hidden = hidden + layer(hidden, mask)
        return hidden


class Looking(nn.Module):
    """Two heads of four numbers under a mask that is added, with projections of the usual names."""

    def __init__(self, by_hand: bool) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(8, 8, bias=by_hand) for _ in range(4))
        self.by_hand = by_hand

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        query, key, value = (
            each(hidden).view(*hidden.shape[:2], 2, 4).transpose(1, 2)
            for each in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.by_hand:
            scores = torch.matmul(query, key.transpose(2, 3)) * 0.5 + mask
            seen = torch.matmul(nn.functional.softmax(scores, dim=-1), value)
        else:
            seen = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.o_proj(seen.transpose(1, 2).reshape(hidden.shape))


class Scan(nn.Module):
    """Convolutions of every number of axes: a strided one, a grouped and dilated one, one that wraps around."""

    def __init__(self) -> None:
        super().__init__()
        self.strided = nn.Conv2d(3, 4, (3, 2), stride=2, padding=1)
        self.grouped = nn.Conv2d(4, 6, 2, dilation=2, groups=2, padding="same")
        self.line = nn.Conv1d(6, 5, 3, padding=1, padding_mode="circular", bias=False)
        self.solid = nn.Conv3d(5, 2, (1, 2, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = self.grouped(torch.relu(self.strided(x)))
        line = self.line(torch.tanh(seen).mean(-1))
        return self.solid(line[:, :, None, :, None])


class Packed(nn.Module):
    """A MultiheadAttention that looks at itself, and one that looks at another sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.MultiheadAttention(8, 2, batch_first=True)
        self.other = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        seen = self.own(x, x, x, need_weights=False)[0]
        return self.other(seen, y, y)[0]


class Reader(nn.Module):
    """One layer that attends to a cache of plain tensors, which it returns longer, with a loss where labels are given.

    A mask is `[rows, places]` of ones and zeros, or is added to the scores and then says everything.
    """

    config = SimpleNamespace(num_hidden_layers=1, num_attention_heads=2, head_dim=4, hidden_size=8)

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(9, 8), nn.Embedding(32, 8)
        self.query, self.key, self.value, self.head = (nn.Linear(8, 8, bias=False) for _ in range(4))
        self.say = nn.Linear(8, 9, bias=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_0_key: torch.Tensor | None = None,
        past_0_value: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        hidden = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        now = hidden.shape[1]
        if position_ids is None:
            position_ids = torch.arange(now)
        hidden = hidden + self.places(position_ids)
        query, key, value = (
            each(hidden).view(hidden.shape[0], now, 2, 4).transpose(1, 2) for each in (self.query, self.key, self.value)
        )
        if past_0_key is not None and past_0_value is not None:
            key, value = torch.cat([past_0_key, key], 2), torch.cat([past_0_value, value], 2)
        keys = key.shape[2]
        mask = attention_mask
        if mask is None or mask.dim() == 2:
            seen = torch.arange(keys) <= torch.arange(keys - now, keys)[:, None]
            mask = torch.where(seen if mask is None else seen & (mask != 0)[:, None, None], 0.0, -1e9)
        weights = torch.softmax(torch.matmul(query, key.mT) + mask, -1)
        said = self.say(torch.tanh(self.head(torch.matmul(weights, value).transpose(1, 2).flatten(2))))
        if labels is None:
            return said, key, value
        return nn.functional.cross_entropy(said.flatten(0, 1), labels.flatten()), said, key, value


class Judge(Reader):
    """The same with a mask for every query, and labels."""


MODELS = {each.__name__: each for each in (Two, Lookup, Experts, Tied, Attention, Seer, Scan, Packed, Reader, Judge)}
INPUTS: dict[str, tuple[torch.Tensor, ...]] = {
    "Two": (torch.zeros(2, 5, 4),),
    "Lookup": (torch.ones(2, 5, dtype=torch.long),),
    "Experts": (torch.zeros(3, 2, 5),),
    "Tied": (torch.ones(2, 5, dtype=torch.long),),
    "Scan": (torch.zeros(2, 3, 9, 8),),
    "Packed": (torch.zeros(2, 5, 8), torch.zeros(2, 3, 8)),
    "Seer": (torch.ones(2, 5, dtype=torch.long), torch.zeros(2, 1, 5, 5)),
    "Attention": (torch.zeros(2, 5, 8), torch.ones(2, 1, 5, 5, dtype=torch.bool)),
    "Reader": (
        torch.ones(2, 3, dtype=torch.long),
        torch.ones(2, 7, dtype=torch.long),
        torch.ones(2, 3, dtype=torch.long),
        torch.zeros(2, 2, 4, 4),
        torch.zeros(2, 2, 4, 4),
    ),
    "Judge": (
        torch.ones(2, 3, dtype=torch.long),
        torch.zeros(2, 1, 3, 7),
        torch.ones(2, 3, dtype=torch.long),
        torch.zeros(2, 2, 4, 4),
        torch.zeros(2, 2, 4, 4),
        torch.ones(2, 3, dtype=torch.long),
    ),
}


@dataclass
class Active:
    """Adapters of a model: their structure, and tensors, none at its no-op value, by the paths that graphs read."""

    structure: Structure
    tensors: dict[str, Any]
    plans: tuple[AdapterPlan, ...]

    def slot_value(self, position: int, site: str, role: str, near: fx.Node) -> torch.Tensor:
        trained = rows_slot(position, site) if role in (ROWS, IDS, ORDER) else site_slot(position, site)
        tensor = self.tensors[f"{trained}.{role.removeprefix('@')}"]
        return fake_like(tensor.shape, tensor.dtype, near)

    def tensor(self, position: int, site: str, role: str) -> torch.Tensor:
        return self.tensors[f"{site_slot(position, site)}.{role}"]

    def delta(self, position: int, site: str, scale: float) -> torch.Tensor:
        """What LoRA adds to a plain site's weight, as a person would write it."""
        return scale * self.tensor(position, site, "B") @ self.tensor(position, site, "A")


class _Evaluate(fx.Interpreter):
    def __init__(self, graph: fx.Graph, tensors: Mapping[str, Any]):
        super().__init__(nn.Module(), garbage_collect_values=False, graph=graph)
        self._tensors = tensors

    def fetch_attr(self, target: str) -> Any:
        return self._tensors[target]


class Lab:
    """Makes, shows and runs graphs. Traces are made once."""

    def __init__(self) -> None:
        self._traces: dict[tuple[str, bool], tuple[nn.Module, Traced]] = {}

    def model(self, name: str, training: bool = False) -> nn.Module:
        """One of the models above, the same object every time."""
        return self._traced(name, training)[0]

    def graph(self, name: str, training: bool = False) -> fx.Graph:
        """A copy of its trace."""
        return copy_graph(self._traced(name, training)[1].graph)

    def copy(self, graph: fx.Graph) -> fx.Graph:
        """A copy of a graph."""
        return copy_graph(graph)

    def traced(self, name: str, training: bool = False) -> Traced:
        """Its trace."""
        return self._traced(name, training)[1]

    def tensors(self, name: str, training: bool = False) -> dict[str, Any]:
        """What its trace reads."""
        model, traced = self._traced(name, training)
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        return {**dict(named), **traced.constants}

    def trace(self, model: nn.Module, *args: torch.Tensor) -> fx.Graph:
        """The trace of a model of the test's own."""
        return Tracer(model).trace(self._call(model, args)).graph

    def active(self, name: str, *specs: str, weights: tuple[float, ...] = ()) -> Active:
        """Adapters, in this order of activation; `weights` are those of prefixes."""
        model = self.model(name)
        ground = survey(model)
        plans = tuple(resolve(read_spec(each).adapters[0], ground) for each in specs)
        generator = torch.Generator().manual_seed(7)
        tensors: dict[str, Any] = {}
        dtypes: list[dict[tuple[str, str], torch.dtype]] = [{} for _ in plans]
        for position, plan in enumerate(plans):
            for at in plan.sites:
                slot = site_slot(position, at.site.name)
                for param in at.bound.params:
                    tensors[f"{slot}.{param.role}"] = torch.randn(param.shape, generator=generator)
                    dtypes[position][at.site.name, param.role] = torch.float32
                scalars = dict(at.bound.scalars)
                carrier = weighted(at.bound.weight)[1]
                for scalar in {*scalars, *([carrier] if carrier else [])}:
                    value = scalars.get(scalar, 1.0)
                    tensors[f"{slot}.{scalar}"] = torch.tensor(value)
                    tensors[float_of(f"{slot}.{scalar}")] = value
            for copy in plan.copies:
                for tensor, shape, _ in copy.tensors:
                    path = f"{copy_slot(position, copy.module)}.{slot_role(tensor)}"
                    tensors[path] = torch.randn(shape, generator=generator)
                    dtypes[position][copy.module, tensor] = torch.float32
            for rows in plan.rows:
                slot = rows_slot(position, rows.module)
                tensors[f"{slot}.rows"] = torch.randn(len(rows.ids), rows.width, generator=generator)
                tensors[f"{slot}.ids"] = torch.tensor(sorted(rows.ids))
                tensors[f"{slot}.order"] = torch.tensor(rows.order)
                dtypes[position][rows.module, ROWS] = torch.float32
        for position, weight in enumerate(weights):
            tensors[f"{site_slot(position, '@cache')}.{LOG_WEIGHT}"] = torch.tensor(weight).log()
        return Active(structure_of(list(zip(plans, dtypes, strict=True)), weights), tensors, plans)

    def run(self, graph: fx.Graph, tensors: Mapping[str, Any], *inputs: torch.Tensor) -> torch.Tensor:
        """The one output of a graph on real tensors."""
        (output,) = _Evaluate(graph, tensors).run(*inputs)
        return output

    def results(self, graph: fx.Graph, tensors: Mapping[str, Any], **inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The outputs of a graph on real tensors, given by the names of its inputs."""
        names = [str(node.target) for node in graph.find_nodes(op="placeholder")]
        return tuple(_Evaluate(graph, tensors).run(*(inputs[name] for name in names)))

    def show(self, graph: fx.Graph) -> str:
        """A line a node: what it holds, what it calls, who made it. Sizes that may vary are shown as `?`."""
        return "\n".join(self._line(node) for node in graph.nodes) + "\n"

    def hand(self) -> "Hand":
        """A graph built by hand."""
        return Hand()

    def _traced(self, name: str, training: bool) -> tuple[nn.Module, Traced]:
        if (name, training) not in self._traces:
            with torch.random.fork_rng():
                torch.manual_seed(3)
                model = MODELS[name]().train(training)
            traced = Tracer(model).trace(self._call(model, INPUTS[name]))
            for node in traced.graph.find_nodes(op="placeholder"):
                described(node)
            self._traces[name, training] = model, traced
        return self._traces[name, training]

    def _call(self, model: nn.Module, args: tuple[torch.Tensor, ...]) -> Any:
        names = inspect.signature(model.forward).parameters
        return read_call("", model.training, None, dict(zip(names, args, strict=False)))

    def _line(self, node: fx.Node) -> str:
        if node.op == "output":
            return f"return {node.args[0]}"
        target = str(node.target).removesuffix(".default") if node.op == "call_function" else node.target
        arguments = [str(each) for each in node.args] + [f"{key}={value}" for key, value in node.kwargs.items()]
        right = f"{target}({', '.join(arguments)})" if node.op == "call_function" else f"{node.op} {target}"
        origin = node.meta.get("peftc")
        made = f"  # {_origin(origin)}" if isinstance(origin, Origin) else ""
        return f"{node.name}: {_kind(node.meta['val'])} = {right}{made}"


def _kind(value: object) -> str:
    if isinstance(value, torch.Tensor):
        sizes = ", ".join(str(size) if isinstance(size, int) else "?" for size in value.shape)
        return f"{str(value.dtype).removeprefix('torch.')}[{sizes}]"
    return "size" if isinstance(value, torch.SymInt) else type(value).__name__


def _origin(origin: Origin) -> str:
    position = "" if origin.position is None else f"#{origin.position}"
    return " ".join(each for each in (origin.made_by, origin.site, position, origin.role) if each)


PAST = re.compile(r"past_(\d+)_(key|value)")


def described(node: fx.Node) -> fx.Node:
    """Say of an input what its name says: these models take the tensors of a cache one by one."""
    name = str(node.target)
    past = PAST.fullmatch(name)
    if past is not None:
        describe(node, InputSpec(name, Role.CACHE, slot=CacheSlot(int(past[1]), past[2])))
    else:
        argument = argument_of(name, encoder_decoder=name.startswith("decoder_"))
        describe(node, InputSpec(name, argument.role, argument.stack))
    return node


class Hand:
    """Builds a graph node by node, with fake values."""

    def __init__(self) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.graph = fx.Graph()

    def placeholder(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> fx.Node:
        return described(self._valued(self.graph.placeholder(name), shape, dtype))

    def attribute(self, target: str, *shape: int, dtype: torch.dtype = torch.float32) -> fx.Node:
        return self._valued(self.graph.create_node("get_attr", target), shape, dtype)

    def call(self, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(op, args, kwargs)
        values = fx.map_arg((args, kwargs), lambda each: each.meta["val"])
        with self.mode:
            node.meta["val"] = op(*values[0], **values[1])
        return node

    def done(self, *nodes: fx.Node) -> fx.Graph:
        self.graph.output(nodes)
        return self.graph

    def _valued(self, node: fx.Node, shape: tuple[int, ...], dtype: torch.dtype) -> fx.Node:
        with self.mode:
            node.meta["val"] = torch.empty(shape, dtype=dtype)
        return node


@pytest.fixture(scope="session")
def lab_of_all() -> Lab:
    return Lab()


@pytest.fixture
def lab(lab_of_all: Lab) -> Iterator[Lab]:
    """The bench, with torch's random state set and given back."""
    with torch.random.fork_rng():
        torch.manual_seed(11)
        yield lab_of_all

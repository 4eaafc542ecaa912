"""Trains adapters in two processes, each with half of the batch, wrapped in every way: `python -m ... RESULTS`.

One adapter is active, or each row has its own. Written for each way: the losses of the steps, and the adapters after
them, or what went wrong.
"""

import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from peftc import compiler
from peftc.peft import get_peft_model_state_dict

IDS = torch.arange(4, 44).view(4, 10)
SPEC = """adapter a = dora(rank = 4, alpha = 8) { on q_proj, v_proj, down_proj }
adapter b = lora(rank = 2) { on v_proj, o_proj }
activate a"""
NAMES = ["a", "b", "b", "a"]  # `fully_shard` wants the same parameters to be used in all processes
UNEVEN = ["a", "b", "__base__", "a"]
Names = list[str] | None
STEPS, RATE, SECONDS = 3, 0.5, 600


def adapted() -> Any:
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, pad_token_id=0))
    model = compiler.apply(base, SPEC, progress=False).train()
    torch.manual_seed(1)
    with torch.no_grad():
        for each in model.adapter_bank.parameters():
            each.add_(torch.randn_like(each) * 0.1)
    return model


def called(model: Any, ids: torch.Tensor, names: Names) -> torch.Tensor:
    loss: torch.Tensor = model(input_ids=ids, labels=ids, use_cache=False, adapter_names=names).loss
    return loss


def steps(model: Any, ids: torch.Tensor, names: Names) -> list[torch.Tensor]:
    optimizer, losses = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=RATE), []
    for _ in range(STEPS):
        loss = called(model, ids, names)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach().clone())
    return losses


def by_module(model: Any) -> Any:
    """FSDP as accelerate has it: each layer, then the rest."""
    policy = partial(transformer_auto_wrap_policy, transformer_layer_cls={LlamaDecoderLayer})
    return FullyShardedDataParallel(model, use_orig_params=True, device_id="cpu", auto_wrap_policy=policy)


def sharded(model: Any) -> Any:
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WAYS: dict[str, Callable[[Any], Any]] = {
    "DistributedDataParallel": partial(DistributedDataParallel, find_unused_parameters=True),
    "FullyShardedDataParallel": partial(FullyShardedDataParallel, use_orig_params=True, device_id="cpu"),
    "FullyShardedDataParallel by layer": by_module,
    "fully_shard": sharded,
}


ROWS: dict[str, Names] = {"": None, ", by row": NAMES, ", uneven rows": UNEVEN}


def cases() -> Iterator[tuple[str, Callable[[Any], Any], bool, str]]:
    for name, wrapped in WAYS.items():
        for warm in (False, True):
            for rows in ROWS:
                if rows != ", uneven rows" or name != "fully_shard":
                    yield f"{name}, {'after' if warm else 'before'} the first call{rows}", wrapped, warm, rows


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {
        (name, key): each for name in "ab" for key, each in get_peft_model_state_dict(model, adapter_name=name).items()
    }
    whole = {key: each.full_tensor() if hasattr(each, "full_tensor") else each for key, each in found.items()}
    return {f"{name}: {key}": each.cpu() for (name, key), each in whole.items()}


def one_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    mine, results = IDS[2 * rank : 2 * rank + 2], {}
    for name, wrapped, warm, rows in cases():
        model, names = adapted(), ROWS[rows] and ROWS[rows][2 * rank : 2 * rank + 2]
        if names:
            model.set_requires_grad(["a", "b"])
        if warm:
            called(model, mine, names)
        model = wrapped(model)
        losses = steps(model, mine, names)
        for loss in losses:
            dist.all_reduce(loss)
        results[name] = torch.stack(losses) / 2, state(model)
        torch.save(results, f"{folder}/results.{rank}")
    dist.destroy_process_group()


def main(results: Path) -> None:
    torch.set_num_threads(1)
    alone = {}
    for rows, names in ROWS.items():
        model = adapted()
        if names:
            model.set_requires_grad(["a", "b"])
        alone[rows] = torch.stack(steps(model, IDS, names)), state(model)
    with tempfile.TemporaryDirectory() as folder:
        try:
            mp.spawn(one_process, (folder,), nprocs=2)
        finally:
            found = [Path(folder) / f"results.{rank}" for rank in range(2)]
            ranks = [torch.load(each) if each.exists() else {} for each in found]
            torch.save({"one process": alone, "ranks": ranks}, results)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

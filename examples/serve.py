"""Export a model with adapters as one program, add another, and serve a batch in which each row has its own, or none.

    python examples/serve.py [--output build/serve] [--tokens 16]

The base is one layer of examples/tiny-llama with random weights, and the adapters are random too, so what they say is
noise. `Server` is what a server would have: it needs torch and safetensors, and reads the program, its manifest and the
adapters beside it.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from peftc import compiler

HERE = Path(__file__).parent
PROMPT = "The keeper "
SPEC = """
adapter formal = lora(rank = 8) { on all linear }
adapter poetic = lora(rank = 8) { on all linear }
"""
LATER = "adapter terse = lora(rank = 2) { on q_proj, v_proj }"
BASE = "__base__"


def main() -> None:
    arguments = read_arguments()
    torch.set_num_threads(1)  # so small a model gains nothing from more
    set_seed(0)
    base = LlamaForCausalLM(LlamaConfig.from_pretrained(HERE / "tiny-llama", num_hidden_layers=1)).eval()
    adapted = compiler.apply(base, SPEC).eval()
    train(adapted)
    files = adapted.export(arguments.output, format="pt2", adapters="routed", max_drift=1e-4, force=True)
    print(f"wrote {', '.join(files)} to {arguments.output}")

    adapted.add_adapter(LATER)
    train(adapted, "terse")
    added = adapted.export_adapters(arguments.output, "terse")
    print(f"added {', '.join(added)}")

    serve = Server(arguments.output)
    names = [*serve.adapters, BASE]
    prompt = torch.tensor(list(PROMPT.encode()))
    served = serve(prompt.expand(len(names), -1), arguments.tokens, names)
    for name, tokens in zip(names, served, strict=True):
        if name != BASE:
            adapted.set_adapter(name)
        model = base if name == BASE else adapted
        expected = model.generate(prompt[None], max_new_tokens=arguments.tokens, do_sample=False, eos_token_id=None)
        same = "the same as generate" if torch.equal(tokens, expected[0]) else "NOT what generate says"
        print(f"{name}: {tokens[len(prompt) :].tolist()} ({same})")


def train(adapted: torch.nn.Module, *names: str) -> None:
    """Random numbers, in the place of training: in these adapters, or in all."""
    for name, each in adapted.named_parameters():
        if name.startswith("adapter_bank.") and (not names or name.split(".")[1] in names):
            torch.nn.init.normal_(each, std=0.1)


class Server:
    """Greedy generation from an artifact with routed adapters. Needs torch and safetensors."""

    def __init__(self, directory: Path):
        self.artifact = json.loads((directory / "manifest.json").read_text())["artifact"]
        self.adapters: list[str] = self.artifact["adapter_names"]
        rows = [load_file(directory / self.artifact["adapter_files"][name]) for name in (BASE, *self.adapters)]
        self._bank = {name: torch.stack([each[name] for each in rows]) for name in rows[0]}
        files = {each["file"] for each in self.artifact["entries"].values()}
        self._programs = {file: torch.export.load(directory / file).module() for file in files}

    @torch.no_grad()
    def __call__(self, ids: torch.Tensor, count: int, names: Sequence[str]) -> torch.Tensor:
        """`count` tokens more for every row of `ids`, `[batch, tokens]`; `names` says which adapter it has, or none."""
        adapter_ids = torch.tensor([-1 if name == BASE else self.adapters.index(name) for name in names])
        state, new = self._nothing_yet(len(ids)), ids
        for step in range(count):
            entry = self.artifact["entries"]["decode" if step else "prefill"]
            positions = torch.arange(ids.shape[1] - new.shape[1], ids.shape[1]).expand(new.shape)
            outputs = self._programs[entry["file"]](
                input_ids=new,
                attention_mask=torch.ones_like(ids),
                position_ids=positions,
                adapter_ids=adapter_ids,
                bank=self._bank,
                **state,
            )
            state |= {name: outputs[made] for made, name in entry["state"].items()}
            new = outputs["logits"][:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, new], dim=1)
        return ids

    def _nothing_yet(self, rows: int) -> dict[str, torch.Tensor]:
        """Keys and values of length zero."""
        sizes = {"batch": rows, "past": 0}
        taken = [each for each in self.artifact["entries"]["prefill"]["inputs"] if each["name"].startswith("past_")]
        return {each["name"]: torch.zeros([sizes.get(size, size) for size in each["shape"]]) for each in taken}


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("build/serve"), help="where to write")
    parser.add_argument("--tokens", type=int, default=16, help="tokens to generate")
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""Export a model with two adapters as one program, and serve both with torch alone: a batch, an adapter for each row.

    python examples/serve.py [--output build/serve] [--tokens 16]

The base is one layer of examples/tiny-llama with random weights, and the adapters are random too, so what they say is
noise. `Server` is what a server would have: it needs nothing but torch, and reads the program and its manifest.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from peftc import compiler

HERE = Path(__file__).parent
PROMPT = "The keeper "
SPEC = """
adapter formal = lora(rank = 8) { on all linear }
adapter poetic = lora(rank = 8) { on all linear }
"""


def main() -> None:
    arguments = read_arguments()
    torch.set_num_threads(1)  # so small a model gains nothing from more
    set_seed(0)
    base = LlamaForCausalLM(LlamaConfig.from_pretrained(HERE / "tiny-llama", num_hidden_layers=1)).eval()
    adapted = compiler.apply(base, SPEC).eval()
    for each in adapted.adapter_bank.parameters():
        torch.nn.init.normal_(each, std=0.1)  # in the place of training

    files = adapted.export(arguments.output, format="pt2", adapters="routed", max_drift=1e-4, force=True)
    print(f"wrote {', '.join(files)} to {arguments.output}")

    serve = Server(arguments.output)
    prompt = torch.tensor(list(PROMPT.encode()))
    rows = prompt.expand(len(serve.adapters), -1)
    served = serve(rows, arguments.tokens, torch.arange(len(rows)))
    for name, tokens in zip(serve.adapters, served, strict=True):
        adapted.set_adapter(name)
        expected = adapted.generate(prompt[None], max_new_tokens=arguments.tokens, do_sample=False, eos_token_id=None)
        same = "the same as adapted.generate" if torch.equal(tokens, expected[0]) else "NOT what adapted.generate says"
        print(f"{name}: {tokens[len(prompt) :].tolist()} ({same})")


class Server:
    """Greedy generation from an artifact with routed adapters. Needs torch and nothing else."""

    def __init__(self, directory: Path):
        self.artifact = json.loads((directory / "manifest.json").read_text())["artifact"]
        self.adapters: list[str] = self.artifact["adapter_names"]
        files = {each["file"] for each in self.artifact["entries"].values()}
        self._programs = {file: torch.export.load(directory / file).module() for file in files}

    @torch.no_grad()
    def __call__(self, ids: torch.Tensor, count: int, adapter_ids: torch.Tensor) -> torch.Tensor:
        """`count` tokens more for every row of `ids`, `[batch, tokens]`; `adapter_ids` says which adapter it has."""
        state, new = self._nothing_yet(len(ids)), ids
        for step in range(count):
            entry = self.artifact["entries"]["decode" if step else "prefill"]
            positions = torch.arange(ids.shape[1] - new.shape[1], ids.shape[1]).expand(new.shape)
            outputs = self._programs[entry["file"]](
                input_ids=new,
                attention_mask=torch.ones_like(ids),
                position_ids=positions,
                adapter_ids=adapter_ids,
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

"""Adapters that put something in front, on PEFT's side and on ours, and what is asked of each of them."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

LENGTH = 4
NEAR = dict(atol=1e-5, rtol=1e-5)
# Models of random weights would say one token over and over.
GENERATE = dict(max_new_tokens=6, pad_token_id=0, do_sample=False, no_repeat_ngram_size=1, suppress_tokens=[0])


@dataclass(frozen=True)
class Front:
    """One method: PEFT's config, our arguments, and our parameters by what PEFT's encoder calls them."""

    config: type[peft.PeftConfig]
    method: str
    names: Mapping[str, str]
    fields: Mapping[str, Any] = field(default_factory=dict)
    computed: bool = False  # what PEFT saves is no parameter

    def theirs(self, base: Any, task: str, scale: float = 0.7, **fields: Any) -> Any:
        """PEFT's model over a copy of the base, whatever is trained moved far from where it started."""
        torch.manual_seed(1)
        config = self.config(task_type=task, num_virtual_tokens=LENGTH, **{**self.fields, **fields})
        theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
        with torch.no_grad():
            for each in theirs.parameters():
                if each.requires_grad:
                    each.add_(torch.randn_like(each) * scale)
        return theirs

    def spec(self, name: str, arguments: str = "", rest: str = "") -> str:
        """Our side of it."""
        return f"adapter {name} = {self.method.replace(')', arguments + ')')}{rest}"

    def follow(self, ours: Any, name: str, theirs: Any) -> None:
        """Let our parameters be PEFT's."""
        encoder = dict(theirs.prompt_encoder["default"].named_parameters())
        with torch.no_grad():
            for role, parameter in own(ours, name).items():
                key = self.names.get(role)
                value = heads(theirs)[role] if key is None else torch.cat([encoder[each] for each in key.split("+")])
                parameter.copy_(value)

    def gradients(self, theirs: Any) -> dict[str, torch.Tensor]:
        """PEFT's gradients, by our parameters; of what PEFT does not train, zeros."""
        encoder = dict(theirs.prompt_encoder["default"].named_parameters())

        def gradient(each: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(each) if each.grad is None else each.grad

        found = {
            role: torch.cat([gradient(encoder[each]) for each in key.split("+")]) for role, key in self.names.items()
        }
        return found | {role: gradient(each) for role, each in heads(theirs).items()}


PREFIX = Front(peft.PrefixTuningConfig, "prefix(length = 4)", {"P": "embedding.weight"})
PROJECTION = Front(
    peft.PrefixTuningConfig,
    "prefix(length = 4, projection = true, hidden = 5)",
    {
        "E": "embedding.weight",
        "A": "transform.0.weight",
        "a": "transform.0.bias",
        "B": "transform.2.weight",
        "c": "transform.2.bias",
    },
    {"prefix_projection": True, "encoder_hidden_size": 5},
    computed=True,
)
CARTRIDGE = Front(
    peft.CartridgeConfig,
    "cartridge(length = 4, frozen = 2)",
    {"P": "frozen_embedding+trainable_embedding"},
    {"num_frozen_tokens": 2},
)
PROMPT = Front(peft.PromptTuningConfig, "prompt(length = 4)", {"P": "embedding.weight"})
PTUNING = Front(
    peft.PromptEncoderConfig,
    "ptuning(length = 4, hidden = 5)",
    {
        "E": "embedding.weight",
        "A": "mlp_head.0.weight",
        "a": "mlp_head.0.bias",
        "B": "mlp_head.2.weight",
        "d": "mlp_head.2.bias",
        "C": "mlp_head.4.weight",
        "c": "mlp_head.4.bias",
    },
    {"encoder_hidden_size": 5},
    computed=True,
)
MULTITASK = Front(
    peft.MultitaskPromptTuningConfig,
    "multitask_prompt(length = 4, tasks = 3, ranks = 2)",
    {"P": "embedding.weight", "C": "prefix_task_cols", "R": "prefix_task_rows"},
    {"num_tasks": 3, "num_ranks": 2},
)


def own(ours: Any, name: str) -> dict[str, torch.nn.Parameter]:
    """An adapter's parameters by their roles, those of a trained head by their last two names."""
    found = {}
    for key, each in ours.named_parameters():
        if key.startswith(f"adapter_bank.{name}."):
            place, role = key.removeprefix(f"adapter_bank.{name}.").rsplit(".", 1)
            found[role if place.startswith("@") else f"{place.split('.')[-1]}.{role}"] = each
    return found


def heads(theirs: Any) -> dict[str, torch.nn.Parameter]:
    """PEFT's trained copies of modules by their last two names."""
    return {
        ".".join(key.replace(".modules_to_save.default", "").split(".")[-2:]): each
        for key, each in theirs.named_parameters()
        if ".modules_to_save.default." in key
    }


def loss_and_more(output: Any, length: int) -> dict[str, torch.Tensor]:
    """The loss, and what is said of the last `length` tokens."""
    names = [each for each in ("logits", "start_logits", "end_logits") if each in output]
    kept = {each: output[each] for each in names}
    return {"loss": output.loss, **{name: each[:, -length:] if each.dim() > 1 else each for name, each in kept.items()}}


def both_ways(
    front: Front, base: Any, ours: Any, task: str, batch: dict[str, Any], place: Path, rest: str = "", **fields: Any
) -> None:
    """PEFT's file is read by us; ours, which holds all that is trained, by PEFT and by us, and is trained on.

    `rest` ends our spec, `fields` are PEFT's. PEFT is given labels and places of virtual tokens that it does not know.
    """
    theirs = front.theirs(base, task, **fields)
    theirs.save_pretrained(place / "theirs")
    virtual = 0 if front.names.get("P", "").startswith("frozen") or "prefix" in front.method else LENGTH
    given, length = dict(batch), batch["labels"].shape[-1] if "labels" in batch else batch["input_ids"].shape[1]
    if task == "TOKEN_CLS":
        given["labels"] = torch.nn.functional.pad(batch["labels"], (virtual, 0), value=-100)
    if task == "QUESTION_ANS":
        given |= {key: each + virtual for key, each in batch.items() if key.endswith("_positions")}
    with torch.no_grad():
        wanted = loss_and_more(theirs(**given), length)
        base_alone = copy.deepcopy(base)  # a call with labels writes to its config
        plain = loss_and_more(base_alone(**{key: each for key, each in batch.items() if key != "task_ids"}), length)
    arguments = rest.split("{", maxsplit=1)[0]
    ours.add_adapter(front.spec("live", arguments.strip() and ", " + arguments.strip(), rest[len(arguments) :]))
    ours.load_adapter(place / "theirs", "read", is_trainable=True)
    front.follow(ours, "live", theirs)

    def check(found: dict[str, torch.Tensor]) -> None:
        for key, each in found.items():
            assert_close(each, wanted[key], **NEAR, msg=lambda text, key=key: f"{key}: {text}")
            assert key == "loss" or (each - plain[key]).abs().max() > 1e-3, key

    for name in ("read", "live"):
        ours.set_adapter(name)
        check(loss_and_more(ours(**batch), length))

    for model in (ours.train(), theirs.train()):
        model(**given if model is theirs else batch).loss.backward()
    expected = front.gradients(theirs)
    found = own(ours, "live")
    assert set(found) == set(expected)
    for role, each in found.items():
        assert_close(each.grad, expected[role], atol=1e-5, rtol=1e-4)
        assert each.grad.abs().max() > 1e-5 or role == "qa_outputs.bias", role  # which moves every place alike
    theirs.eval()
    ours.eval().zero_grad()

    ours.save_pretrained(place / "ours", selected_adapters=["live"])
    mine = place / "ours" / "live"
    written, known = (set(load_file(each / "adapter_model.safetensors")) for each in (mine, place / "theirs"))
    assert written >= known
    assert (written > known) is front.computed
    with torch.no_grad():
        reference = peft.PeftModel.from_pretrained(copy.deepcopy(base), mine).eval()
        check(loss_and_more(reference(**given), length))
    ours.load_adapter(mine, "again", is_trainable=True)
    again = own(ours, "again")
    assert again.keys() == found.keys()
    assert all(torch.equal(each, found[role]) for role, each in again.items())
    assert train(ours, "again", batch) == train(ours, "live", batch)


def train(ours: Any, name: str, batch: dict[str, Any], steps: int = 2) -> list[float]:
    """The losses of an adapter's next steps."""
    ours.set_adapter(name)
    optimizer = torch.optim.SGD([each for each in ours.parameters() if each.requires_grad], lr=0.1)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = ours(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert len(set(losses)) == steps
    return losses


def tokens(model: Any, prompt: Mapping[str, torch.Tensor], **options: Any) -> torch.Tensor:
    """What is generated."""
    generated: torch.Tensor = model.generate(**prompt, **GENERATE, **options)
    return generated[:, -6:]


def unpadded(prompt: Mapping[str, torch.Tensor], row: int = 0) -> dict[str, torch.Tensor]:
    """One row, twice, without the padding on its left."""
    keep, twice = prompt["attention_mask"][row].bool(), [row, row]
    wide = ("input_ids", "attention_mask")
    return {key: each[twice][:, keep] if key in wide else each[twice] for key, each in prompt.items()}


def recomputes(ours: Any, batch: dict[str, torch.Tensor]) -> None:
    """With gradient checkpointing the adapter `a` has the same losses and gradients, and less is kept."""
    ours.train()
    runs = []
    for enabled in (False, True):
        if enabled:
            ours.gradient_checkpointing_enable()
        kept: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda each, kept=kept: kept.append(each) or each, lambda each: each
        ):
            loss = ours(**batch).loss
        loss.backward()
        runs.append((loss.item(), len(kept), {role: each.grad.clone() for role, each in own(ours, "a").items()}))
        ours.zero_grad()
    ours.gradient_checkpointing_disable()
    (loss, saved, gradients), (again, less, recomputed) = runs
    assert again == loss
    assert less < saved
    for role, each in gradients.items():
        assert_close(recomputed[role], each, **NEAR)
        assert each.abs().max() > 1e-5


def switches_without_compiling(
    ours: Any, zoo: Any, batch: dict[str, torch.Tensor], other: dict[str, torch.Tensor]
) -> None:
    """Compiled for one of the adapters `a` and `b`, the model serves both and other sizes without compiling anew."""
    wanted = {}
    for name in "ab":
        ours.set_adapter(name)
        wanted[name] = zoo.logits(ours, batch)
    assert (wanted["a"] - wanted["b"]).abs().max() > 1e-3
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="eager", dynamic=True)
    zoo.logits(compiled, batch)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for name in "abab":
            ours.set_adapter(name)
            assert_close(zoo.logits(compiled, batch), wanted[name], **NEAR)
        assert_close(zoo.logits(compiled, other), zoo.logits(ours, other), **NEAR)
    torch._dynamo.reset()

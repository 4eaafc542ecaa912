"""One model with the same random adapter in peft and in peftc: what each can do with it, and where they differ."""

import copy
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import peft
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peftc import compiler
from peftc.runtime.peft_format.checkpoint import checkpoint_keys
from peftc.runtime.regions.region import Split
from tests.sweep.alike import NEAR, differences, gradients_apart, tensors
from tests.sweep.inputs import SHAPES, Batch, Candidate, Inputs

NEW = 4  # tokens to generate


@dataclass
class Row:
    """What came of one type. Reasons are empty for what works."""

    family: str
    name: str
    plain: str = ""  # why the model without adapters is not driven here
    peft: str = ""  # why peft does not work on it
    ours: dict[str, str] = field(
        default_factory=dict
    )  # what of ours is not peft's: forward, gradients, generate, merge
    left: dict[str, str] = field(default_factory=dict)  # what peft does not do either, and why
    split: dict[str, str] = field(default_factory=dict)  # classes of modules that ran their own Python, and why
    inputs: str = ""
    generated: bool = True  # whether tokens were compared, if the model generates
    seconds: float = 0.0

    @property
    def state(self) -> str:
        """Which column the type is in."""
        return "not driven" if self.plain else "peft fails" if self.peft else "differs" if self.ours else "equal"

    def as_json(self) -> dict[str, Any]:
        """To be kept."""
        return asdict(self)


def said(error: BaseException) -> str:
    """An error in a line."""
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text[:300]}"


def compared(
    row: Row,
    model: nn.Module,
    size: int | Candidate,
    tell: Callable[[str], None] = lambda _: None,
    training: bool = False,
    quick: bool = False,
    generates: bool = True,
) -> Row:
    """Fill in a row for this model, which is not changed. `tell` is called before each stage."""
    model.eval()
    known = Inputs(model, size).candidates() if isinstance(size, int) else iter([size])
    found = driven(model, known)
    if isinstance(found, str):
        row.plain = found
        return row
    batches = [seeded(found, shape) for shape in SHAPES]
    row.generated = generates
    row.inputs = ", ".join(f"{name}{list(getattr(each, 'shape', ()))}" for name, each in batches[0].items())
    tell("peft")
    with tempfile.TemporaryDirectory() as place:
        try:
            try:
                theirs = adapted_by_peft(model, place)
                if not differences(values(model, batches[0]), values(theirs, batches[0]), 1e-6):
                    raise ValueError("the adapter changes nothing")
            except Exception as error:
                row.left["all linear layers"] = said(error)
                few = attention(model) or own_targets(model, (nn.Conv2d,))
                if not few:
                    raise
                theirs = adapted_by_peft(model, place, few)
            expected = [values(theirs, batch) for batch in batches]
        except Exception as error:
            row.peft = said(error)
            return row
        if not differences(values(model, batches[0]), expected[0], 1e-6):
            row.peft = "the adapter changes nothing"
            return row
        if quick:
            row.ours["forward"] = "not run"
            return row
        checks = Checks(row, model, theirs, batches, expected, tell, training, generates)
        tell("load")
        try:
            ours = compiler.load(model, place, is_trainable=True).eval()
        except Exception as error:
            row.ours["load"] = said(error)
            return row
        checks.run(ours)
    return row


def warm(model: nn.Module, size: int) -> None:
    """Load what is loaded at a first call, but no threads of autograd's, which no child process can have after it."""
    batch = seeded(next(Inputs(model, size).candidates()), SHAPES[0])
    with tempfile.TemporaryDirectory() as place:
        adapted_by_peft(model, place)
        values(compiler.load(model, place), batch)


def driven(model: nn.Module, candidates: Iterator[Candidate]) -> Candidate | str:
    """The first batch that the model takes, in all shapes; or why it takes none."""
    why: list[str] = []
    for candidate in candidates:
        try:
            for shape in SHAPES:
                if not any(map(torch.isfinite, map(torch.mean, values(model, seeded(candidate, shape))))):
                    raise ValueError("no output is a finite number")
            return candidate
        except Exception as error:
            why.append(said(error))
    if os.environ.get("SWEEP_WHY"):
        print("\n".join(why))
    named = [each for each in why if "do not match" not in each and "does not say" not in each]
    return (named or why or ["no inputs are known for it"])[0]


def seeded(candidate: Candidate, shape: Any) -> Batch:
    """The same batch each time."""
    torch.manual_seed(3)
    return candidate(shape)


def adapted_by_peft(model: nn.Module, place: str, few: list[str] | None = None) -> nn.Module:
    """The model in peft, with random values; saved. All linear layers are adapted, or these few."""
    torch.manual_seed(1)
    linear = any(isinstance(each, nn.Linear | Conv1D) for each in model.modules())
    targets: Any = "all-linear" if linear and hasattr(model, "get_output_embeddings") else own_targets(model)
    targets = few or targets
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets)
    try:
        theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    except ValueError as error:  # it says which modules it does not adapt in a model of this type
        told = re.search(r"Incompatible modules: \{(.*?)\}", str(error))
        if told is None:
            raise
        config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets, exclude_modules=re.findall(r"\w+", told[1]))
        theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(place, save_embedding_layers=False)
    return theirs


def attention(model: nn.Module) -> list[str]:
    """The linear layers of attention modules."""
    kinds = (nn.Linear, Conv1D)
    return [name for name, each in model.named_modules() if isinstance(each, kinds) and "att" in name.lower()]


def own_targets(model: nn.Module, *kinds: tuple[type[nn.Module], ...]) -> list[str]:
    """The linear layers of a model that is not transformers' own, or else its convolutions."""
    for each_kind in kinds or ((nn.Linear,), (nn.Conv2d, nn.Conv3d)):
        found = [
            name
            for name, each in model.named_modules()
            if isinstance(each, each_kind) and getattr(each, "groups", 1) == 1
        ]
        if found:
            return found
    return []


def called(model: nn.Module, batch: Batch) -> list[torch.Tensor]:
    """The tensors that a model returns, without a graph of our own making of random numbers."""
    torch.manual_seed(5)
    return list(
        tensors(
            model(**{name: each.clone() if isinstance(each, torch.Tensor) else each for name, each in batch.items()})
        )
    )


def values(model: nn.Module, batch: Batch) -> list[torch.Tensor]:
    """As `called`, where nothing trains."""
    with torch.no_grad():
        return called(model, batch)


class Checks:
    """What is compared."""

    def __init__(
        self,
        row: Row,
        model: nn.Module,
        theirs: Any,
        batches: list[Batch],
        expected: list[list[torch.Tensor]],
        tell: Callable[[str], None],
        training: bool,
        generates: bool,
    ):
        self.row, self.model, self.theirs, self.batches, self.expected = row, model, theirs, batches, expected
        self.tell, self.training, self.generates = tell, training, generates

    def run(self, ours: Any) -> None:
        """All of it; what fails is in the row."""
        self.check("forward", lambda: self.forward(ours))
        self.row.split |= split_modules(ours)
        self.check("gradients", lambda: self.gradients(ours))
        if self.generates and getattr(self.model, "can_generate", bool)():
            self.check("generate", lambda: self.generate(ours))
        self.check("merge", lambda: self.merge(ours))

    def check(self, what: str, run: Callable[[], str]) -> None:
        """Run one comparison."""
        self.tell(what)
        try:
            why = run()
        except Unlike as error:
            self.row.left[what] = str(error)
            return
        except Exception as error:
            why = said(error)
        if why:
            self.row.ours[what] = why

    def forward(self, ours: Any) -> str:
        """Outputs at both shapes, the second after the first."""
        told = [differences(values(ours, batch), want) for batch, want in zip(self.batches, self.expected, strict=True)]
        return "; ".join(f"shape {at}: {each}" for at, each in enumerate(told) if each)

    def gradients(self, ours: Any) -> str:
        """Of every trained tensor, after a step of training; in float64 where rounding decides in float32."""
        told = self.gradients_of(ours)
        if not told:
            return told
        batches, self.batches = self.batches, [{name: wide(each) for name, each in b.items()} for b in self.batches]
        self.theirs.double(), ours.double()
        try:
            return told if self.gradients_of(ours) else ""
        finally:
            self.theirs.float(), ours.float()
            self.batches = batches

    def gradients_of(self, ours: Any) -> str:
        """As `gradients`, in the type that the models are in."""
        theirs = self.theirs
        try:
            wanted = self.step(theirs)
            again = self.step(theirs)
            if wanted[0] != again[0]:
                raise Unlike("peft's own loss is another each time")
        except Unlike:
            raise
        except Exception as error:
            raise Unlike(f"peft: {said(error)}") from error
        keys = {
            each.data_ptr(): key
            for key, each in peft.get_peft_model_state_dict(theirs, save_embedding_layers=False).items()
        }
        want = {keys[each.data_ptr()]: each.grad for _, each in theirs.named_parameters() if each.data_ptr() in keys}
        self.step(ours)
        adapter = ours._adapter_state.adapter("default")
        mine = {key: adapter.tensor(owner).grad for key, owner in checkpoint_keys(adapter.plan).items()}
        ours.eval()
        return gradients_apart(mine, want)

    def step(self, model: Any) -> tuple[float]:
        """Backward of a loss that every output is in."""
        model.train(self.training)
        model.zero_grad(set_to_none=True)
        outputs = [each for each in called(model, self.batches[0]) if each.requires_grad]
        if not outputs:
            raise Unlike("no output has a gradient")
        loss = sum(each.nan_to_num(0.0, 0.0, 0.0).clamp(-1e4, 1e4).double().pow(2).mean() for each in outputs)
        loss.backward()  # type: ignore[union-attr]
        return (float(loss.detach()),)  # type: ignore[union-attr]

    def generate(self, ours: Any) -> str:
        """The tokens of a greedy search."""
        batch = {name: each for name, each in self.batches[0].items() if not name.startswith("decoder_")}
        options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "num_beams": 1}
        try:
            self.theirs.eval()
            torch.manual_seed(7)
            wanted = self.theirs.generate(**batch, **options)
        except Exception as error:
            raise Unlike(f"peft: {said(error)}") from error
        torch.manual_seed(7)
        mine = ours.generate(**batch, **options)
        if isinstance(wanted, torch.Tensor):
            return "" if torch.equal(mine, wanted) else f"{mine[0].tolist()[-6:]} for {wanted[0].tolist()[-6:]}"
        return differences(list(tensors(mine)), list(tensors(wanted)))

    def merge(self, ours: Any) -> str:
        """Outputs with merged weights."""
        ours.eval()
        try:
            self.theirs.eval().base_model.merge_adapter()
            wanted = values(self.theirs, self.batches[0])
            self.theirs.base_model.unmerge_adapter()
        except Exception as error:
            raise Unlike(f"peft: {said(error)}") from error
        near = 10 * NEAR if differences(wanted, self.expected[0]) else NEAR
        if differences(wanted, self.expected[0], near):
            raise Unlike("peft's merged model is another")
        ours.merge_adapter()
        mine = values(ours, self.batches[0])
        ours.unmerge_adapter()
        return differences(mine, self.expected[0], near)


def wide(value: Any) -> Any:
    """In float64, if it is of floats."""
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


class Unlike(Exception):
    """Peft does not do it either. Says why."""


def split_modules(ours: Any) -> dict[str, str]:
    """The classes of modules that ran their own Python, with one reason for each."""
    host, found = ours._adapter_state.host, {}
    for path, region in host.regions.items():
        for program in host.local(path).programs.values():
            if isinstance(program, Split):
                found[type(region.module).__name__] = program.reason[:300]
    return found

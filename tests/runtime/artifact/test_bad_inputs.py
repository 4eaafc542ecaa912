"""What can be wrong with an artifact or a call of one: each case has its message."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from peftc.compiler.export_model.output import seal
from peftc.grammar.diagnostics import AdapterError
from peftc.runtime.artifact.artifact import Artifact
from peftc.runtime.artifact.tensors import read_tensors
from peftc.runtime.files.tensor_file import Entry, write_tensors
from tests import artifacts
from tests.artifacts import HEADS, LOGITS, SIZE, SPEAKING, TOKENS, WIDTH, tensor
from tests.golden_files import Golden

Case = Callable[["Ground"], object]


class Ground:
    """Good artifacts to spoil: one that generates, one with adapters as inputs, one with routed ones."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.speaker, self.inputs, self.routed = (directory / each for each in ("speaker", "inputs", "routed"))

    def manifest(self, change: Callable[[dict[str, Any]], object]) -> "Ground":
        path = self.speaker / "manifest.json"
        manifest = json.loads(path.read_text())
        change(manifest)
        path.write_text(json.dumps(manifest))
        return self

    def fields(self, **changes: Any) -> "Ground":
        return self.manifest(lambda each: each["artifact"].update(changes))

    def entry(self, **changes: Any) -> "Ground":
        return self.manifest(lambda each: each["artifact"]["entries"]["decode"].update(changes))

    def write(self, name: str, content: bytes) -> "Ground":
        (self.speaker / name).write_bytes(content)
        return self

    def reseal(self) -> "Ground":
        """As if the files had been written as they are now."""
        manifest = json.loads((self.speaker / "manifest.json").read_text())
        (self.speaker / "manifest.json").unlink()
        seal(self.speaker, {"artifact": manifest["artifact"]})
        return self

    def load(self, **options: Any) -> Artifact:
        return Artifact.load(self.speaker, **options)

    def call(self, batch: int = 2, sequence: int = 3, past: int = 4, **changes: Any) -> object:
        inputs: dict[str, Any] = {**artifacts.speaker_inputs(batch, sequence, past), **changes}
        return self.load()("decode", {name: each for name, each in inputs.items() if each is not None})

    def adapt(self, **tensors: Any) -> object:
        return self.send({name.replace("_", "."): each for name, each in tensors.items()})

    def send(self, adapter: Any) -> object:
        return Artifact.load(self.inputs)("forward", {"input_ids": _ids(2, 3), "adapter": adapter})

    def route(self, numbers: torch.Tensor) -> object:
        return Artifact.load(self.routed)("forward", {"input_ids": _ids(2, 3), "adapter_ids": numbers})

    def say(self, ids: Any = ((3, 4, 5),), mask: Any = None, **options: Any) -> object:
        options.setdefault("max_new_tokens", 5)
        given = ids if isinstance(ids, torch.Tensor) else torch.tensor(ids)
        return self.load().generate(given, None if mask is None else torch.tensor(mask), **options)


def _ids(rows: int, tokens: int) -> torch.Tensor:
    return torch.full((rows, tokens), 3)


def _link(ground: Ground) -> object:
    (ground.speaker / "generate.pt2").unlink()
    (ground.speaker / "generate.pt2").symlink_to("/etc/passwd")
    return ground.load()


def _flip(ground: Ground) -> object:
    path = ground.speaker / "generate.pt2"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return ground.load()


def _remove(ground: Ground, name: str) -> object:
    (ground.speaker / name).unlink()
    return ground.load()


def _unpack(ground: Ground, content: bytes) -> None:
    ground.write("generate.pt2", content).reseal().load().prepare()


def _safetensors(ground: Ground, content: bytes) -> object:
    (ground.directory / "a.safetensors").write_bytes(content)
    return read_tensors(ground.directory / "a.safetensors")


def _header(header: dict[str, Any], content: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content


CASES: dict[str, Case] = {
    # what is there
    "no_directory": lambda g: Artifact.load(g.directory / "gone"),
    "no_manifest": lambda g: _remove(g, "manifest.json"),
    "manifest_no_json": lambda g: g.write("manifest.json", b"{").load(),
    "manifest_of_a_build": lambda g: g.manifest(lambda each: each.pop("artifact")).load(),
    "manifest_newer": lambda g: g.fields(format=3).load(),
    "manifest_format_missing": lambda g: g.manifest(lambda each: each["artifact"].pop("format")).load(),
    "manifest_backend_unknown": lambda g: g.fields(backend="tvm").load(),
    "manifest_files_no_object": lambda g: g.manifest(lambda each: each.update(files=[])).load(),
    "manifest_no_entries": lambda g: g.fields(entries={}).load(),
    "manifest_no_decode": lambda g: g.manifest(lambda each: each["artifact"]["entries"].pop("decode")).load(),
    "manifest_file_unknown": lambda g: g.entry(file="other.pt2").load(),
    "manifest_size_unknown": lambda g: g.entry(inputs=[tensor("input_ids", "batch", "length")]).load(),
    "manifest_size_untold": lambda g: (
        g.fields(generation=None).entry(inputs=[tensor("x", "past + sequence")], state={}).load()
    ),
    "manifest_dtype_unknown": lambda g: g.entry(outputs=[tensor("logits", "batch", dtype="float31")]).load(),
    "manifest_state_unknown": lambda g: g.entry(state={"present_9_key": "past_9_key"}).load(),
    "manifest_state_not_taken": lambda g: g.entry(state={"present_0_key": "past_9_key"}).load(),
    "manifest_no_start": lambda g: g.fields(generation={**artifacts.GENERATION, "encoder_decoder": True}).load(),
    "manifest_routed_to_none": lambda g: g.fields(adapters="routed", adapter_names=[]).load(),
    "manifest_minimum_negative": lambda g: g.fields(dimensions={"batch": {"min": -1, "max": None}}).load(),
    "file_missing": lambda g: _remove(g, "generate.pt2"),
    "file_shorter": lambda g: g.write("generate.pt2", b"PK").load(verify=False),
    "file_changed": _flip,
    "file_absolute": lambda g: g.manifest(lambda each: each["files"].update({"/etc/passwd": {}})).load(),
    "file_above": lambda g: g.entry(file="../speaker/generate.pt2").load(),
    "file_links_out": _link,
    "program_junk": lambda g: _unpack(g, b"no program at all"),
    "program_empty": lambda g: _unpack(g, b""),
    "program_for_another_system": lambda g: g.fields(machine={"system": "Plan 9"}).load().prepare(),
    # calls
    "entry_unknown": lambda g: g.load()("prefil", {}),
    "input_missing": lambda g: g.call(position_ids=None, past_0_key=None),
    "input_unknown": lambda g: g.call(position_id=torch.ones(2, 3, dtype=torch.int64)),
    "input_no_tensor": lambda g: g.call(input_ids=[[3, 4, 5], [3, 4, 5]]),
    "input_of_another_type": lambda g: g.call(attention_mask=torch.ones(2, 7)),
    "input_of_another_rank": lambda g: g.call(input_ids=torch.ones(3, dtype=torch.int64)),
    "input_of_another_size": lambda g: g.call(past_0_key=torch.zeros(2, HEADS + 1, 4, SIZE)),
    "input_of_another_batch": lambda g: g.call(past_0_value=torch.zeros(3, HEADS, 4, SIZE)),
    "mask_without_the_past": lambda g: g.call(attention_mask=torch.ones(2, 3, dtype=torch.int64)),
    "mask_too_long": lambda g: g.call(attention_mask=torch.ones(2, 8, dtype=torch.int64)),
    "no_rows": lambda g: g.call(batch=0),
    "no_tokens": lambda g: g.call(sequence=0),
    "too_many_tokens": lambda g: g.call(sequence=17, past=0),
    "past_too_long": lambda g: g.call(past=17),
    "text_too_long": lambda g: g.call(sequence=9, past=16),
    "token_beyond": lambda g: g.call(input_ids=_ids(2, 3) + 100),
    # adapters
    "adapter_no_dict": lambda g: g.send(torch.zeros(2, WIDTH)),
    "adapter_key_missing": lambda g: g.adapt(a_A=torch.zeros(2, WIDTH)),
    "adapter_key_unknown": lambda g: g.adapt(a_A=torch.zeros(2, WIDTH), a_B=torch.zeros(WIDTH, 2), b_A=torch.ones(1)),
    "adapter_of_another_rank": lambda g: g.adapt(a_A=torch.zeros(4, WIDTH), a_B=torch.zeros(WIDTH, 4)),
    "adapter_of_another_type": lambda g: g.adapt(a_A=torch.zeros(2, WIDTH).half(), a_B=torch.zeros(WIDTH, 2)),
    "adapter_unknown": lambda g: Artifact.load(g.inputs).adapter("sam"),
    "adapter_beyond": lambda g: g.route(torch.tensor([0, 2])),
    "adapter_below": lambda g: g.route(torch.tensor([-1, 0])),
    "adapter_ids_too_few": lambda g: g.route(torch.tensor([0])),
    "adapter_file_junk": lambda g: _safetensors(g, b"not tensors"),
    "adapter_file_beyond": lambda g: _safetensors(
        g, _header({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}})
    ),
    "adapter_file_of_another_type": lambda g: _safetensors(
        g, _header({"x": {"dtype": "F31", "shape": [], "data_offsets": [0, 4]}}, b"1234")
    ),
    # generation
    "generate_forward_only": lambda g: Artifact.load(g.inputs).generate(_ids(1, 3)),
    "generate_no_tokens": lambda g: g.say(torch.zeros(1, 0, dtype=torch.int64)),
    "generate_a_flat_prompt": lambda g: g.say([3, 4]),
    "generate_token_beyond": lambda g: g.say([[3, 32]]),
    "generate_padded_right": lambda g: g.say([[3, 4], [3, 0]], [[1, 1], [1, 0]]),
    "generate_only_padding": lambda g: g.say([[3, 4], [0, 0]]),
    "generate_mask_of_another_size": lambda g: g.say([[3, 4]], [[1, 1, 1]]),
    "generate_too_much": lambda g: g.say(max_new_tokens=16),
    "generate_prompt_too_long": lambda g: g.say([[3] * 25]),
    "generate_nothing": lambda g: g.say(max_new_tokens=0),
    "generate_temperature": lambda g: g.say(do_sample=True, temperature=0.0),
    "generate_top_k": lambda g: g.say(do_sample=True, top_k=0),
    "generate_top_p": lambda g: g.say(do_sample=True, top_p=1.5),
    "generate_adapter_of_merged": lambda g: g.say(adapter="sum"),
    "generate_ids_of_merged": lambda g: g.say(adapter_ids=torch.tensor([0])),
    "generate_what_it_cannot_feed": lambda g: g.entry(
        inputs=[*SPEAKING["inputs"], tensor("pixel_values", "batch", 3)]
    ).say(),
}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("artifacts")
    artifacts.write_speaker(directory / "speaker", artifacts.speaking_program()[1])
    entry = {"file": "forward.pt2", "outputs": [LOGITS], "state": {}}
    group = {"name": "adapter", "tensors": [tensor("a.A", 2, WIDTH), tensor("a.B", WIDTH, 2)]}
    (directory / "inputs" / "adapters").mkdir(parents=True)
    values = {"a.A": torch.ones(2, WIDTH), "a.B": torch.ones(WIDTH, 2)}
    entries = [Entry(name, each.dtype, tuple(each.shape), lambda each=each: each) for name, each in values.items()]  # type: ignore[misc]
    write_tensors(directory / "inputs" / "adapters" / "sum.safetensors", entries)
    artifacts.write_forward(
        directory / "inputs",
        artifacts.adapter_program(),
        adapters="inputs",
        adapter_names=["sum"],
        adapter_files={"sum": "adapters/sum.safetensors"},
        entries={"forward": {**entry, "inputs": [TOKENS, group]}},
    )
    artifacts.write_forward(
        directory / "routed",
        artifacts.routed_program(),
        adapters="routed",
        adapter_names=["first", "second"],
        entries={"forward": {**entry, "inputs": [TOKENS, tensor("adapter_ids", "batch", dtype="int64")]}},
    )
    return directory


@pytest.fixture
def ground(tmp_path: Path, pristine: Path) -> Ground:
    shutil.copytree(pristine, tmp_path / "artifacts")
    return Ground(tmp_path / "artifacts")


def test_the_ground_is_good(ground: Ground) -> None:
    ground.call()
    ground.say()
    ground.send(Artifact.load(ground.inputs).adapter("sum"))
    ground.route(torch.tensor([1, 0]))


# The files that hold what is said, by the first word of a case's name; the rest is in one.
KINDS = frozenset({"adapter", "file", "generate", "input", "manifest"})


def kind_of(name: str) -> str:
    word = name.partition("_")[0]
    return word if word in KINDS else "other"


def test_no_text_is_left_of_a_case_that_is_gone(golden: Golden) -> None:
    for kind in {*KINDS, "other"}:
        golden.holds(f"artifacts/{kind}.txt", [name for name in CASES if kind_of(name) == kind])


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name: str, ground: Ground, golden: Golden) -> None:
    with pytest.raises(AdapterError) as caught:
        CASES[name](ground)
    text = str(caught.value).replace(str(ground.directory), "DIR")
    text = re.sub(r"[\d,]+ were written", "N were written", text)  # versions of torch write other sizes
    golden(f"artifacts/{kind_of(name)}.txt", text + "\n", name)

"""Artifacts give what the module gives that was exported, and need nothing but torch for it."""

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from peftc.compiler.export_model.output import seal
from peftc.grammar.diagnostics import CheckpointError, UsageError
from peftc.runtime.artifact.artifact import Artifact
from peftc.runtime.artifact.checks import Checks
from peftc.runtime.artifact.machine import check_machine, this_machine
from peftc.runtime.artifact.tensors import read_tensors
from tests import artifacts
from tests.artifacts import HEADS, LOGITS, SIZE, TOKENS, WIDTH, tensor
from tests.matrix import wide

GROUP = {"name": "adapter", "tensors": [tensor("a.A", 2, WIDTH), tensor("a.B", WIDTH, 2)]}
IDS = torch.tensor([[3, 4, 5], [6, 7, 8]])


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, Path]:
    module, program = artifacts.speaking_program()
    return module, artifacts.write_speaker(tmp_path_factory.mktemp("speaker"), program)


def _adapter(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {"a.A": torch.randn(2, WIDTH), "a.B": torch.randn(WIDTH, 2)}


def _write_inputs(directory: Path, count: int, **more: Any) -> Path:
    names = [f"adapter{index}" for index in range(count)]
    (directory / "adapters").mkdir()
    for index, name in enumerate(names):
        save_file(_adapter(index), directory / "adapters" / f"{name}.safetensors")
    entry = {"file": "forward.pt2", "inputs": [TOKENS, GROUP], "outputs": [LOGITS], "state": {}}
    return artifacts.write_forward(
        directory,
        artifacts.adapter_program(),
        adapters="inputs",
        adapter_names=names,
        adapter_files={name: f"adapters/{name}.safetensors" for name in names},
        entries={"forward": entry},
        **more,
    )


# From one row and one token up to every limit, the cache empty and full.
SIZES = [(1, 1, 0), (1, 1, 16), (3, 16, 8), (2, 5, 0), (70, 2, 3)]


@pytest.mark.parametrize("sizes", SIZES)
def test_it_gives_what_the_module_gives(sizes, speaker):
    module, directory = speaker
    inputs = artifacts.speaker_inputs(*sizes)
    with torch.no_grad():
        wanted = module(**inputs)
    found = Artifact.load(directory)("decode", dict(reversed(inputs.items())))
    assert list(found) == list(wanted)
    for name in wanted:
        assert torch.equal(found[name], wanted[name])
        assert not found[name].requires_grad


def test_tensors_need_not_be_contiguous(speaker):
    module, directory = speaker
    inputs = artifacts.speaker_inputs(2, 3, 4)
    inputs["past_0_key"] = inputs["past_0_key"].transpose(2, 3).contiguous().transpose(2, 3)
    with torch.no_grad():
        assert torch.equal(Artifact.load(directory)("decode", inputs)["logits"], module(**inputs)["logits"])


def test_entries_of_one_file_share_a_program(speaker, monkeypatch):
    loaded = []
    load = torch.export.load
    monkeypatch.setattr(torch.export, "load", lambda path: (loaded.append(path), load(path))[1])
    artifact = Artifact.load(speaker[1])
    assert loaded == []
    for entry in ("prefill", "decode", "prefill"):
        artifact(entry, artifacts.speaker_inputs(1, 2, 0))
    artifact.prepare()
    assert len(loaded) == 1


def test_digests_are_checked_unless_said(speaker, tmp_path):
    (tmp_path / "artifact").mkdir()
    for each in speaker[1].iterdir():
        (tmp_path / "artifact" / each.name).write_bytes(each.read_bytes())
    path = tmp_path / "artifact" / "generate.pt2"
    content = bytearray(path.read_bytes())
    place = content.find(speaker[0].head.weight.detach().numpy().tobytes()[:64])
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="E604"):
        Artifact.load(tmp_path / "artifact")
    Artifact.load(tmp_path / "artifact", verify=False).prepare()  # torch does not notice


def test_a_program_that_changes_its_weights_is_refused(tmp_path):
    class Counting(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(1))

        def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
            self.count.add_(1)
            return {"logits": input_ids + self.count}

    program = torch.export.export(Counting(), (), {"input_ids": IDS}).run_decompositions({})
    artifact = Artifact.load(artifacts.write_forward(tmp_path, program))
    with pytest.raises(CheckpointError, match="changes its own weights"):
        artifact("forward", {"input_ids": IDS})


def test_a_file_that_is_no_program_is_one_error_and_no_log(speaker, tmp_path, caplog):
    (tmp_path / "generate.pt2").write_bytes(b"junk")
    facts = json.loads((speaker[1] / "manifest.json").read_text())["artifact"]
    seal(tmp_path, {"artifact": facts})
    with caplog.at_level(logging.WARNING), pytest.raises(CheckpointError, match="E606") as caught:
        Artifact.load(tmp_path)("prefill", artifacts.speaker_inputs(1, 2, 0))
    assert caught.value.__context__ is not None
    assert caplog.records == []
    assert not logging.getLogger("torch.export").disabled


# --- adapters ---


def test_one_program_serves_many_adapters(tmp_path):
    artifact = Artifact.load(_write_inputs(tmp_path, 16))
    torch.manual_seed(0)
    module = artifacts.Forward()
    seen = []
    for index, name in enumerate(artifact.manifest.adapter_files):
        number = int(name.removeprefix("adapter"))
        adapter = dict(reversed(artifact.adapter(name).items()))  # the order is the program's business
        found = artifact("forward", {"input_ids": IDS, "adapter": adapter})["logits"]
        assert torch.equal(found, module(IDS, _adapter(number))["logits"])
        assert all(not torch.allclose(found, each) for each in seen), index
        seen.append(found)


def test_an_entry_takes_its_part_of_an_adapter(tmp_path):
    """A decode uses less of an adapter than the prefill, and is called with the same one."""
    more = {"name": "adapter", "tensors": [*GROUP["tensors"], tensor("b.A", 3)]}
    entry = {"file": "forward.pt2", "inputs": [TOKENS, GROUP], "outputs": [LOGITS], "state": {}}
    artifact = Artifact.load(
        artifacts.write_forward(
            tmp_path,
            artifacts.adapter_program(),
            adapters="inputs",
            adapter_names=["a"],
            adapter_files={},
            entries={"forward": entry, "more": {**entry, "inputs": [TOKENS, more]}},
        )
    )
    torch.manual_seed(0)
    wanted = artifacts.Forward()(IDS, _adapter(3))["logits"]
    given = {"b.A": torch.zeros(3), **_adapter(3)}
    assert torch.equal(artifact("forward", {"input_ids": IDS, "adapter": given})["logits"], wanted)
    with pytest.raises(UsageError, match=r"no tensor 'c\.A'"):
        artifact("forward", {"input_ids": IDS, "adapter": {"c.A": torch.zeros(3), **given}})
    with pytest.raises(UsageError, match=r"lacks b\.A"):
        artifact("more", {"input_ids": IDS, "adapter": _adapter(3)})


def test_routed_rows_have_adapters_of_their_own(tmp_path):
    entry = {
        "file": "forward.pt2",
        "inputs": [TOKENS, tensor("adapter_ids", "batch", dtype="int64")],
        "outputs": [LOGITS],
        "state": {},
    }
    directory = artifacts.write_forward(
        tmp_path,
        artifacts.routed_program(),
        adapters="routed",
        adapter_names=["a", "b"],
        entries={"forward": entry},
    )
    torch.manual_seed(0)
    module = artifacts.Routed()
    for ids in ([0, 1], [1, 0], [1, 1]):
        numbers = torch.tensor(ids)
        found = Artifact.load(directory)("forward", {"input_ids": IDS, "adapter_ids": numbers})["logits"]
        assert torch.equal(found, module(IDS, numbers)["logits"])


def rows_of_a_bank():
    torch.manual_seed(1)
    return {"__base__": torch.ones(artifacts.WIDTH), **{name: torch.randn(artifacts.WIDTH) for name in "ab"}}


def test_rows_choose_from_a_bank_or_have_none(tmp_path):
    """The artifact gives its programs the bank; callers have the inputs that they had."""
    rows = rows_of_a_bank()
    artifact = Artifact.load(artifacts.write_banked(tmp_path / "out", rows))
    torch.manual_seed(0)
    module = artifacts.Banked()
    for ids in ([0, 1], [-1, 0], [1, -1]):
        numbers = torch.tensor(ids)
        found = artifact("forward", {"input_ids": IDS, "adapter_ids": numbers})["logits"]
        scale = torch.stack([rows["ab"[each] if each >= 0 else "__base__"] for each in ids])
        wanted = module.inner.head(module.inner.embed(IDS).sum(1) * scale)
        torch.testing.assert_close(found, wanted)
    with pytest.raises(UsageError, match=r"(?s)E615.*\[-2, 0\].*-1 for none, 0 a, 1 b"):
        artifact("forward", {"input_ids": IDS, "adapter_ids": torch.tensor([-2, 0])})
    with pytest.raises(UsageError, match=r"E611.*no input 'bank'"):
        artifact("forward", {"input_ids": IDS, "adapter_ids": torch.tensor([0, 0]), "bank": {}})


def test_names_of_rows(tmp_path):
    artifact = Artifact.load(artifacts.write_banked(tmp_path / "out", rows_of_a_bank()))
    assert artifact._numbers(3, ["b", "__base__", "a"]).tolist() == [1, -1, 0]
    with pytest.raises(UsageError, match=r"(?s)E615.*no adapter '__bse__'.*__base__"):
        artifact._numbers(1, "__bse__")
    with pytest.raises(UsageError, match=r"E615.*no adapter 'a'"):
        artifact.adapter("a")  # of which there are pieces, and no tensors that a program takes


def test_a_bank_without_a_row_of_the_base(tmp_path):
    rows = rows_of_a_bank()
    del rows["__base__"]
    artifact = Artifact.load(artifacts.write_banked(tmp_path / "out", rows, base=False))
    with pytest.raises(UsageError, match=r"E615.*cannot have none of the adapters"):
        artifact._numbers(1, "__base__")
    with pytest.raises(UsageError, match=r"E615.*\[-1, 0\]"):
        artifact("forward", {"input_ids": IDS, "adapter_ids": torch.tensor([-1, 0])})


@pytest.mark.parametrize("value", [torch.ones(3), torch.ones(artifacts.WIDTH, dtype=torch.float64)])
def test_a_row_of_another_size_or_type_is_refused(value, tmp_path):
    """Machine code would read beyond it."""
    rows = {**rows_of_a_bank(), "b": value}
    artifact = Artifact.load(artifacts.write_banked(tmp_path / "out", rows))
    with pytest.raises(CheckpointError, match=r"E616.*a\.s"):
        artifact("forward", {"input_ids": IDS, "adapter_ids": torch.tensor([0, 0])})


BAD_BANKS = {
    "a row without a file": {"adapter_names": ["a", "b", "c"]},
    "no row of the base": {"adapter_files": {name: f"adapters/{name}.safetensors" for name in "ab"}},
    "an adapter that is the base": {"adapter_names": ["__base__", "a"]},
    "no word of a base": {"bank": {"constants": {}}},
    "no table": {"bank": True},
}


@pytest.mark.parametrize("case", BAD_BANKS)
def test_a_manifest_that_contradicts_itself(case, tmp_path):
    directory = artifacts.write_banked(tmp_path / "out", rows_of_a_bank(), **BAD_BANKS[case])
    with pytest.raises(CheckpointError, match="E603"):
        Artifact.load(directory)


def test_tensors_are_read_as_safetensors_reads_them(tmp_path):
    torch.manual_seed(0)
    values = {
        "wide": torch.randn(3, 5, dtype=torch.float64),
        "half": torch.randn(7).half(),
        "brain": torch.randn(1, 3).bfloat16(),
        "byte": torch.arange(5, dtype=torch.uint8),
        "number": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "truth": torch.tensor([True, False]),
    }
    save_file(values, tmp_path / "a.safetensors")
    before = (tmp_path / "a.safetensors").read_bytes()
    found = read_tensors(tmp_path / "a.safetensors")
    assert set(found) == set(values)
    for name, each in values.items():
        assert found[name].dtype == each.dtype
        assert torch.equal(found[name], each)
        found[name].zero_()
    assert (tmp_path / "a.safetensors").read_bytes() == before


def test_tensors_that_lie_anyhow_are_read(tmp_path):
    header = json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]}}).encode()
    body = b"\0" + torch.tensor([1.5, 2.5]).numpy().tobytes()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + body)
    assert read_tensors(tmp_path / "a.safetensors")["x"].tolist() == [1.5, 2.5]


# --- checks ---


def test_every_refused_call_is_explained(speaker):
    """Whatever does not fit has a message, and none of what the program was made for has one."""
    artifact = Artifact.load(speaker[1])
    checks = Checks(artifact.manifest.entries["decode"], artifact.manifest)
    good = artifacts.speaker_inputs(2, 3, 4)
    checks(good)
    for name, value in good.items():
        for axis in range(value.dim()):
            with pytest.raises(UsageError, match=r"E61[34]"):
                checks({**good, name: torch.cat([value, value.narrow(axis, 0, 1)], dim=axis)})
        for wrong in (value[None], value.to(torch.int32), None, value.tolist()):
            with pytest.raises(UsageError, match=r"E61[23]"):
                checks({**good, name: wrong})
        with pytest.raises(UsageError, match="E611"):
            checks({key: each for key, each in good.items() if key != name})
        with pytest.raises(UsageError, match="E611"):
            checks({**good, f"{name}s": value})


# --- machines and back ends ---


def test_machine_code_runs_where_it_was_made():
    here = this_machine()
    check_machine(here, where="x")
    check_machine({**here, "instructions": "DEFAULT", "compiler": "g++ 12"}, where="x")
    for changed in ({"torch": "1.0"}, {"processor": "riscv"}, {"instructions": "AVX1024"}):
        with pytest.raises(CheckpointError, match="E608"):
            check_machine({**here, **changed}, where="x")


@pytest.mark.parametrize("adapters", wide(["merged", "inputs"], ()))
def test_compiled_packages_give_the_same(adapters, speaker, tmp_path):
    facts: dict[str, Any]
    compiled = {"aot_inductor.check_lowerbound": False}
    if adapters == "merged":
        module, program = artifacts.speaking_program()
        facts = json.loads((speaker[1] / "manifest.json").read_text())["artifact"]
    else:
        program = artifacts.adapter_program()
        facts = json.loads((_write_inputs(tmp_path, 2) / "manifest.json").read_text())["artifact"]
        (tmp_path / "forward.pt2").unlink()
        (tmp_path / "manifest.json").unlink()
    name = next(iter(facts["entries"].values()))["file"]
    torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / name), inductor_configs=compiled)
    seal(tmp_path, {"artifact": {**facts, "backend": "aoti", "machine": this_machine()}})
    artifact = Artifact.load(tmp_path)
    if adapters == "inputs":
        torch.manual_seed(0)
        wanted = artifacts.Forward()(IDS, _adapter(1))["logits"]
        found = artifact("forward", {"input_ids": IDS, "adapter": artifact.adapter("adapter1")})["logits"]
        torch.testing.assert_close(found, wanted)
        return
    for sizes in SIZES:
        inputs = artifacts.speaker_inputs(*sizes)
        inputs["past_0_value"] = inputs["past_0_value"].transpose(2, 3).contiguous().transpose(2, 3)
        with torch.no_grad():
            wanted = module(**inputs)
        for key, value in artifact("decode", inputs).items():
            torch.testing.assert_close(value, wanted[key], atol=1e-4, rtol=1e-4)
    with pytest.raises(UsageError, match="E613"):
        artifact("decode", {**inputs, "past_0_key": torch.zeros(70, HEADS + 1, 3, SIZE)})


def test_onnx_without_onnxruntime_says_what_to_install(speaker, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    facts = json.loads((speaker[1] / "manifest.json").read_text())["artifact"]
    (tmp_path / "generate.pt2").write_bytes(b"onnx")
    seal(tmp_path, {"artifact": {**facts, "backend": "onnx"}})
    with pytest.raises(UsageError, match="pip install onnxruntime"):
        Artifact.load(tmp_path).prepare()


@pytest.mark.matrix
def test_onnx_gives_the_same(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    directory = _write_inputs(tmp_path, 2)
    facts = json.loads((directory / "manifest.json").read_text())["artifact"]
    for each in ("forward.pt2", "manifest.json"):
        (directory / each).unlink()
    names = ["input_ids", "adapter.a.B", "adapter.a.A"]
    made = torch.onnx.export(
        artifacts.adapter_program(), dynamo=True, verbose=False, input_names=names, output_names=["logits"]
    )
    made.save(directory / "forward.onnx")
    facts["entries"]["forward"]["file"] = "forward.onnx"
    seal(directory, {"artifact": {**facts, "backend": "onnx"}})
    artifact = Artifact.load(directory)
    torch.manual_seed(0)
    module = artifacts.Forward()
    for index in range(2):
        found = artifact("forward", {"input_ids": IDS, "adapter": artifact.adapter(f"adapter{index}")})["logits"]
        torch.testing.assert_close(found, module(IDS, _adapter(index))["logits"], atol=1e-4, rtol=1e-4)
    with pytest.raises(UsageError, match="E619"):
        artifact("forward", {"input_ids": IDS + 100, "adapter": artifact.adapter("adapter0")})
    for each in facts["entries"]["forward"]["inputs"][1]["tensors"]:
        each["dtype"] = "bfloat16"
    (directory / "manifest.json").unlink()
    seal(directory, {"artifact": {**facts, "backend": "onnx"}})
    halves = {name: value.bfloat16() for name, value in _adapter(0).items()}
    with pytest.raises(CheckpointError, match="onnxruntime takes from no Python program"):
        Artifact.load(directory)("forward", {"input_ids": IDS, "adapter": halves})

"""Programs as machine code and as ONNX models: what they give, what is in their files, and what is told of failures."""

import json
import re
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close
from transformers.exporters import ExportedModel

from peftc import compiler
from peftc.compiler import ModelError, UsageError
from peftc.compiler.export_model.backends import check_installed
from peftc.compiler.export_model.machine_code import save_machine_code
from peftc.compiler.export_model.noise import first_error
from peftc.runtime.artifact.machine import this_machine
from tests.matrix import wide
from tests.parity.programs import cases as cases
from tests.torch_only import TorchOnly

CELLS = [
    f"{backend} {model} {adapters}"
    for backend in ("aoti", "onnx")
    for model, adapters in [("llama", "merged"), ("llama", "inputs"), ("llama", "routed"), ("t5", "merged")]
] + ["aoti vit merged", "onnx vit merged"]
ALWAYS = ("aoti llama merged", "onnx llama inputs")
STEPS = 6
MACHINE_PATHS = re.compile(rb"/tmp/|site-packages|" + re.escape(str(Path(__file__).parents[3]).encode()))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchOnly]:
    """A process that has only torch, and onnxruntime."""
    process = TorchOnly(tmp_path_factory.mktemp("jobs"))
    yield process
    process.close()


@pytest.mark.parametrize("cell", wide(CELLS, ALWAYS))
def test_a_file_gives_what_the_adapted_model_gives(
    cell: str, alone: TorchOnly, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    backend, name, adapters = cell.split()
    speaks = name in cases.SPEAKERS
    called = cases.calls(name, "generate" if speaks else "forward")
    target = tmp_path / "out"
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with cases.hosted(cases.host(name), [cases.SPECS["lora"]] * 2) as adapted:
        capfd.readouterr()
        adapted.export(target, format=backend, adapters=adapters)
        assert capfd.readouterr() == ("", ""), "libraries keep to themselves what they do"
        assert {each.name for each in tmp_path.iterdir()} == {"here", "out"}
        assert list((tmp_path / "here").iterdir()) == []
        chosen = "a" if adapters == "merged" else "b"
        adapted.set_adapter(chosen)
        expected = cases.said(adapted, called)
        prompt, mask = cases.text(3, 6, padded=True)
        if speaks:
            wanted = adapted.generate(prompt, attention_mask=mask, max_new_tokens=STEPS, do_sample=False)[:, -STEPS:]
    adapter = "b" if adapters == "inputs" else None
    ids = {"adapter_ids": torch.ones(3, dtype=torch.int64)} if adapters == "routed" else {}
    jobs = []
    for each in called:
        rows = len(next(iter(each.inputs.values())))
        given = {**each.inputs, **{key: value[:1].expand(rows).contiguous() for key, value in ids.items()}}
        jobs.append({"entry": each.entry, "inputs": given, "after": each.after, "adapter": adapter})
    for call, got, right in zip(called, alone.call(target, jobs), expected, strict=True):
        for key, value in right.items():
            assert_close(*(cases.visible(call, key, each) for each in (got[key], value)), rtol=1e-5, atol=1e-5)
    if speaks:
        (tokens,) = alone.generate(target, turns=[(prompt, mask)], steps=STEPS, adapter=adapter, **ids)
        assert torch.equal(tokens, wanted)
    facts = json.loads((target / "manifest.json").read_text())["artifact"]
    assert facts["machine"] == (this_machine() if backend == "aoti" else None)
    if backend == "onnx":
        _check_names(target, facts)
        _check_layout(target, facts, called[0], expected[0], adapters)


def _check_names(target: Path, facts: dict[str, Any]) -> None:
    """What is called how in the ONNX model: as the manifest says, sizes too."""
    onnx = pytest.importorskip("onnx")
    for entry in facts["entries"].values():
        graph = onnx.load(target / entry["file"]).graph
        said = {}
        for each in entry["inputs"]:
            inner = each.get("tensors", [{**each, "name": ""}])
            said |= {f"{each['name']}.{one['name']}".rstrip("."): one["shape"] for one in inner}
        said_out = {each["name"]: each["shape"] for each in entry["outputs"]}
        for wanted, values in ((said, graph.input), (said_out, graph.output)):
            found = {each.name: [dim.dim_param or dim.dim_value for dim in _sizes(each)] for each in values}
            assert found == wanted


def _sizes(value: Any) -> Any:
    return value.type.tensor_type.shape.dim


def _check_layout(target: Path, facts: dict[str, Any], call: Any, right: dict[str, Any], adapters: str) -> None:
    """transformers runs the files from their own layout."""
    model = ExportedModel.from_pretrained(target)
    names = {"forward": "model"}
    assert set(model.runners) == {names.get(each, each) for each in facts["entries"]}
    if adapters != "merged":
        return
    entry = facts["entries"][call.entry]
    rows = len(next(iter(call.inputs.values())))
    sizes = {"batch": rows, "past": 0}
    empty = {
        each["name"]: torch.zeros([sizes.get(size, size) for size in each["shape"]])
        for each in entry["inputs"]
        if each["name"] not in call.inputs
    }
    outputs = model.runners[names.get(call.entry, call.entry)](**call.inputs, **empty)
    found, wanted = (cases.visible(call, "logits", each["logits"]) for each in (outputs, right))
    assert_close(found, wanted, rtol=1e-5, atol=1e-5)


# --- what cannot be written ---


def _adapted(spec: str) -> Any:
    made = compiler.apply(nn.Sequential(nn.Linear(8, 8, bias=False)), f"adapter a = {spec}").eval()
    for each in made.adapter_bank.parameters():
        nn.init.normal_(each, std=0.1)
    return made


def test_an_operator_without_a_form_in_onnx(tmp_path: Path) -> None:
    made, given = _adapted("boft(factors = 2, block = 4) { on all linear }"), {"input": torch.randn(2, 8)}
    with pytest.raises(ModelError, match=r"E653.*aten\._linalg_\w+ has no form in ONNX[\s\S]*adapters='merged'"):
        made.export(tmp_path / "out", format="onnx", adapters="inputs", example_inputs=given)
    assert list(tmp_path.iterdir()) == []
    made.export(tmp_path / "out", format="onnx", adapters="merged", example_inputs=given)


def test_onnx_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"E652.*onnxscript[\s\S]*pip install peftc\[onnx\]"):
        _adapted("lora { on all linear }").export(tmp_path / "out", format="onnx")


def test_there_is_no_compiler() -> None:
    missing = torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)})
    with missing, pytest.raises(UsageError, match=r"E650.*no-such-compiler[\s\S]*CXX"):
        check_installed("aoti")
    check_installed("aoti")


def test_the_compiler_fails(tmp_path: Path) -> None:
    broken = tmp_path / "cxx"
    broken.write_text(
        '#!/bin/sh\ncase "$*" in *.cpp*|*.h*) echo \'x.cpp:1: error: ill\'; exit 1;; *) exec g++ "$@";; esac\n'
    )
    broken.chmod(0o755)
    program = torch.export.export(nn.Linear(4, 4), (torch.ones(3, 4),))
    target = tmp_path / "out"
    target.mkdir()
    failing = torch._inductor.config.patch({"cpp.cxx": (str(broken),)})
    with failing, pytest.raises(ModelError, match=r"E651.*x.cpp:1: error: ill[\s\S]*format='pt2'"):
        save_machine_code(program, target / "forward.pt2")
    assert list(target.iterdir()) == []


def test_the_line_that_says_what_went_wrong() -> None:
    assert (
        first_error(RuntimeError("CppCompileError: no\n\nOutput:\n a.cpp:3: error: no `x`\n more"))
        == "a.cpp:3: error: no `x`"
    )
    assert first_error(RuntimeError("\nthis\nthat")) == "this"
    assert first_error(KeyError()) == "KeyError"


# --- what is in the files ---


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Any]:
    """A Llama whose head is its embedding, read from a file that is mapped."""
    directory = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=4096,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    return lambda: transformers.AutoModelForCausalLM.from_pretrained(directory).eval()


def test_weights_are_written_once_and_name_no_machine(tied: Callable[[], Any], tmp_path: Path) -> None:
    base = tied()
    size = sum(each.numel() * each.element_size() for each in base.parameters())
    assert base.lm_head.weight.nbytes > size / 2, "that it is written twice would be seen"
    made = compiler.apply(base, "adapter a = lora { on q_proj }").eval()
    made.export(tmp_path / "out", format="pt2", adapters="merged", entry="forward")
    file = tmp_path / "out" / "forward.pt2"
    with zipfile.ZipFile(file) as archive:
        parts = {each: archive.read(each) for each in archive.namelist()}
    weights = sum(len(content) for name, content in parts.items() if "/weights/" in name)
    assert weights == pytest.approx(size, rel=0.02)
    assert not [name for name, content in parts.items() if MACHINE_PATHS.search(content)]


def test_views_are_written_without_what_they_are_views_of(tmp_path: Path) -> None:
    save_file({"own": torch.randn(8, 8), "foreign": torch.randn(1000, 100)}, tmp_path / "weights")
    base = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    base[0].weight = nn.Parameter(load_file(tmp_path / "weights")["own"], requires_grad=False)
    whole = torch.randn(1000, 8)
    base[1].weight = nn.Parameter(whole[5:13].T, requires_grad=False)
    made = compiler.apply(base, "adapter a = lora(rank = 2) { on 0 }").eval()
    given = torch.randn(2, 8)
    made.export(tmp_path / "out", format="pt2", example_inputs={"input": given})
    file = tmp_path / "out" / "forward.pt2"
    with zipfile.ZipFile(file) as archive:
        sizes = [each.file_size for each in archive.infolist() if re.search(r"/weights/weight_\d+$", each.filename)]
    assert sizes == [256, 256]
    found = torch.export.load(file).module()(input=given)
    assert_close(next(iter(found.values())), made(given))

"""A process that has torch and nothing else: it loads programs, runs them, and writes what they give.

Run as a script it takes jobs, the paths of files, line by line. `TorchOnly` is the other end. That a job's outputs come
back says that no program needed a library which is blocked here.
"""

import json
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

BLOCKED = ("peftc", "peft", "transformers", "safetensors", "huggingface_hub", "tokenizers")
TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64, "BOOL": torch.bool}


class TorchOnly:
    """The process, from outside."""

    def __init__(self, directory: Path):
        self._directory, self._jobs = directory, 0
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=directory
        )

    def call(self, artifact: Path, calls: Sequence[Mapping[str, Any]]) -> list[dict[str, torch.Tensor]]:
        """What the entries of an artifact give; see `_Artifact.call`."""
        return self._done(artifact, "call", calls)

    def generate(self, artifact: Path, **given: Any) -> list[torch.Tensor]:
        """The tokens that an artifact generates, turn by turn; see `_Artifact.generate`."""
        return self._done(artifact, "generate", given)

    def close(self) -> None:
        """End the process."""
        self._process.communicate(timeout=60)
        assert self._process.returncode == 0

    def _done(self, artifact: Path, what: str, given: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._jobs += 1
        job, result = (self._directory / f"{self._jobs}.{each}" for each in ("job", "result"))
        torch.save({"artifact": str(artifact), "what": what, "given": given}, job)
        self._process.stdin.write(f"{json.dumps([str(job), str(result)])}\n")
        self._process.stdin.flush()
        said = json.loads(self._process.stdout.readline())
        assert not said, said
        return torch.load(result, weights_only=True)


class _Blocker:
    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"{name} is not here")


def _machine_code(path: str) -> Callable[..., Any]:
    package = torch._inductor.aoti_load_package(path)

    def contiguous(value: Any) -> Any:  # what is not is read wrongly, without a word
        each = value.items() if isinstance(value, dict) else ()
        return {name: inner.contiguous() for name, inner in each} or value.contiguous()

    return lambda **inputs: package(**{name: contiguous(value) for name, value in inputs.items()})


def _onnx(path: str) -> Callable[..., Any]:
    session = import_module("onnxruntime").InferenceSession(path)
    names = [each.name for each in session.get_outputs()]

    def call(**inputs: Any) -> dict[str, torch.Tensor]:
        groups = {name: inputs.pop(name) for name in ("adapter", "bank") if name in inputs}
        tensors = {f"{group}.{name}": value for group, inner in groups.items() for name, value in inner.items()}
        given = {name: value.numpy() for name, value in {**inputs, **tensors}.items()}
        return dict(zip(names, map(torch.from_numpy, session.run(None, given)), strict=True))

    return call


LOADERS: dict[str, Callable[[str], Callable[..., Any]]] = {
    ".aoti.pt2": _machine_code,
    ".onnx": _onnx,
    ".pt2": lambda path: torch.export.load(path).module(),
}


class _Artifact:
    """An artifact, as somebody reads it who knows its manifest and torch."""

    def __init__(self, directory: Path):
        self._directory = directory
        self._facts = json.loads((directory / "manifest.json").read_text())["artifact"]
        self._modules: dict[str, Any] = {}
        self._stacked: dict[str, torch.Tensor] = {}

    def call(self, calls: Sequence[Mapping[str, Any]]) -> list[dict[str, torch.Tensor]]:
        """Call entries, one after the other.

        A call has `entry` and `inputs`, perhaps an `adapter` by name, and `after`, the place of the call before that
        the state is taken of.
        """
        results: list[dict[str, torch.Tensor]] = []
        states: list[dict[str, torch.Tensor]] = []
        for each in calls:
            after, entry = each.get("after"), each["entry"]
            state = self._empty(entry, each["inputs"]) if after is None else states[after]
            outputs, state = self._step(entry, {**each["inputs"], **state, **self._adapter(each.get("adapter"))})
            results.append(outputs)
            states.append(state if after is None else {**states[after], **state})
        return results

    def generate(
        self, turns: Sequence[tuple[torch.Tensor, torch.Tensor]], steps: int, adapter: str | None = None, **beside: Any
    ) -> list[torch.Tensor]:
        """Greedily so many tokens after each turn's, which is its tokens and their mask."""
        facts = self._facts["generation"]
        beside = {**beside, **self._adapter(adapter)}
        (waiting, marks), *_ = turns
        rows, state, entry, said = len(waiting), dict[str, torch.Tensor](), "prefill", []
        source = {"input_ids": waiting, "attention_mask": marks} if facts["encoder_decoder"] else {}
        waiting, marks, seen = waiting[:, :0], marks[:, :0], marks[:, :0]  # what is to be fed; of what was, the mask
        for ids, mask in turns:
            ids = torch.full((rows, 1), facts["decoder_start_token_id"]) if source else ids
            waiting, marks, tokens = torch.cat([waiting, ids], 1), torch.cat([marks, mask], 1), []
            for _ in range(steps):
                seen = torch.cat([seen, marks], 1)
                positions = (seen.cumsum(-1) - 1).clamp(min=0)[:, -waiting.shape[1] :]
                own = {"input_ids": waiting, "attention_mask": seen, "position_ids": positions}
                known = {**beside, **(source or own), "decoder_input_ids": waiting}
                outputs, made = self._step(entry, {**known, **(state or self._empty(entry, known))})
                state, entry = {**state, **made}, "decode"
                waiting = outputs["logits"][:, -1].argmax(-1, keepdim=True)
                marks = torch.ones_like(waiting)
                tokens.append(waiting)
            said.append(torch.cat(tokens, 1))
        return said

    def _step(self, entry: str, known: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        facts = self._facts["entries"][entry]
        if any(each["name"] == "bank" for each in facts["inputs"]):
            known = {**known, "bank": self._bank()}
        given = {each["name"]: _chosen(each, known[each["name"]]) for each in facts["inputs"]}
        outputs = self._module(facts["file"])(**given)
        assert list(outputs) == [each["name"] for each in facts["outputs"]]
        return outputs, {facts["state"][name]: value for name, value in outputs.items() if name in facts["state"]}

    def _empty(self, entry: str, known: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Caches of length 0, for an entry that takes some and is called first."""
        sizes = {"batch": len(known["input_ids"]), "past": 0} if "input_ids" in known else {}
        return {
            each["name"]: torch.zeros([sizes.get(size, size) for size in each["shape"]])
            for each in self._facts["entries"][entry]["inputs"]
            if "past" in each.get("shape", ()) and each["name"] not in known
        }

    def _module(self, file: str) -> Any:
        if file not in self._modules:
            load = next(each for suffix, each in LOADERS.items() if file.endswith(suffix))
            self._modules[file] = load(str(self._directory / file))
        return self._modules[file]

    def _bank(self) -> dict[str, torch.Tensor]:
        if not self._stacked:
            self._stacked = read_bank(self._directory)
        return self._stacked

    def _adapter(self, name: str | None) -> dict[str, Any]:
        if name is None:
            return {}
        return {"adapter": read_tensors(self._directory / self._facts["adapter_files"][name])}


def _chosen(facts: Mapping[str, Any], value: Any) -> Any:
    """What an entry takes of a value: of an adapter not always everything, a decode has no encoder."""
    return {each["name"]: value[each["name"]] for each in facts["tensors"]} if "tensors" in facts else value


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """A file of safetensors, read with torch."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    found = {}
    for name, facts in json.loads(raw[8:start]).items():
        if name != "__metadata__":
            first, last = facts["data_offsets"]
            data = torch.frombuffer(bytearray(raw[start + first : start + last]), dtype=TYPES[facts["dtype"]])
            found[name] = data.reshape(facts["shape"])
    return found


def read_bank(directory: Path) -> dict[str, torch.Tensor]:
    """What rows of an artifact choose from: of all adapters in order, in front of them the base's."""
    facts = json.loads((directory / "manifest.json").read_text())["artifact"]
    names = ["__base__"] * facts["bank"]["base"] + facts["adapter_names"]
    rows = [read_tensors(directory / facts["adapter_files"][name]) for name in names]
    return {name: torch.stack([each[name] for each in rows]) for name in rows[0]}


def _serve() -> None:
    sys.meta_path.insert(0, _Blocker())  # type: ignore[arg-type]
    torch.set_num_threads(1)
    artifacts: dict[str, _Artifact] = {}
    for line in sys.stdin:
        job, result = json.loads(line)
        try:
            torch.save(_run(torch.load(job, weights_only=True), artifacts), result)
            said = ""
        except Exception:
            said = traceback.format_exc()
        print(json.dumps(said), flush=True)


def _run(job: Mapping[str, Any], artifacts: dict[str, _Artifact]) -> Any:
    where = job["artifact"]
    artifact = artifacts[where] = artifacts.get(where) or _Artifact(Path(where))
    with torch.no_grad():
        made = artifact.call(job["given"]) if job["what"] == "call" else artifact.generate(**job["given"])
    assert not {name.partition(".")[0] for name in sys.modules} & set(BLOCKED)
    return made


if __name__ == "__main__":
    _serve()

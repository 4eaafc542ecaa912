"""Finding, reading and writing a checkpoint's files, and every way that can fail."""

import os
import pickle

import huggingface_hub
import pytest
import torch
from safetensors import safe_open
from torch.testing import assert_close

from peftc.grammar.diagnostics import CheckpointError
from peftc.runtime.peft_format.adapter_files import adapter_directory, locate, read_adapter, write_adapter, write_files

CONFIG = {"peft_type": "LORA", "r": 8}
TENSORS = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(2, dtype=torch.bfloat16)}


@pytest.fixture
def checkpoint(tmp_path):
    directory = tmp_path / "adapter"
    write_adapter(directory, CONFIG, TENSORS)
    return directory


def refusal(call, *arguments, **options):
    with pytest.raises(CheckpointError) as caught:
        call(*arguments, **options)
    (diagnostic,) = caught.value.diagnostics
    return diagnostic


# --- both ways ---


def test_what_is_written_is_read(checkpoint):
    config, tensors = read_adapter(checkpoint)
    assert config == CONFIG
    assert_close(tensors, TENSORS, rtol=0, atol=0)
    assert sorted(each.name for each in checkpoint.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    with safe_open(checkpoint / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_views_and_shared_storage_are_written(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"t": base.t(), "row": base[1], "same": base, "trained": torch.nn.Parameter(base)}
    write_adapter(tmp_path, CONFIG, tensors)
    assert_close(read_adapter(tmp_path)[1], {key: each.detach() for key, each in tensors.items()})


def test_a_failure_leaves_what_was_there(checkpoint):
    def broken(path):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    found = refusal(write_files, checkpoint, {"adapter_config.json": lambda path: path.write_text("{}"), "x": broken})
    assert found.code == "E350"
    assert "No space left" in found.message
    assert read_adapter(checkpoint)[0] == CONFIG
    assert sorted(each.name for each in checkpoint.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "taken").write_text("")
    assert refusal(write_adapter, tmp_path / "taken", CONFIG, TENSORS).code == "E350"


# --- reading ---


@pytest.mark.parametrize(
    ("name", "content", "code", "message"),
    [
        ("adapter_config.json", None, "E302", "no file 'adapter_config.json'"),
        ("adapter_config.json", b"{", "E303", "not valid JSON: Expecting property name"),
        ("adapter_config.json", b"\xff\xfe{}", "E303", "not valid JSON"),
        ("adapter_config.json", b"[" * 100_000, "E303", "nested too deeply"),
        ("adapter_config.json", b'{"r": ' + b"1" * 5000 + b"}", "E303", "a number too long"),
        ("adapter_config.json", b"[1]", "E304", "not a JSON object but list"),
        ("adapter_config.json", b" " * (16 * 2**20 + 1), "E305", "more than 16 MiB is refused"),
        ("adapter_model.safetensors", None, "E302", "no file 'adapter_model.safetensors'"),
        ("adapter_model.safetensors", b"", "E307", "damaged or truncated"),
        ("adapter_model.safetensors", b"\0" * 7, "E307", "damaged or truncated"),
        ("adapter_model.safetensors", b"\xff" * 64, "E307", "damaged or truncated"),
    ],
)
def test_damaged_files(checkpoint, name, content, code, message):
    (checkpoint / name).unlink()
    if content is not None:
        (checkpoint / name).write_bytes(content)
    found = refusal(read_adapter, checkpoint)
    assert found.code == code
    assert message in found.message
    assert str(checkpoint) in found.where


def test_a_truncated_file(checkpoint):
    path = checkpoint / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    assert refusal(read_adapter, checkpoint).code == "E307"


def test_a_missing_directory_and_its_neighbours(checkpoint):
    found = refusal(read_adapter, checkpoint.with_name("adaptr"))
    assert (found.code, found.help) == ("E301", "did you mean 'adapter'?")


def test_a_models_directory(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert refusal(read_adapter, tmp_path).help in (
        "this is a model's directory, not an adapter's",
        "did you mean 'config.json'?",
    )


def test_pickles_are_refused_unless_asked_for(checkpoint):
    (checkpoint / "adapter_model.safetensors").unlink()
    torch.save(TENSORS, checkpoint / "adapter_model.bin")
    assert refusal(read_adapter, checkpoint).code == "E306"
    assert_close(read_adapter(checkpoint, allow_pickle=True)[1], TENSORS)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


@pytest.mark.parametrize("content", [pickle.dumps(Evil()), b"", b"junk", b"\x80\x04K\x01."])
def test_pickles_of_anything_else(checkpoint, content, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (checkpoint / "adapter_model.safetensors").unlink()
    (checkpoint / "adapter_model.bin").write_bytes(content)
    assert refusal(read_adapter, checkpoint, allow_pickle=True).code == "E307"
    assert not (tmp_path / "evil").exists()


def test_a_pickle_that_is_no_table(checkpoint):
    (checkpoint / "adapter_model.safetensors").unlink()
    torch.save([torch.ones(1)], checkpoint / "adapter_model.bin")
    assert refusal(read_adapter, checkpoint, allow_pickle=True).message == "does not hold tensors by name"


# --- finding ---


def test_a_local_directory_is_taken_as_it_is(checkpoint, monkeypatch):
    assert locate(checkpoint) == checkpoint
    assert locate(str(checkpoint.parent), subfolder="adapter") == checkpoint
    monkeypatch.chdir(checkpoint.parent)
    assert locate("adapter").resolve() == checkpoint


@pytest.mark.parametrize("subfolder", ["../other", "/etc", "a/../../other", "..", "a\\b"])
def test_a_subfolder_cannot_lead_out(checkpoint, subfolder):
    assert refusal(locate, checkpoint, subfolder=subfolder).code == "E309"


def test_nor_through_a_link(checkpoint, tmp_path):
    (tmp_path / "secret").mkdir()
    (checkpoint / "inside").symlink_to(tmp_path / "secret")
    found = refusal(locate, checkpoint, subfolder="inside")
    assert found.code == "E309"
    assert "through a link" in found.message


def test_missing_places(checkpoint):
    assert refusal(locate, checkpoint, subfolder="none").code == "E301"
    assert "give its directory" in refusal(locate, checkpoint / "adapter_config.json").help
    found = refusal(locate, str(checkpoint.with_name("adaptr")))
    assert (found.code, found.help) == ("E301", "did you mean 'adapter'?")
    assert "does not exist either" in refusal(locate, "/no/such/place").help


def test_nothing_here_and_nothing_cached(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "addapter").mkdir()
    found = refusal(locate, "adapter", local_files_only=True, cache_dir=tmp_path / "cache")
    assert (found.code, found.help) == ("E308", "did you mean 'addapter'?")
    assert "not in the local cache" in found.message


def test_only_the_adapters_files_are_fetched(checkpoint, monkeypatch):
    asked = {}

    def download(repo, **options):
        asked.update(options, repo=repo)
        return str(checkpoint.parent)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert locate("some/adapter", revision="v1", subfolder="adapter", token="t") == checkpoint
    assert (asked["repo"], asked["revision"], asked["token"]) == ("some/adapter", "v1", "t")
    assert asked["allow_patterns"] == [
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "adapter/adapter_model.bin",
        "adapter/peftc_manifest.json",
        "adapter/pytorch_lora_weights.safetensors",
    ]


# --- names ---


def test_adapters_live_where_peft_puts_them(tmp_path):
    assert adapter_directory(tmp_path, "default") == tmp_path
    assert adapter_directory(tmp_path, "support-2") == tmp_path / "support-2"


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a.b", "-a", "a b", "a" * 101, "a\n", "\0"])
def test_names_that_are_no_directories(tmp_path, name):
    assert refusal(adapter_directory, tmp_path, name).code == "E310"

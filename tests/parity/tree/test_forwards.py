"""Python in a model's forward runs as it would: sizes, gradients off, random numbers, modes of parts."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from torch import nn
from torch.testing import assert_close

from peftc.runtime.regions.kinds import fingerprint
from peftc.runtime.regions.region import Split
from tests.parity.tree.tree import IDS, QV, llama, logits, pair

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


class Long(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for each in self.blocks:
            x = each(x)
        return x


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(self.fc(x))
        return -y if x.shape[0] > 3 else y + 1


class Data(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(self.fc(x))
        return -y if y.sum() > 0 else y


class Looping(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, state = torch.tanh(self.fc(x)), x.new_zeros(8)
        for row in range(x.shape[0]):
            state = state + y[row]
        return y + state + sum(range(3))


class Frozen(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            x = torch.tanh(self.fc(x))
        return self.fc(x)


class Aware(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) * (2 if torch.is_grad_enabled() else 1)


class Coin(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) * (1 if random.random() < 0.5 else -1) * (1 if np.random.rand() < 0.5 else 2)


class Counting(Block):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.fc(x) * self.calls


def stack(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = Long()
    model.blocks = nn.ModuleList(kind() for _ in range(2))
    return model.eval()


@pytest.mark.parametrize("sizes", [(2, 3, 4, 9, 1), (9, 2, 4)])
@pytest.mark.parametrize("kind", [Block, Data, Counting])
def test_branches(kind: type[nn.Module], sizes: tuple[int, ...], tmp_path: Path) -> None:
    ours, theirs = pair(stack(kind), ["fc"], tmp_path)
    for rows in sizes:
        x = torch.randn(rows, 8)
        assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)


def test_a_loop_over_a_size_runs_as_it_is_written(tmp_path: Path) -> None:
    """A graph of it would be of one length alone, and as long as that."""
    ours, theirs = pair(stack(Looping), ["fc"], tmp_path)
    for rows in (4, 9, 5):
        x = torch.randn(rows, 8)
        assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)
    host = ours._adapter_state.host
    reasons = [each.reason for each in host.local("blocks.0").programs.values()]
    assert len(reasons) == 3
    assert all("it loops over a size" in each for each in reasons)
    assert host.traces.count(fingerprint(ours.blocks[0])) == 0
    assert host.traces.count(fingerprint(ours.blocks[0].fc)) == 1, "whatever the length"


def test_experts_ask_what_they_ask_an_exporter_while_a_cache_is_looked_at(tmp_path: Path) -> None:
    """Whether they are compiled decides how they multiply; the fast way has no fake values in float32."""
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4)
    config = hf.MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=4, pad_token_id=0)
    ours, theirs = pair(hf.MixtralForCausalLM(config).eval(), QV, tmp_path)
    assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-5)
    (program,) = ours._adapter_state.host.local("model.layers.0").programs.values()
    assert not isinstance(program, Split), program.reason


def test_gradients_turned_off_inside(tmp_path: Path) -> None:
    ours, theirs = pair(stack(Frozen).train(), ["fc"], tmp_path)
    grads = []
    for each in (ours.train(), theirs.train()):
        each(X).square().sum().backward()
        grads.append(sorted(float(p.grad.abs().sum()) for p in each.parameters() if p.grad is not None))
    assert_close(torch.tensor(grads[0]), torch.tensor(grads[1]), rtol=1e-4, atol=1e-6)


def test_whether_gradients_are_kept(tmp_path: Path) -> None:
    ours, theirs = pair(stack(Aware), ["fc"], tmp_path)
    for enabled in (True, False, True):
        with torch.set_grad_enabled(enabled):
            assert_close(ours(X), theirs(X), atol=1e-5, rtol=1e-5)


def test_random_numbers_that_are_not_torchs(tmp_path: Path) -> None:
    ours, theirs = pair(stack(Coin), ["fc"], tmp_path)
    runs = []
    for each in (theirs, ours):
        random.seed(3)
        np.random.seed(3)
        runs.append([each(X) for _ in range(12)])
    assert_close(runs[1], runs[0], atol=1e-5, rtol=1e-5)
    assert len({round(float(each.sum()), 3) for each in runs[0]}) > 2


def test_a_part_in_evaluation(tmp_path: Path) -> None:
    ours, theirs = pair(llama(), QV, tmp_path, lora_dropout=0.5)
    with torch.no_grad():
        wanted = theirs.eval()(IDS).logits
        ours.train()
        assert not torch.allclose(ours(IDS).logits, ours(IDS).logits, atol=1e-4)
        ours.model.layers.eval()
        assert_close(ours(IDS).logits, wanted, atol=1e-5, rtol=1e-5)
        ours.model.layers[1].self_attn.q_proj.train()
        assert not torch.allclose(ours(IDS).logits, ours(IDS).logits, atol=1e-5)


def test_layers_that_are_dropped(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, dropout=0.0)
    sizes |= dict(encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48)
    config = hf.BartConfig(**sizes, max_position_embeddings=32, encoder_layerdrop=0.5, decoder_layerdrop=0.5)
    ours, theirs = pair(hf.BartForConditionalGeneration(config), QV, tmp_path)
    ours.train(), theirs.train()
    torch.manual_seed(0)
    legal = {round(theirs(IDS, labels=IDS).loss.item(), 3) for _ in range(80)}
    got = {round(ours(IDS, labels=IDS).loss.item(), 3) for _ in range(20)}
    assert len(got) > 2
    assert all(min(abs(each - other) for other in legal) < 2e-3 for each in got)

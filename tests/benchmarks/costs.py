"""Measures the lowerings of one adapted linear against each other, and how good the cost model's choice is.

    python tests/benchmarks/costs.py [--methods lora,dora] [--widths 256x256,1024x4096] [--tokens 1,64] [--ranks 8]
        [--modes frozen,eval,train] [--seconds 0.1] [--all]

Each row is a linear of a size with an adapter of a method and rank, called with so many tokens: frozen (an adapter
loaded for inference), eval (one that can train, without gradients) and train (forward and backward, gradients of the
activation included). Each cell is the measured time and, in brackets, the cost model's estimate, in microseconds. The
lowerings take turns and the fastest turn counts, since a busy machine only ever adds time. With one thread, the
processor's time is taken, which leaves out what other programs do. The last column is what the
engine's choice loses against the best; rows that lose nothing are left out unless there is `--all`.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import nn

from peftc import compiler
from peftc.compiler.example_calls import call_like
from peftc.passes.cost.cost import LOWERINGS, Choice, Lowering, alternatives, sizes_of
from peftc.runtime.execution.program import Program

METHODS = {
    "lora": "lora(rank = {rank})",
    "loha": "loha(rank = {rank})",
    "dora": "dora(rank = {rank})",
    "hira": "hira(rank = {rank})",
    "oft": "oft(block = {rank})",
    "lokr": "lokr(rank = {rank})",
    "ia3": "ia3()",
    "vera": "vera(rank = {rank})",
    "hra": "hra(rank = {rank})",
    "fourierft": "fourierft()",
}
MODES = ("frozen", "eval", "train")
WITHIN = 0.10


@dataclass(frozen=True)
class Row:
    """One case: what each lowering took and was estimated to take, in seconds, and which the engine takes."""

    method: str
    rank: int
    width: tuple[int, int]
    tokens: int
    mode: str
    measured: dict[Lowering, float]
    estimated: dict[Lowering, float]
    chosen: Lowering

    @property
    def loss(self) -> float:
        """How much longer the chosen lowering takes than the best, as a part of the best."""
        return self.measured[self.chosen] / min(self.measured.values()) - 1


class Bench:
    """A linear with an adapter, and its programs."""

    def __init__(self, method: str, rank: int, width: tuple[int, int]):
        self.method, self.rank, self.width = method, rank, width
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(*width, bias=False)).eval()
        self.adapted = compiler.apply(model, f'adapter a = {METHODS[method].format(rank=rank)} {{ on "0" }}')
        with torch.no_grad():
            for each in self.adapted.parameters():
                if each.requires_grad:
                    each.normal_(std=0.02)

    def row(self, tokens: int, mode: str, seconds: float) -> Row:
        """Measure one case."""
        adapted, state = self.adapted, self.adapted._adapter_state
        adapted.set_adapter("a", inference_mode=mode == "frozen")
        x = torch.randn(tokens, self.width[0], requires_grad=mode == "train")
        call = call_like(adapted, (x,))
        engine, tenant = state.engine, state.engine._tenant
        (at,) = tenant.specialisation.structure.sites
        training = mode == "train"
        with torch.set_grad_enabled(training):
            choice = engine._choice(call)
            costs = alternatives(
                at, sizes_of(at, tenant.lookup), tokens, training=training, frozen=not tenant.trainable
            )
            runs = {}
            for lowering in costs:
                forced = _forced(lowering, at.site.name, not tenant.trainable)
                traced = engine.traced(call)
                graph = engine._specialised(traced, False, False, forced)
                lowered = engine.backend.lower(graph, autocast=False, choice=forced)
                runs[lowering] = self._run(Program(traced, lowered, adapted, engine.slots), x, training)
            measured = fastest(runs, seconds)
        chosen = next((each for each in LOWERINGS if choice == _forced(each, at.site.name, choice.frozen)), "pushed")
        estimated = {lowering: cost.seconds for lowering, cost in costs.items()}
        return Row(self.method, self.rank, self.width, tokens, mode, measured, estimated, chosen)

    def _run(self, program: Program, x: torch.Tensor, training: bool) -> Callable[[], object]:
        trained = [each for each in self.adapted.parameters() if each.requires_grad]
        wanted = torch.randn(x.shape[0], self.width[1])

        def run() -> object:
            if program.pieces is not None:
                program.pieces.refresh()
            (out,) = program.function(x)
            return torch.autograd.grad(out, [x, *trained], wanted, allow_unused=True) if training else out

        return run


def _forced(lowering: Lowering, site: str, frozen: bool) -> Choice:
    only = frozenset({site})
    return Choice(only if lowering == "dense" else frozenset(), only if lowering == "kept" else frozenset(), frozen)


def fastest(runs: dict[Lowering, Callable[[], object]], seconds: float) -> dict[Lowering, float]:
    """The fastest of many turns of each."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    best = dict.fromkeys(runs, float("inf"))
    end = time.perf_counter() + seconds * len(runs)
    turn = 0
    while turn < 8 or time.perf_counter() < end:
        for name, run in runs.items():
            start = clock()
            run()
            taken = clock() - start
            if turn > 1:
                best[name] = min(best[name], taken)
        turn += 1
    return best


HEAD = f"{'method':<10} {'rank':>4} {'in x out':>11} {'tokens':>6} {'mode':<6}"


def head() -> str:
    """The names of the columns."""
    return f"{HEAD} {' '.join(f'{name:>18}' for name in LOWERINGS)}  chosen    loss"


def line(row: Row) -> str:
    """A row of the table: microseconds measured, and estimated in brackets."""
    cells = [
        f"{row.measured[name] * 1e6:,.0f} ({row.estimated[name] * 1e6:,.0f})" if name in row.measured else ""
        for name in LOWERINGS
    ]
    width = f"{row.width[0]} x {row.width[1]}"
    left = f"{row.method:<10} {row.rank:>4} {width:>11} {row.tokens:>6} {row.mode:<6}"
    loss = f"{100 * row.loss:.0f} %" if row.loss else ""
    return f"{left} {' '.join(f'{cell:>18}' for cell in cells)}  {row.chosen:<7} {loss:>6}"


def summary(rows: Sequence[Row]) -> str:
    """How often the choice is good, and what having none would lose."""
    losses = [row.loss for row in rows]
    good = sum(loss <= WITHIN for loss in losses)
    missed = max(rows, key=lambda row: row.loss)
    return (
        f"{good} of {len(rows)} choices within {100 * WITHIN:.0f} % of the best; "
        f"the worst loses {100 * missed.loss:.0f} % ({missed.method}, {missed.tokens} tokens, {missed.mode})\n"
        f"the choices lose {_mean(losses)}; {_alternatives(rows)}"
    )


def _alternatives(rows: Sequence[Row]) -> str:
    """What always taking one kind of lowering would lose."""
    pushed = [row.measured["pushed"] / min(row.measured.values()) - 1 for row in rows]
    other = [
        min(time for name, time in row.measured.items() if name != "pushed" or len(row.measured) == 1)
        / min(row.measured.values())
        - 1
        for row in rows
    ]
    return f"always pushed loses {_mean(pushed)}, never pushed {_mean(other)}"


def _mean(losses: Sequence[float]) -> str:
    return f"{100 * sum(losses) / len(losses):.1f} % on average"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="lora,loha,dora,hira,oft,lokr,ia3")
    parser.add_argument("--widths", default="256x256,1024x1024,1024x2816,2048x2048")
    parser.add_argument("--tokens", default="1,16,128,1024")
    parser.add_argument("--ranks", default="8,64")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--seconds", type=float, default=0.1, help="for each measurement")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--all", action="store_true", help="show every row")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    # A process that has freed a large tensor keeps freed memory for the next one, as any that ran a model of some size.
    # Before that, every temporary of megabytes would be fetched from the system page by page.
    torch.empty(31 * 2**20, dtype=torch.uint8).fill_(1)
    widths = [tuple(map(int, each.split("x"))) for each in options.widths.split(",")]
    tokens = [int(each) for each in options.tokens.split(",")]
    rows: list[Row] = []
    print(head(), flush=True)
    for method, rank, width in product(options.methods.split(","), map(int, options.ranks.split(",")), widths):
        if "{rank}" not in METHODS[method] and rank != int(options.ranks.split(",")[0]):
            continue
        bench = Bench(method, rank, width)
        for mode, count in product(options.modes.split(","), tokens):
            rows.append(bench.row(count, mode, options.seconds))
            if options.all or rows[-1].loss:
                print(line(rows[-1]), flush=True)
    print(summary(rows))


if __name__ == "__main__":
    main()

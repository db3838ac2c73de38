"""What makes 8-bit states of Adam work: the map, the blocks, and how the second moment is stored.

As the ablation of arXiv 2110.02861, on the byte language model: states are quantized after each step in plain PyTorch,
by one scheme or another, and everything else is the same.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from byte_language_model import make_task
from common import MakeOptimizer, Schedule, console, parameters, train
from octavo.reference import dynamic_map
from report import OUT, show, write
from torch import Tensor, nn

MIN_SIZE = 4096  # smaller tensors keep 32-bit states, as in octavo


@dataclass(frozen=True)
class Scheme:
    """How a state becomes 8 bit."""

    dynamic: bool  # else cells of one size
    blocksize: int | None  # None: one block per tensor
    root: bool = True  # of the second moment v, store sqrt(v); else v itself
    keep: bool = False  # what is above 0 gets at least the lowest code above 0
    stochastic: bool = False  # the second moment goes up or down at random, the nearer the likelier

    def __str__(self) -> str:
        parts = ["dynamic" if self.dynamic else "linear", "blocks" if self.blocksize else "tensor"]
        parts += ["sqrt(v)" if self.root else "v", *(["never 0"] if self.keep else [])]
        return ", ".join([*parts, *(["at random"] if self.stochastic else [])])


SCHEMES = (
    Scheme(dynamic=True, blocksize=256, keep=True),  # octavo's
    Scheme(dynamic=True, blocksize=256, keep=True, stochastic=True),
    Scheme(dynamic=True, blocksize=256),
    Scheme(dynamic=True, blocksize=None),
    Scheme(dynamic=False, blocksize=256),
    Scheme(dynamic=False, blocksize=None),
    Scheme(dynamic=True, blocksize=256, root=False),
    Scheme(dynamic=False, blocksize=256, root=False),
)


@lru_cache
def codebook(dynamic: bool, signed: bool) -> tuple[Tensor, Tensor]:
    """The values of the codes in [-1, 1] or [0, 1], ascending, and the middles between neighbours."""
    equal = torch.linspace(-1, 1, 255) if signed else torch.linspace(0, 1, 256)  # 0 is one of them
    values = dynamic_map(signed) if dynamic else equal
    return values, (values[1:] + values[:-1]) / 2


def round_trip(x: Tensor, scheme: Scheme, signed: bool) -> Tensor:
    """x as 8 bit can say it: in every block, a code's value times the block's absmax; the nearest code's mostly."""
    values, middles = codebook(scheme.dynamic, signed)
    blocksize = scheme.blocksize or x.numel()
    blocks = nn.functional.pad(x.flatten(), (0, -x.numel() % blocksize)).view(-1, blocksize)
    absmax = blocks.abs().amax(1, keepdim=True)
    scaled = blocks / absmax.clamp_min(torch.finfo(torch.float32).tiny)
    if scheme.stochastic and not signed:
        low = (torch.bucketize(scaled, values, right=True) - 1).clamp_max(len(values) - 2)
        codes = low + (torch.rand_like(scaled) * (values[low + 1] - values[low]) < scaled - values[low])
    else:
        codes = torch.bucketize(scaled, middles, out_int32=True)
    if scheme.keep and not signed:
        codes = torch.where(blocks > 0, codes.clamp_min(1), codes)
    return (values[codes] * absmax).flatten()[: x.numel()].view_as(x)


class AdamWRounded(torch.optim.AdamW):
    """torch's AdamW, whose states go through 8 bit after every step."""

    def __init__(self, params: Any, scheme: Scheme, **options: Any) -> None:
        super().__init__(params, **options)
        self.scheme = scheme

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for param, state in self.state.items():
            if param.numel() >= MIN_SIZE:
                state["exp_avg"] = round_trip(state["exp_avg"], self.scheme, signed=True)
                second = state["exp_avg_sq"]
                stored = round_trip(second.sqrt() if self.scheme.root else second, self.scheme, signed=False)
                state["exp_avg_sq"] = stored.square() if self.scheme.root else stored
        return loss


def main(
    steps: Annotated[int, typer.Option(min=1, help="Steps of each training.")] = 300,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings, each with its own weights and batches.")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Windows of text in a batch.")] = 6,
    context: Annotated[int, typer.Option(min=2, help="Bytes in a window.")] = 64,
    width: Annotated[int, typer.Option(help="Width of the model; 4 heads. Below 64, no matrix is in 8 bit.")] = 128,
    layers: Annotated[int, typer.Option(min=1, help="Transformer blocks.")] = 4,
    lr: Annotated[float, typer.Option(help="Highest learning rate: warm-up of a tenth, then a cosine.")] = 2e-3,
    clip: Annotated[float, typer.Option(help="Largest norm of the gradients, for all optimizers; 0: any.")] = 1.0,
    validation: Annotated[int, typer.Option(help="Bytes of held-out text to judge by.")] = 32768,
    threads: Annotated[int, typer.Option(min=1, help="Threads of PyTorch.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder for ablation.json and .png.")] = OUT,
) -> None:
    """Show which parts of the scheme let Adam's states be 8 bit: the byte language model, trained with each of several.

    dynamic or linear: the map of codes to values, arXiv 2110.02861's or 255 equal cells. blocks or tensor: an absmax
    for 256 elements or for all. sqrt(v) or v: what is stored of the second moment. never 0: what is above 0 is stored
    above 0. at random: the second moment is rounded up or down at random, the nearer the likelier, and not to nearest.
    octavo is dynamic, blocks, sqrt(v), never 0. A training whose loss explodes is shown as diverged.
    """
    settings = dict(locals())
    torch.set_num_threads(threads)
    task = make_task(batch, context, width, layers, validation=validation, name="ablation")
    console.print(f"byte language model: {parameters(task):,} parameters")

    def rounded(scheme: Scheme, model: nn.Module) -> torch.optim.Optimizer:
        return AdamWRounded(model.parameters(), scheme)

    contenders: dict[str, MakeOptimizer] = {"32 bit": lambda model: torch.optim.AdamW(model.parameters())}
    contenders |= {str(scheme): partial(rounded, scheme) for scheme in SCHEMES}
    begin = time.perf_counter()
    runs = train(task, contenders, Schedule(lr, steps // 10, steps), seeds, max(1, steps // 8), clip)
    show(task, runs, "nats per byte")
    write(task, runs, settings, time.perf_counter() - begin, out)


app = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_show_locals=False)
app.command()(main)

if __name__ == "__main__":
    app()

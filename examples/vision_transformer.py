"""A small vision transformer on Fashion-MNIST, trained by torch's AdamW and by octavo's AdamW8bit, side by side."""

from __future__ import annotations

import gzip
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
import typer
from byte_language_model import Beta1, Beta2, Control, Incumbent, Lion, contenders
from common import Batch, Schedule, Score, Task, console, parameters, train
from report import OUT, show, write
from torch import Tensor, nn
from torch.nn import functional as F
from transformer import Block, initialise

DATA = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package puts it
CLASSES, SIDE = 10, 28


class VisionTransformer(nn.Module):
    """Squares of the picture, linearly embedded; the mean over them is classified."""

    def __init__(self, patch: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, patch, stride=patch)
        self.place = nn.Parameter(torch.randn((SIDE // patch) ** 2, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads, causal=False) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)
        initialise(self)

    def forward(self, pictures: Tensor) -> Tensor:
        x = self.patch(pictures[:, None]).flatten(2).transpose(1, 2) + self.place
        return self.head(self.norm(self.blocks(x)).mean(1))


# ---- Fashion-MNIST -------------------------------------------------------------------------------------------------


class DataError(Exception):
    pass


@contextmanager
def data_errors() -> Iterator[None]:
    """A `DataError` is printed and ends the program."""
    try:
        yield
    except DataError as error:
        console.print(str(error), markup=False, style="red", soft_wrap=True)
        raise typer.Exit(1) from None


def read_idx(path: Path, dimensions: int) -> Tensor:
    """uint8 tensor of an idx file: 0, 0, type 8, number of dimensions, each of them in 4 bytes, then the elements."""
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    begin = 4 + 4 * dimensions
    shape = [int.from_bytes(content[4 * i + 4 : 4 * i + 8], "big") for i in range(dimensions)]
    size = int(torch.tensor(shape).prod())
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) != begin + size:
        raise DataError(f"{path} is no idx file of bytes in {dimensions} dimensions, or not all of one")
    return torch.frombuffer(bytearray(content[begin:]), dtype=torch.uint8).view(shape)


def read_part(folder: Path, part: str) -> Batch:
    """Pictures [n, 28, 28], about normal, and their classes; part is "train" or "t10k"."""
    tensors = []
    for what, dimensions in (("images", 3), ("labels", 1)):
        name = f"{part}-{what}-idx{dimensions}-ubyte"
        found = [path for path in (folder / name, folder / f"{name}.gz") if path.exists()]
        if not found:
            raise DataError(
                f"{folder} has no {name}.gz. On Debian and Ubuntu: apt-get install dataset-fashion-mnist. Elsewhere: "
                "put Fashion-MNIST's four idx files, as published or unpacked, into a folder and name it by --data."
            )
        tensors.append(read_idx(found[0], dimensions))
    pictures, classes = tensors
    if pictures.shape != (len(classes), SIDE, SIDE):
        raise DataError(f"{folder}: {part} has pictures {tuple(pictures.shape)} but {len(classes)} labels")
    return (pictures / 255 - 0.286) / 0.353, classes.long()


# ---- training ------------------------------------------------------------------------------------------------------


def loss(model: nn.Module, batch: Batch) -> Tensor:
    pictures, classes = batch
    return F.cross_entropy(model(pictures), classes)


def make_task(folder: Path, batch: int, patch: int, width: int, layers: int, validation: int) -> Task:
    """Judged by the first `validation` pictures of the test part; the curve sees an eighth of them."""
    pictures, classes = read_part(folder, "train")
    held_out, answers = (part[:validation] for part in read_part(folder, "t10k"))

    def batches(seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            chosen = torch.randint(len(pictures), (batch,), generator=generator)
            yield pictures[chosen], classes[chosen]

    def evaluate(model: nn.Module, full: bool) -> Score:
        stop = len(answers) if full else max(1, len(answers) // 8)
        logits = torch.cat([model(part) for part in held_out[:stop].split(500)])
        accuracy = (logits.argmax(1) == answers[:stop]).float().mean().item()
        return {"loss": F.cross_entropy(logits, answers[:stop]).item(), "accuracy": accuracy}

    def model() -> nn.Module:
        return VisionTransformer(patch, width, layers, heads=4)

    return Task("vision transformer", model, loss, batches, evaluate)


def main(
    data: Annotated[Path, typer.Option(help="Folder of Fashion-MNIST's four idx files, gzipped or not.")] = DATA,
    steps: Annotated[int, typer.Option(min=1, help="Steps of each training.")] = 600,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings, each with its own weights and batches.")] = 3,
    batch: Annotated[int, typer.Option(min=1, help="Pictures in a batch.")] = 64,
    patch: Annotated[int, typer.Option(help="Side of the squares that a picture is cut into: 4, 7 or 14.")] = 7,
    width: Annotated[int, typer.Option(help="Width of the model; 4 heads. Below 64, few states are in 8 bit.")] = 96,
    layers: Annotated[int, typer.Option(min=1, help="Transformer blocks.")] = 4,
    lr: Annotated[float, typer.Option(help="Highest learning rate: warm-up of a tenth, then a cosine.")] = 1e-3,
    beta1: Beta1 = 0.9,
    beta2: Beta2 = 0.999,
    lion: Lion = False,
    incumbent: Incumbent = False,
    validation: Annotated[int, typer.Option(help="Pictures to judge by, of the 10,000 for testing.")] = 10000,
    control: Control = False,
    threads: Annotated[int, typer.Option(min=1, help="Threads of PyTorch and of octavo.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder for vision_transformer.json and .png.")] = OUT,
) -> None:
    """Train a small vision transformer on Fashion-MNIST with 32-bit AdamW and with octavo's AdamW8bit.

    Both start from the same weights and see the same batches, so that their paired difference shows what 8-bit states
    change. It prints validation loss and accuracy, and writes a JSON file and a plot. The defaults take some minutes on
    one core. The data come with Debian's package dataset-fashion-mnist; nothing is downloaded.
    """
    settings = dict(locals())
    torch.set_num_threads(threads)
    with data_errors():
        task = make_task(data, batch, patch, width, layers, validation)
    console.print(f"{task.name}: {parameters(task):,} parameters")
    begin = time.perf_counter()
    made = contenders(beta2, control, beta1, lion, incumbent)
    runs = train(task, made, Schedule(lr, steps // 10, steps), seeds, every=max(1, steps // 12))
    show(task, runs, "nats")
    write(task, runs, settings, time.perf_counter() - begin, out)


app = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_show_locals=False)
app.command()(main)

if __name__ == "__main__":
    app()

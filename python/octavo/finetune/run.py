"""`finetune`: the run itself."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import models
from .._version import __version__
from ..analyze.plots import need_matplotlib
from ..core.files import replace_file
from ..core.low_bit import LowBitLinear
from ..core.machine import describe_machine
from ..lora.adapters import add_lora, load_adapter, save_adapter
from ..lora.layers import linear_layers
from ..models import evaluate
from ..models.quantize import quantize_model
from . import curve, memory, residual
from .data import Text
from .directory import ADAPTER, CURVE, Checkpoint, History, RunDirectory, open_run
from .settings import Settings

_NAME = "default"  # the name of the adapter, as PEFT calls it


class NonFiniteError(ValueError):
    """A loss, gradient or perplexity that is NaN or Inf; training has stopped and its checkpoints are kept.

    Example:
        >>> from octavo.finetune import NonFiniteError
        >>> issubclass(NonFiniteError, Exception)
        True
    """


class Watcher:
    """A run calls these methods as it goes on; here they do nothing, and a subclass overrides those it needs.

    Example:
        >>> from octavo.finetune import Watcher
        >>> class Losses(Watcher):
        ...     def step(self, line):
        ...         print(line["step"], line["loss"])
        >>> Losses().step({"step": 1, "loss": 2.5})
        1 2.5
    """

    def stage(self, what: str) -> None:
        """A stage before training begins; `what` names it."""

    def begin(self, total: int, history: History) -> None:
        """Training begins, or goes on after the steps in `history`, of `total`. From here on `stop` is asked."""

    def step(self, line: Mapping[str, float]) -> None:
        """A step is done: "step" (from 1), "lr", "loss", "grad_norm", "tokens", "seconds"."""

    def evaluating(self, window: int, windows: int) -> None:
        """A window of the text that was held out is done."""

    def evaluated(self, step: int, perplexity: float) -> None:
        """All of them are."""

    def saved(self, path: Path) -> None:
        """A checkpoint is written."""

    def note(self, text: str) -> None:
        """Something that is good to know."""


@dataclass(frozen=True)
class Result:
    """The outcome of a run.

    Attributes:
        out: its directory.
        adapter: in PEFT's format; None if the run was stopped before its end.
        steps, total: done, and to do.
        losses: of every step, nats per token.
        perplexities: of the text held out, by the number of steps before: the first and the last are before and after.
        tokens_per_s: in the steps.
        seconds: of all steps.
        memory: see `memory_table`; the last row is this run.

    Example:
        >>> from pathlib import Path
        >>> from octavo.finetune import Result
        >>> Result(Path("run"), None, 2, 2, [3.5, 3.0], {2: 20.0}, 1000.0, 1.5, []).losses[-1]
        3.0
    """

    out: Path
    adapter: Path | None
    steps: int
    total: int
    losses: list[float]
    perplexities: dict[int, float]
    tokens_per_s: float
    seconds: float
    memory: list[memory.MemoryRow]

    @property
    def finished(self) -> bool:
        return self.adapter is not None


class _Stopped(Exception):
    pass


def finetune(
    model: str | os.PathLike[str],
    text: str | os.PathLike[str],
    out: str | os.PathLike[str],
    settings: Settings | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    watcher: Watcher | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Result:
    """Train LoRA adapters on a quantized model (QLoRA, arXiv 2305.14314) to predict a text.

    `out` gets ``adapter`` (PEFT's format, for `octavo.load_adapter` and PEFT), ``losses.jsonl``, ``losses.png`` and
    ``finetune.json``, and until the end ``checkpoints``. A run that was stopped, or died, goes on with `resume` from
    its last checkpoint, and has the losses and the adapter of one that was not, to the bit, on the same machine with
    the same number of threads.

    Args:
        model: a transformers directory, a GGUF file, OWNER/NAME on the hub, or "smollm2"; not quantized.
        text: a file of plain text, UTF-8. Its end is held out, to judge by.
        out: a directory that does not exist or is empty; or with `resume`, of a run that is not finished.
        settings: see `Settings`.
        resume: go on with the run in `out`, if there is one.
        overwrite: `out` may hold a run, which is removed once this one has begun.
        watcher: is told how it goes.
        stop: asked after every step: True to write a checkpoint and return.

    Raises:
        ModelError: the model cannot be read, or is quantized already.
        ValueError: settings that cannot be, a text that is not UTF-8 or too short, a context longer than the model's
            positions; a run with another model, text or settings in `out`.
        OSError: a file or directory that cannot be read or written, too little space.
        NonFiniteError: a loss or gradient that is NaN or Inf. Checkpoints are kept.

    Example:
        >>> from octavo.finetune import Settings, finetune
        >>> result = finetune("smollm2", "novel.txt", "run", Settings(rank=16))  # doctest: +SKIP
        >>> result.adapter  # doctest: +SKIP
        PosixPath('run/adapter')
    """
    settings, watcher = settings or Settings(), watcher or Watcher()
    settings.check()
    need_matplotlib()
    device = settings.chosen_device()
    with open_run(out, resume, overwrite) as run:
        source = models.resolve(os.fspath(model))
        models.check_unquantized(source)
        watcher.stage("reading the text")
        data = Text(text, models.load_tokenizer(source), settings)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            trainer = _Trainer(os.fspath(model), source, data, settings, device, run, watcher)
            about = {"model_name": trainer.name, "text": os.fspath(text), **_versions(device)}
            run.check(trainer.mark, settings.binding_defaults())
            trainer.prepare(run.latest() if resume else None)
            run.begin(trainer.mark, about)
            return trainer.train(stop)


def _versions(device: torch.device) -> dict[str, Any]:
    return {"octavo": __version__, "machine": describe_machine(str(device))}


class _Trainer:
    def __init__(
        self,
        name: str,
        source: models.Source,
        data: Text,
        settings: Settings,
        device: torch.device,
        run: RunDirectory,
        watcher: Watcher,
    ) -> None:
        self.name, self.data, self.settings, self.device = name, data, settings, device
        self.run, self.watcher = run, watcher
        watcher.stage("reading the model")
        self.model = models.load_model(source, settings.compute_dtype)
        models.check_context(self.model, settings.context, source.path)
        rows = self.model.get_input_embeddings().weight.shape[0]
        if data.largest >= rows:
            raise ValueError(f"the tokenizer of {source.path} gives id {data.largest}, the model has {rows} embeddings")
        weights = [layer.weight for layer in linear_layers(self.model) if type(layer) is nn.Linear]
        largest = max((min(weight.shape) for weight in weights), default=0)
        if settings.rank > largest > 0:
            raise ValueError(f"rank {settings.rank} is more than a linear layer of this model can have: {largest}")
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.model.to(device)
        self.start: residual.Start = {}
        if settings.from_residual and run.last_step() is None:
            watcher.stage("measuring what quantization loses")
            torch.manual_seed(settings.seed)
            self.start = residual.reconstruct(self.model, data.train, settings)
        watcher.stage("preparing the model" if settings.base is None else f"quantizing to {settings.method}")
        _quantize(self.model, settings, data.tokenizer)
        self.mark = {"settings": settings.binding(), "model": _sha256(self.model), "data": data.sha256}
        self.history = History()
        self.peak: memory.Peak | None = None

    def prepare(self, checkpoint: Checkpoint | None) -> None:
        """Give the model its adapters, new or from a checkpoint, and make the optimizer."""
        settings, model = self.settings, self.model
        torch.manual_seed(settings.seed)  # here, so that all methods begin with the same adapters
        if checkpoint is None:
            add_lora(model, settings.rank, settings.alpha, settings.dropout, name=_NAME)
            residual.begin_with(model, self.start, _NAME)
            self.start = {}
        else:
            load_adapter(model, checkpoint.adapter, _NAME, trainable=True)
        if settings.gradient_checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = settings.make_optimizer(self.trained)
        self._check_space()
        if checkpoint is not None:
            self.optimizer.load_state_dict(checkpoint.training["optimizer"])
            torch.set_rng_state(checkpoint.training["rng"])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(checkpoint.training["cuda_rng"], self.device)
            self.history = checkpoint.history
            for problem in self.run.remove_damaged():
                self.watcher.note(f"{problem}: removed, going on from step {checkpoint.step}")
            if (threads := torch.get_num_threads()) != checkpoint.threads:
                self.watcher.note(f"{checkpoint.threads} threads before, {threads} now: losses may differ a little")

    def _check_space(self) -> None:
        """Now, not hours later: three checkpoints, as the oldest goes when the newest is there, and the adapter."""
        adapter = sum(parameter.nbytes for parameter in self.trained)
        states = sum(parameter.numel() for parameter in self.trained) * (2 if "8bit" in self.settings.optimizer else 8)
        wanted, free = 4 * adapter + 3 * states, shutil.disk_usage(self.run.path).free
        if wanted > free:
            raise OSError(
                f"{self.run.path} has {free} bytes free; three checkpoints and the adapter need about {wanted}"
            )

    # ---- the loop ----

    def train(self, stop: Callable[[], bool]) -> Result:
        total = self.data.total
        every = self.settings.eval_every or math.ceil(total / 4)
        self.run.rewrite_losses(self.history)
        self.watcher.begin(total, self.history)
        try:
            while True:
                step = len(self.history.steps)
                if (step % every == 0 or step == total) and step not in self.history.perplexities:
                    self._evaluate(step, stop)
                if step == total:
                    return self._finish()
                if stop():
                    raise _Stopped
                self._step(step, total)
                if (step + 1) % self.settings.save_every == 0 and step + 1 < total:
                    self._save()
        except _Stopped:
            self._save()
            self._draw()
            return self._result(None)

    def _step(self, step: int, total: int) -> None:
        begin = time.perf_counter()
        lr = self.settings.lr_of(step, total)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.peak is None:
            self.peak = memory.Peak(self.device)
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        windows = self.data.batches(step)
        loss = 0.0
        for batch in windows:
            ids = batch.to(self.device)
            part = self.model(input_ids=ids, labels=ids, use_cache=False).loss / len(windows)
            loss += float(part.detach())
            if not math.isfinite(loss):
                raise self._non_finite(f"the loss of step {step + 1} is {loss}")
            part.backward()
        norm = self._update(step)
        line = {"step": step + 1, "lr": lr, "loss": loss, "grad_norm": norm, "tokens": windows.numel()}
        line["seconds"] = round(time.perf_counter() - begin, 4)
        self.history.steps.append(line)
        self.run.append_loss(line)
        self.watcher.step(line)

    def _update(self, step: int) -> float:
        """The optimizer's step, with gradients scaled to max_grad_norm. Returns the norm they had."""
        if isinstance(self.optimizer, torch.optim.AdamW):
            gradients = [parameter.grad for parameter in self.trained if parameter.grad is not None]
            norm = nn.utils.get_total_norm(gradients)
            self._check_norm(step, float(norm))
            nn.utils.clip_grads_with_norm_(self.trained, self.settings.max_grad_norm, norm)
            self.optimizer.step()
            return float(norm)
        self.optimizer.step()
        found: Any = self.optimizer
        self._check_norm(step, float(found.grad_norm))  # octavo's leave parameters alone then
        return float(found.grad_norm)

    def _check_norm(self, step: int, norm: float) -> None:
        if not math.isfinite(norm):
            raise self._non_finite(f"the norm of the gradients of step {step + 1} is {norm}")

    def _non_finite(self, what: str) -> NonFiniteError:
        last = self.run.last_step()
        kept = "there is no checkpoint" if last is None else f"the checkpoint of step {last} is kept in {self.run.path}"
        settings = self.settings
        return NonFiniteError(
            f"{what}: stopped, with lr {settings.lr}, max_grad_norm {settings.max_grad_norm} and {settings.dtype}; "
            f"{kept}. Try a smaller lr{'' if settings.dtype == 'fp32' else ' or fp32'}, in another directory"
        )

    def _evaluate(self, step: int, stop: Callable[[], bool]) -> None:
        windows, count = self.data.held_out, 0

        def done(score: evaluate.Score) -> None:
            nonlocal count
            count += 1
            self.watcher.evaluating(count, len(windows))
            if count < len(windows) and stop():
                raise _Stopped

        self.model.eval()
        perplexity = evaluate.perplexity(self.model, windows, done).perplexity
        if not math.isfinite(perplexity):
            raise self._non_finite(f"the held-out perplexity after {step} steps is {perplexity}")
        self.history.perplexities[step] = perplexity
        self.run.append_loss({"step": step, "held_out_perplexity": perplexity})
        self.watcher.evaluated(step, perplexity)

    # ---- what is written ----

    def _save(self) -> None:
        training = {"optimizer": self.optimizer.state_dict(), "rng": torch.get_rng_state(), "cuda_rng": None}
        if self.device.type == "cuda":
            training["cuda_rng"] = torch.cuda.get_rng_state(self.device)
        path = self.run.save(self.history, training, lambda target: save_adapter(self.model, target, _NAME))
        self.watcher.saved(path)

    def _draw(self) -> None:
        losses = [line["loss"] for line in self.history.steps]
        title = f"{Path(self.name).name}: {self._method()}, rank {self.settings.rank}"
        perplexities = self.history.perplexities
        replace_file(self.run.path / CURVE, lambda path: curve.draw(path, title, losses, perplexities))

    def _finish(self) -> Result:
        self.model.eval()
        save_adapter(self.model, self.run.path / ADAPTER, _NAME, overwrite=(self.run.path / ADAPTER).exists())
        self._draw()
        result = self._result(self.run.path / ADAPTER)
        first, last = (self.history.perplexities[step] for step in (0, result.total))
        self.run.update_manifest(
            {
                "finished": True,
                "results": {
                    "steps": result.steps,
                    "perplexity_before": first,
                    "perplexity_after": last,
                    "train_windows": len(self.data.train),
                    "held_out_windows": len(self.data.held_out),
                    "tokens_per_s": result.tokens_per_s,
                    "seconds": result.seconds,
                    "memory": [{**asdict(row), "total": row.total} for row in result.memory],
                },
            }
        )
        self.run.remove_checkpoints()
        return result

    def _method(self) -> str:
        settings = self.settings
        described = {layer.describe() for layer in self.model.modules() if isinstance(layer, LowBitLinear)}
        if not described:
            return f"LoRA, {settings.dtype} base, {settings.optimizer}"
        return f"QLoRA, {', '.join(sorted(described)).replace('_', ' ')}, {settings.optimizer}"

    def _result(self, adapter: Path | None) -> Result:
        steps = self.history.steps
        seconds = sum(line["seconds"] for line in steps)
        row = memory.measure(self._method(), self.model, self.optimizer, self.peak.bytes() if self.peak else None)
        count = sum(parameter.numel() for parameter in self.trained)
        return Result(
            self.run.path,
            adapter,
            len(steps),
            self.data.total,
            [line["loss"] for line in steps],
            dict(self.history.perplexities),
            sum(line["tokens"] for line in steps) / seconds if seconds else math.nan,
            seconds,
            memory.memory_table(self.parameters, count, row),
        )


def _quantize(model: nn.Module, settings: Settings, tokenizer: Any) -> None:
    if settings.base is None:
        return
    method, given = settings.base
    if settings.calibration is not None and "tokenizer" in method.setting_names():
        given = {**given, "tokenizer": tokenizer}
    quantize_model(model, method.name, calibration=settings.calibration, progress=False, **given)


def _sha256(model: nn.Module) -> str:
    """A digest of all tensors of the base, as it is trained on: quantized, in its dtype."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            if tensor.numel():
                digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()

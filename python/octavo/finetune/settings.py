"""How to fine-tune: the settings, their checks, and the optimizer that they name."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import optim
from ..core.checks import cuda_built, is_number
from ..core.method import UNQUANTIZED, Method, find_method, is_unquantized, method_names, methods, unknown_method
from ..lora.linear import LoRAConfig

_OPTIMIZERS: dict[str, type[optim.AdamW8bit] | type[optim.Lion8bit] | None] = {
    "paged_adamw8bit": optim.PagedAdamW8bit,
    "paged_adamw": optim.PagedAdamW,  # the paper trained with this one: fp32 states
    "adamw8bit": optim.AdamW8bit,
    "adamw": None,  # torch's
    "paged_lion8bit": optim.PagedLion8bit,
    "lion8bit": optim.Lion8bit,
}
OPTIMIZERS = tuple(_OPTIMIZERS)
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# These settings may differ when a run goes on: where states live does not change the bits of a step.
_FREE = ("page_dir", "device_budget", "save_every")
MAX_STEPS = 10**9
_COUNTS = ("batch", "accumulate", "context", "eval_windows", "save_every")


@dataclass(frozen=True)
class Settings:
    """The recipe. Defaults are the paper's (appendix B), but for a rank of 16, batches of 4 and `init`.

    Attributes:
        method: of the base: "nf4" or "fp4" (4 bits), "int8", "spqr" and every other, or "16bit" (also "none"): LoRA
            without quantization.
        quantization: settings of the method. What is not given is what the method has for training: nf4 and fp4
            quantize the scales, too (``double_quant``), as in the paper.
        calibration: a text, for methods that need one.
        rank, alpha, dropout: of the adapters: see `octavo.add_lora`.
        init: what adapters begin with: "zero", as in the paper: they change nothing; on nf4 and fp4 also "residual":
            what quantization lost, as far as their rank goes, on inputs from the text (QERA, arXiv 2410.06040). Such
            adapters belong to the quantized base. None: "residual" where there is one.
        optimizer: one of `OPTIMIZERS`: with 8-bit states, or fp32 states where the name does not say 8bit; paged states
            may live on the host, or with page_dir in a file. "adamw" is torch's.
        page_dir, device_budget: of paged optimizers: see `octavo.optim.Optimizer8bit`.
        lr: after the warm-up it stays as it is.
        warmup: the share of the steps in which lr grows linearly from 0.
        weight_decay, max_grad_norm: the latter is the norm that gradients are scaled down to.
        batch, accumulate: a step sees batch * accumulate windows, batch of them at once.
        context: tokens of a window; windows do not overlap.
        epochs: how often to go through the text.
        steps: how many steps to take, in place of epochs.
        dtype: "bf16" or "fp32", of the base where it is not quantized and of all products. Adapters are fp32.
        gradient_checkpointing: keep only the inputs of the model's blocks, and compute the rest again.
        held_out: the share of the text, at its end, to judge by and not to train on.
        eval_every: steps between two perplexities of it; None: a quarter of all. There is one before and after always.
        eval_windows: how many windows of it, at most.
        save_every: steps between two checkpoints.
        seed: of the adapters, the order of windows and dropout.
        device: "cpu", "cuda", "cuda:1", ...; None: cuda where octavo is built for it and there is one.

    Example:
        >>> from octavo.finetune import Settings
        >>> Settings(rank=64).method
        'nf4'
    """

    method: str = "nf4"
    quantization: Mapping[str, Any] = field(default_factory=dict, hash=False)
    calibration: str | None = None
    rank: int = 16
    alpha: float = 16.0
    dropout: float = 0.05
    init: str | None = None
    optimizer: str = "paged_adamw8bit"
    page_dir: str | None = None
    device_budget: int | None = None
    lr: float = 2e-4
    warmup: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 0.3
    batch: int = 4
    accumulate: int = 1
    context: int = 512
    epochs: float = 1.0
    steps: int | None = None
    dtype: str = "bf16"
    gradient_checkpointing: bool = True
    held_out: float = 0.1
    eval_every: int | None = None
    eval_windows: int = 64
    save_every: int = 50
    seed: int = 0
    device: str | None = None

    def check(self) -> None:
        """Raises ValueError or, for page_dir, OSError unless they can be; the message has the value."""
        for name, known in (("optimizer", OPTIMIZERS), ("dtype", tuple(_DTYPES))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} is not one of {', '.join(known)}")
        if not isinstance(self.gradient_checkpointing, bool):
            raise ValueError(f"gradient_checkpointing must be True or False, got {self.gradient_checkpointing!r}")
        self._check_method()
        if self.init not in (None, "zero", "residual"):
            raise ValueError(f"init {self.init!r} is not one of residual, zero")
        if self.init == "residual" and not self.from_residual:
            names = ", ".join(n for name, m in methods().items() if m.residual for n in (name, *m.aliases))
            raise ValueError(f"init residual is of methods {names}, not of {self.method}")
        LoRAConfig(self.rank, self.alpha, self.dropout).check()
        for name in (*_COUNTS, "steps", "eval_every"):
            value = getattr(self, name)
            least = 2 if name == "context" else 1
            if value is None and name in ("steps", "eval_every"):
                continue
            if type(value) is not int or value < least:
                raise ValueError(f"{name} must be a whole number of {least} or more, got {value!r}")
        if self.steps is not None and self.steps > MAX_STEPS:
            raise ValueError(f"steps must be at most {MAX_STEPS}, got {self.steps}")
        for name in ("lr", "epochs", "max_grad_norm"):
            value = getattr(self, name)
            if not is_number(value) or not 0.0 < value <= sys.float_info.max:
                raise ValueError(f"{name} must be a positive number, got {value!r}")
        if not is_number(self.weight_decay) or not 0.0 <= self.weight_decay <= sys.float_info.max:
            raise ValueError(f"weight_decay must be 0 or positive, got {self.weight_decay!r}")
        if not is_number(self.warmup) or not 0.0 <= self.warmup <= 1.0:
            raise ValueError(f"warmup must lie in [0, 1], got {self.warmup!r}")
        if not is_number(self.held_out) or not 0.0 < self.held_out < 1.0:
            raise ValueError(f"held_out must lie in (0, 1), got {self.held_out!r}")
        if self.steps is not None and self.epochs != 1.0:
            raise ValueError(f"give epochs or steps, not both: got {self.epochs} and {self.steps}")
        if type(self.seed) is not int or not 0 <= self.seed < 1 << 63:
            raise ValueError(f"seed must be a whole number of 63 bits, got {self.seed!r}")
        if self.device is not None and not isinstance(self.device, str):
            raise ValueError(f"device must be cpu or cuda, got {self.device!r}")
        self.chosen_device()
        self.make_optimizer([torch.zeros(1, requires_grad=True)])  # checks what is the optimizer's, the page_dir too

    @property
    def compute_dtype(self) -> torch.dtype:
        return _DTYPES[self.dtype]

    @property
    def base(self) -> tuple[Method, dict[str, Any]] | None:
        """The method and the settings that the base is quantized with; None where it is not."""
        if is_unquantized(self.method):
            return None
        if not isinstance(self.quantization, Mapping):
            raise ValueError(f"quantization must be settings by name, got {self.quantization!r}")
        given = {name: value for name, value in self.quantization.items() if value is not None}
        method, given = find_method(self.method, given)
        return method, {**method.for_training, **given}

    @property
    def from_residual(self) -> bool:
        return self.base is not None and self.base[0].residual and self.init != "zero"

    def _check_method(self) -> None:
        try:
            base = self.base
        except ValueError:
            if not isinstance(self.method, str) or self.method not in method_names():
                raise ValueError(unknown_method(self.method, unquantized=True)) from None
            raise
        if base is None:
            idle = [*self.quantization, *(("calibration",) if self.calibration is not None else ())]
            if idle:
                raise ValueError(f"{', '.join(idle)}: for a quantized base, not for method {self.method}")
            return
        method, given = base
        method.check_calibration(method.settings(given), self.calibration)

    def chosen_device(self) -> torch.device:
        """ValueError unless it is there."""
        chosen = self.device
        if chosen is None:
            chosen = "cuda" if cuda_built() and torch.cuda.is_available() else "cpu"
        try:
            device = torch.device(chosen)
        except RuntimeError:
            device = torch.device("meta")
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"device must be cpu or cuda, got {self.device!r}")
        count = torch.cuda.device_count()
        if device.type == "cuda" and (device.index or 0) >= count:
            raise ValueError(f"device {self.device}: torch {torch.__version__} sees {count} CUDA devices")
        if device.type == "cuda" and not cuda_built():
            raise ValueError(f"device {self.device}: octavo was built without CUDA")
        return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device

    def make_optimizer(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        """Clips gradients itself, but for torch's."""
        paging: dict[str, Any] = {"page_dir": self.page_dir, "device_budget": self.device_budget}
        if not self.optimizer.startswith("paged_"):
            if given := [name for name, value in paging.items() if value is not None]:
                of = ", ".join(name for name in OPTIMIZERS if name.startswith("paged_"))
                raise ValueError(f"{given[0]} is of optimizers {of}, not of {self.optimizer}")
            paging = {}
        kind = _OPTIMIZERS[self.optimizer]
        if kind is None:
            return torch.optim.AdamW(parameters, lr=self.lr, weight_decay=self.weight_decay)
        options = {"weight_decay": self.weight_decay, "max_grad_norm": self.max_grad_norm, **paging}
        return kind(parameters, lr=self.lr, **options)

    def lr_of(self, step: int, total: int) -> float:
        """The learning rate of a step, counted from 0."""
        ramp = math.ceil(self.warmup * total)
        return self.lr * min(1.0, (step + 1) / ramp) if ramp else self.lr

    def to_dict(self) -> dict[str, Any]:
        """The settings by name."""
        return asdict(self)

    def binding(self) -> dict[str, Any]:
        """The settings that must be the same for a run to go on."""
        found = {name: value for name, value in asdict(self).items() if name not in _FREE}
        del found["quantization"], found["calibration"]
        if (base := self.base) is None:
            found["method"] = UNQUANTIZED[1]
        else:
            found |= _recorded(self.method, *base)
            if self.calibration is not None:
                found["calibration"] = self.calibration
        found["init"] = "residual" if self.from_residual else "zero"
        found["device"] = self.chosen_device().type
        return found

    def binding_defaults(self) -> dict[str, Any]:
        """What a run of an earlier octavo had for settings that it did not write down."""
        if (base := self.base) is None:
            return {}
        return _recorded(self.method, base[0], base[0].for_training)


def _recorded(name: str, method: Method, given: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of the base, without those that the method's name stands for."""
    settings, fixed = method.settings(given), method.aliases.get(name, {})
    return {key: _plain(getattr(settings, key)) for key in method.setting_names() if key not in fixed}


def _plain(value: Any) -> Any:
    """The value as a JSON file holds it."""
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)

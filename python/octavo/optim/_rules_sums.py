"""The optimizers whose steps depend on sums over whole tensors: arguments, and what their kernels' rule is set to."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from ._base import Optimizer8bit
from ._options import Options
from ._rules import Betas, SGD8bit


class StableAdamW(Optimizer8bit):
    """StableAdamW (arXiv 2304.13013, Algorithm 2): AdamW without the spikes of the loss that come where second moments
    lag behind the gradient. States are fp32, in the format of `torch.optim.AdamW`; in 8 bit: `StableAdamW8bit`.

    ``m = b1 * m + (1 - b1) * g`` and ``v = b2 * v + (1 - b2) * g**2``, where ``b = beta * (1 - beta**(t-1)) /
    (1 - beta**t)`` does what Adam's bias correction does; then, with a number for each parameter,
    ``rms = sqrt(mean(g**2 / max(v, eps**2)))`` and ``eta = lr / max(1, rms)``,
    ``p = p - eta * weight_decay * p - eta * m / (sqrt(v) + eps)``.

    While gradients are as large as they were, rms is about 1; it is at most ``1 / sqrt(1 - beta2)``. It replaces
    clipping of gradients. `rms` tells what it was.

    Sharded parameters (DTensor) take the mean over all their shards, by one all-reduce of two numbers per parameter.
    A state of AdamW loads with its moments as they are. Those of its first steps are smaller than this optimizer's by
    ``1 - beta**t``, with which AdamW divides later.

    Args:
        params, lr, betas, eps, weight_decay: of the formula. A beta2 of 0.99, below AdamW's 0.999, and this eps are
            those of the paper's code and of pytorch_optimizer; optimi has eps=1e-6.
        options: those of every optimizer, bits=32 being the default: see `Optimizer8bit`.

    Example:
        >>> import octavo, torch
        >>> weight = torch.nn.Parameter(torch.ones(64, 64))
        >>> optimizer = octavo.optim.StableAdamW([weight], lr=0.01)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> bool((weight < 1).all())
        True
    """

    _preset = Options(bits=32)
    _keeps_sums = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: Betas = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}, options)

    def _rule(self, group: dict[str, Any]) -> str:
        return "stable_adamw"

    def _hyper(self, group: dict[str, Any]) -> dict[str, float]:
        return {"beta1": group["betas"][0], "beta2": group["betas"][1], "decoupled": 1.0}

    def rms(self) -> list[Tensor | None]:
        """The last step's rms of each parameter, in the order of the groups: fp32 numbers on the parameters' devices,
        made without waiting for them; None where there was no gradient. It is 0 after a step that a GradScaler skipped.

        A parameter's rms rises above 1 some steps before the loss does: in the paper that of the patch embedding, 1 to
        8 steps. To log the largest: ``float(torch.stack([r for r in optimizer.rms() if r is not None]).max())``, now
        and then, as this waits for the device. Behind accelerate it is ``optimizer.optimizer.rms()``.
        """
        found: list[Tensor | None] = [None] * sum(len(group["params"]) for group in self.param_groups)
        for numbers, sums in self._sums:
            values = (sums[:, 0] / sums[:, 1].clamp(min=1)).sqrt().float().unbind()
            for number, value in zip(numbers, values, strict=True):
                found[number] = value
        return found

    def named_rms(self) -> dict[str, Tensor]:
        """`rms` of the parameters that had a gradient, by name where the optimizer was given named parameters, else by
        group and position: "0.3"."""
        names = [
            name
            for index, group in enumerate(self.param_groups)
            for name in group.get("param_names", [f"{index}.{i}" for i in range(len(group["params"]))])
        ]
        return {name: value for name, value in zip(names, self.rms(), strict=True) if value is not None}


class StableAdamW8bit(StableAdamW):
    """`StableAdamW` with 8-bit states: 2.03 bytes per element instead of 8.

    Example:
        >>> import octavo, torch
        >>> weight = torch.nn.Parameter(torch.ones(64, 64))
        >>> optimizer = octavo.optim.StableAdamW8bit([weight], lr=0.01)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> bool((weight < 1).all())
        True
    """

    _preset = Options(bits=8)


class LAMB8bit(Optimizer8bit):
    """LAMB (arXiv 1904.00962) with 8-bit states.

    ``u = m / (1 - beta1**t) / (sqrt(v / (1 - beta2**t)) + eps) + weight_decay * p`` and
    ``p = p - lr * (|p| / |u|) * u``, norms over the parameter; a ratio with a norm of 0 is 1.

    Args:
        params, lr, betas, eps, weight_decay: of the formula.
        bias_correction: whether moments are divided by ``1 - beta**t``.
        options: those of every optimizer: see `Optimizer8bit`.

    Example:
        >>> import octavo, torch
        >>> weight = torch.nn.Parameter(torch.ones(64, 64))
        >>> optimizer = octavo.optim.LAMB8bit([weight], lr=0.01)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> bool((weight < 1).all())
        True
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        bias_correction: bool = True,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
        }
        super().__init__(params, defaults, options)

    def _rule(self, group: dict[str, Any]) -> str:
        return "lamb"

    def _hyper(self, group: dict[str, Any]) -> dict[str, float]:
        beta1, beta2 = group["betas"]
        return {"beta1": beta1, "beta2": beta2, "bias_correction": group["bias_correction"]}


class LARS8bit(Optimizer8bit):
    """LARS (arXiv 1708.03888) with an 8-bit momentum buffer: SGD with momentum on gradients that are scaled per
    parameter.

    ``g = trust * (g + weight_decay * p)`` with
    ``trust = trust_coefficient * |p| / (|g| + weight_decay * |p| + eps)``, or 1 where a norm is 0.

    Args:
        params, lr, momentum, dampening, weight_decay, nesterov: as in `SGD8bit`.
        trust_coefficient, eps: of the formula.
        options: those of every optimizer: see `Optimizer8bit`.

    Example:
        >>> import octavo, torch
        >>> weight = torch.nn.Parameter(torch.ones(64, 64))
        >>> optimizer = octavo.optim.LARS8bit([weight], lr=0.1)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> bool((weight < 1).all())
        True
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        trust_coefficient: float = 1e-3,
        eps: float = 1e-8,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "trust_coefficient": trust_coefficient,
            "eps": eps,
        }
        super().__init__(params, defaults, options)

    _check_rule = SGD8bit._check_rule

    def _rule(self, group: dict[str, Any]) -> str:
        return "lars"

    def _hyper(self, group: dict[str, Any]) -> dict[str, float]:
        return {
            "beta1": group["momentum"],
            "dampening": group["dampening"],
            "nesterov": group["nesterov"],
            "trust_coefficient": group["trust_coefficient"],
        }

"""The optimizers: arguments, and what their kernels' rule is set to. Arithmetic: csrc/optim8/rules.h, in plain torch
`octavo.optim.reference`."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from ._base import Optimizer8bit
from ._options import Options

Betas = tuple[float | Tensor, float | Tensor]


class Adam8bit(Optimizer8bit):
    """`torch.optim.Adam` (arXiv 1412.6980) with 8-bit states: 2.03 bytes per element instead of 8.

    Args:
        params, lr, betas, eps, weight_decay, decoupled_weight_decay: as in torch; weight_decay is added to the gradient
            unless it is decoupled, as in `AdamW8bit`.
        amsgrad: only False.
        options: those of every optimizer: see `Optimizer8bit`.

    Example:
        >>> import octavo, torch
        >>> weight = torch.nn.Parameter(torch.ones(64, 64))
        >>> optimizer = octavo.optim.Adam8bit([weight], lr=0.01)
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
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        decoupled_weight_decay: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults, options)

    def _rule(self, group: dict[str, Any]) -> str:
        return "adam"

    def _hyper(self, group: dict[str, Any]) -> dict[str, float]:
        beta1, beta2 = group["betas"]
        decoupled = group["decoupled_weight_decay"]
        return {"beta1": beta1, "beta2": beta2, "bias_correction": 1.0, "decoupled": decoupled}


class AdamW8bit(Adam8bit):
    """`torch.optim.AdamW` (arXiv 1711.05101) with 8-bit states: `Adam8bit` with decoupled weight decay.

    Example:
        >>> import octavo, torch
        >>> weight = torch.nn.Parameter(torch.ones(64, 64))
        >>> optimizer = octavo.optim.AdamW8bit([weight], lr=0.01, weight_decay=0.1)
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
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, decoupled_weight_decay=True, **options)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # also after loading a state that knows no such option
            group["decoupled_weight_decay"] = True


class SGD8bit(Optimizer8bit):
    """`torch.optim.SGD` with an 8-bit momentum buffer.

    Args:
        params, lr, momentum, dampening, weight_decay, nesterov: as in torch.
        options: those of every optimizer: see `Optimizer8bit`.

    Example:
        >>> import octavo, torch
        >>> weight = torch.nn.Parameter(torch.ones(64, 64))
        >>> optimizer = octavo.optim.SGD8bit([weight], lr=0.1, momentum=0.9)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> bool((weight < 1).all())
        True
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
        }
        super().__init__(params, defaults, options)

    def _check_rule(self, group: dict[str, Any]) -> None:
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError(
                f"{type(self).__name__}: nesterov needs a momentum and no dampening, got momentum {group['momentum']} "
                f"and dampening {group['dampening']}"
            )

    def _rule(self, group: dict[str, Any]) -> str:
        return "momentum" if group["momentum"] != 0 else "sgd"

    def _hyper(self, group: dict[str, Any]) -> dict[str, float]:
        return {"beta1": group["momentum"], "dampening": group["dampening"], "nesterov": group["nesterov"]}


class RMSprop8bit(Optimizer8bit):
    """`torch.optim.RMSprop` with 8-bit states.

    Args:
        params, lr, alpha, eps, weight_decay, momentum: as in torch.
        centered: only False.
        options: those of every optimizer: see `Optimizer8bit`.

    Example:
        >>> import octavo, torch
        >>> weight = torch.nn.Parameter(torch.ones(64, 64))
        >>> optimizer = octavo.optim.RMSprop8bit([weight], lr=0.01)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> bool((weight < 1).all())
        True
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "alpha": alpha,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "centered": centered,
        }
        super().__init__(params, defaults, options)

    def _check_rule(self, group: dict[str, Any]) -> None:
        if not 0.0 <= group["alpha"] <= 1.0:
            raise ValueError(f"{type(self).__name__}: alpha must lie in [0, 1], got {group['alpha']!r}")
        if group["centered"]:
            raise ValueError(f"{type(self).__name__}: centered=True is not supported: no rule keeps the mean gradient")

    def _rule(self, group: dict[str, Any]) -> str:
        return "rmsprop_momentum" if group["momentum"] > 0 else "rmsprop"

    def _hyper(self, group: dict[str, Any]) -> dict[str, float]:
        return {"beta1": group["momentum"], "beta2": group["alpha"]}


class Adagrad8bit(Optimizer8bit):
    """`torch.optim.Adagrad` with an 8-bit state.

    Args:
        params, lr, lr_decay, weight_decay, initial_accumulator_value, eps: as in torch.
        options: those of every optimizer: see `Optimizer8bit`.

    Example:
        >>> import octavo, torch
        >>> weight = torch.nn.Parameter(torch.ones(64, 64))
        >>> optimizer = octavo.optim.Adagrad8bit([weight], lr=0.01)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> bool((weight < 1).all())
        True
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "lr_decay": lr_decay,
            "eps": eps,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
        }
        super().__init__(params, defaults, options)

    def _rule(self, group: dict[str, Any]) -> str:
        return "adagrad"

    def _hyper(self, group: dict[str, Any]) -> dict[str, float]:
        return {"lr_decay": group["lr_decay"]}

    def _initial(self, group: dict[str, Any]) -> float:
        return float(group["initial_accumulator_value"])


class Lion8bit(Optimizer8bit):
    """Lion (arXiv 2302.06675) with an 8-bit momentum: 1.02 bytes per element.

    ``p = p * (1 - lr * weight_decay) - lr * sign(beta1 * m + (1 - beta1) * g)``, then
    ``m = beta2 * m + (1 - beta2) * g``; the sign of 0 is 0.

    Args:
        params, lr, betas, weight_decay: of the formula; lr is best three to ten times smaller than for AdamW.
        options: those of every optimizer: see `Optimizer8bit`.

    Example:
        >>> import octavo, torch
        >>> weight = torch.nn.Parameter(torch.ones(64, 64))
        >>> optimizer = octavo.optim.Lion8bit([weight], lr=0.001)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> bool((weight < 1).all())
        True
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: Betas = (0.9, 0.99),
        weight_decay: float = 0.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay}, options)

    def _rule(self, group: dict[str, Any]) -> str:
        return "lion"

    def _hyper(self, group: dict[str, Any]) -> dict[str, float]:
        return {"beta1": group["betas"][0], "beta2": group["betas"][1], "decoupled": 1.0}


class AdEMAMix8bit(Optimizer8bit):
    """AdEMAMix (arXiv 2409.03137) with 8-bit states: AdamW with a second, slow moment.

    ``u = (m / (1 - beta1**t) + alpha * slow) / (sqrt(v / (1 - beta2**t)) + eps)`` with
    ``slow = beta3 * slow + (1 - beta3) * g``, and decoupled weight decay.

    Args:
        params, lr, betas (three), alpha, eps, weight_decay: of the formula.
        t_alpha: steps over which alpha rises from 0; None: at once.
        t_beta3: steps over which beta3 rises from beta1 as in section 3.1 of the paper; None: at once.
        options: those of every optimizer: see `Optimizer8bit`.

    Example:
        >>> import octavo, torch
        >>> weight = torch.nn.Parameter(torch.ones(64, 64))
        >>> optimizer = octavo.optim.AdEMAMix8bit([weight], lr=0.01)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> bool((weight < 1).all())
        True
    """

    _betas = 3

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor, float | Tensor] = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "alpha": alpha,
            "t_alpha": t_alpha,
            "t_beta3": t_beta3,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults, options)

    def _check_rule(self, group: dict[str, Any]) -> None:
        betas = group["betas"]
        if group["t_beta3"] and min(float(betas[0]), float(betas[2])) <= 0:
            raise ValueError(f"{type(self).__name__}: t_beta3 needs positive betas[0] and betas[2], got {betas!r}")

    def _rule(self, group: dict[str, Any]) -> str:
        return "ademamix"

    def _hyper(self, group: dict[str, Any]) -> dict[str, float]:
        beta1, beta2, beta3 = group["betas"]
        return {
            "beta1": beta1,
            "beta2": beta2,
            "beta3": beta3,
            "alpha": group["alpha"],
            "alpha_steps": group["t_alpha"] or 0,
            "beta3_steps": group["t_beta3"] or 0,
            "bias_correction": 1.0,
            "decoupled": 1.0,
        }

"""The arithmetic and the rules of `octavo.optim.reference`: each rule with its roundings, in fp32 in a stated order."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..blockwise.maps import fma

# ---- arithmetic ----------------------------------------------------------------------------------------------------


def _f32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float64).float())


def sqrt(x: Tensor) -> Tensor:
    return x.double().sqrt().float()  # rounded as once; torch's fp32 sqrt may be a unit off


def _whole_power(base: float, exponent: float) -> float:
    bits, result = int(exponent), 1.0
    while bits:
        if bits & 1:
            result *= base
        base *= base
        bits >>= 1
    return result


@dataclass
class Factors:
    """The numbers of one step of one tensor, each rounded once to fp32."""

    grad: float
    shrink: float
    l2: float
    size: float
    beta1: float
    rest1: float
    beta2: float
    rest2: float
    beta3: float
    rest3: float
    root_scale: float = 1.0
    eps: float = 0.0
    a: float = 0.0
    b: float = 0.0
    trust: float = 1.0


def _ademamix_beta3(h: dict[str, float], t: float) -> float:
    """beta3's schedule of arXiv 2409.03137 (section 3.1)."""
    part = t / h["beta3_steps"] if h["beta3_steps"] > 0 and t < h["beta3_steps"] else 1.0
    if part >= 1:
        return h["beta3"]
    log1, log3 = math.log(h["beta1"]), math.log(h["beta3"])
    return min(math.exp(log1 * log3 / ((1 - part) * log3 + part * log1)), h["beta3"])


def _debiased(beta: float, t: float) -> float:
    """Adam's bias correction as a coefficient."""
    if t <= 1:
        return 0.0
    before = _whole_power(beta, t - 1)
    return beta * (1 - before) / (1 - beta * before)


def factors_of(
    rule: str, h: dict[str, float], lr: float, t: float, grad: float, sums: tuple[float, float] | None
) -> Factors:
    """sums: of the tensor, once they are known."""
    beta3 = _ademamix_beta3(h, t) if rule == "ademamix" else h["beta3"]
    decoupled, corrected = h["decoupled"] != 0, h["bias_correction"] != 0
    f = Factors(
        grad=grad,
        shrink=_f32(1 - lr * h["weight_decay"]) if decoupled else 1.0,
        l2=0.0 if decoupled or rule in ("lamb", "stable_adamw") else _f32(h["weight_decay"]),
        size=lr,
        beta1=_f32(h["beta1"]),
        rest1=_f32(1 - h["beta1"]),
        beta2=_f32(h["beta2"]),
        rest2=_f32(1 - h["beta2"]),
        beta3=_f32(beta3),
        rest3=_f32(1 - beta3),
        eps=_f32(h["eps"]),
    )
    correction1 = 1 - _whole_power(h["beta1"], t) if corrected else 1.0
    correction2 = 1 - _whole_power(h["beta2"], t) if corrected else 1.0
    if rule in ("adam", "ademamix", "lamb"):
        f.root_scale = _f32(1 / math.sqrt(correction2))
    if rule == "adam":
        f.size = lr / correction1
    elif rule == "adagrad":
        f.size = lr / (1 + (t - 1) * h["lr_decay"])
    elif rule == "ademamix":
        part = t / h["alpha_steps"] if h["alpha_steps"] > 0 and t < h["alpha_steps"] else 1.0
        f.a, f.b = _f32(1 / correction1), _f32(h["alpha"] * part)
    elif rule == "lamb":
        f.a, f.b = _f32(1 / correction1), _f32(h["weight_decay"])
        if sums and min(sums) > 0:
            f.size = lr * (math.sqrt(sums[0]) / math.sqrt(sums[1]))
    elif rule == "stable_adamw":
        beta1, beta2 = _debiased(h["beta1"], t), _debiased(h["beta2"], t)
        f.beta2, f.rest1, f.rest2 = _f32(beta2), _f32(1 - beta1), _f32(1 - beta2)
        f.a = _f32(h["eps"] * h["eps"])
        if sums and sums[0] > sums[1]:
            f.size = lr / math.sqrt(sums[0] / sums[1])
        f.shrink = _f32(1 - f.size * h["weight_decay"])
    elif rule in ("momentum", "lars"):
        if t <= 1:  # torch starts the buffer with the gradient itself
            f.beta1, f.rest1 = 0.0, 1.0
        else:
            f.rest1 = _f32(1 - h["dampening"])
        f.a, f.b = (_f32(h["beta1"]), 1.0) if h["nesterov"] != 0 else (1.0, 0.0)
        if rule == "lars" and sums and min(sums) > 0:
            of_p, of_g = math.sqrt(sums[0]), math.sqrt(sums[1])
            f.trust = _f32(h["trust_coefficient"] * of_p / (of_g + h["weight_decay"] * of_p + h["eps"]))
    f.size = _f32(f.size)
    return f


# ---- rules: the direction of the step, and the states after it ------------------------------------------------------

_Direction = Callable[[Factors, Tensor, Tensor, list[Tensor], Tensor], tuple[Tensor, list[Tensor], Tensor]]


def _second(f: Factors, g: Tensor, v: Tensor) -> Tensor:
    return fma(g * g, f.rest2, f.beta2 * v)


def _denominator(f: Factors, v: Tensor) -> Tensor:
    return fma(sqrt(v), f.root_scale, torch.full_like(v, f.eps))


def _toward(rest: float, g: Tensor, m: Tensor) -> Tensor:
    return fma(rest, g - m, m)


def _sgd(f: Factors, p: Tensor, g: Tensor, m: list[Tensor], v: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
    return fma(f.l2, p, g), [], v


def _momentum(f: Factors, p: Tensor, g: Tensor, m: list[Tensor], v: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
    g = fma(f.l2, p, g)
    buffer = fma(f.beta1, m[0], f.rest1 * g)
    return fma(f.a, buffer, f.b * g), [buffer], v


def _lars(f: Factors, p: Tensor, g: Tensor, m: list[Tensor], v: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
    g = f.trust * fma(f.l2, p, g)
    buffer = fma(f.beta1, m[0], f.rest1 * g)
    return fma(f.a, buffer, f.b * g), [buffer], v


def _adam(f: Factors, p: Tensor, g: Tensor, m: list[Tensor], v: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
    g = fma(f.l2, p, g)
    moment, v = _toward(f.rest1, g, m[0]), _second(f, g, v)
    return moment / _denominator(f, v), [moment], v


def _rmsprop(f: Factors, p: Tensor, g: Tensor, m: list[Tensor], v: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
    g = fma(f.l2, p, g)
    v = _second(f, g, v)
    return g / (sqrt(v) + f.eps), [], v


def _rmsprop_momentum(
    f: Factors, p: Tensor, g: Tensor, m: list[Tensor], v: Tensor
) -> tuple[Tensor, list[Tensor], Tensor]:
    u, _, v = _rmsprop(f, p, g, m, v)
    buffer = fma(f.beta1, m[0], u)
    return buffer, [buffer], v


def _adagrad(f: Factors, p: Tensor, g: Tensor, m: list[Tensor], v: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
    g = fma(f.l2, p, g)
    v = fma(g, g, v)
    return g / (sqrt(v) + f.eps), [], v


def _lion(f: Factors, p: Tensor, g: Tensor, m: list[Tensor], v: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
    g = fma(f.l2, p, g)
    u = fma(f.rest1, g, f.beta1 * m[0])
    return u.sign().nan_to_num(nan=0.0), [fma(f.rest2, g, f.beta2 * m[0])], v


def _ademamix(f: Factors, p: Tensor, g: Tensor, m: list[Tensor], v: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
    g = fma(f.l2, p, g)
    fast, slow, v = _toward(f.rest1, g, m[0]), _toward(f.rest3, g, m[1]), _second(f, g, v)
    return fma(f.b, slow, f.a * fast) / _denominator(f, v), [fast, slow], v


def _lamb(f: Factors, p: Tensor, g: Tensor, m: list[Tensor], v: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
    moment, v = _toward(f.rest1, g, m[0]), _second(f, g, v)
    return fma(f.b, p, f.a * moment / _denominator(f, v)), [moment], v


def _stable_adamw(f: Factors, p: Tensor, g: Tensor, m: list[Tensor], v: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
    moment, v = _toward(f.rest1, g, m[0]), _second(f, g, v)
    return moment / (sqrt(v) + f.eps), [moment], v


RULES: dict[str, _Direction] = {
    "sgd": _sgd,
    "momentum": _momentum,
    "adam": _adam,
    "rmsprop": _rmsprop,
    "rmsprop_momentum": _rmsprop_momentum,
    "adagrad": _adagrad,
    "lion": _lion,
    "ademamix": _ademamix,
    "lamb": _lamb,
    "lars": _lars,
    "stable_adamw": _stable_adamw,
}

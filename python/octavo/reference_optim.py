"""The optimizers' operators in plain PyTorch, as `octavo.reference` has them: what `optim_table` holds, and one step of
each rule with its roundings.

The arithmetic is fp32 in a stated order with fused multiply-adds, exactly; states are coded as in
`octavo.reference_states`. Only sums over whole tensors are in another order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from .reference_states import dither, dither_key, fma, state_code, state_code_dithered, state_value

_BLOCK, _CHUNK_BLOCKS, _WORDS = 256, 32, 18
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
HYPER = (
    *("lr", "weight_decay", "eps", "beta1", "beta2", "beta3", "dampening", "alpha", "alpha_steps", "beta3_steps"),
    *("lr_decay", "trust_coefficient", "decoupled", "nesterov", "bias_correction"),
)
# Rule -> moments, whether it has a second moment, which is the last state.
STATES = {
    "sgd": (0, False),
    "momentum": (1, False),
    "adam": (1, True),
    "rmsprop": (0, True),
    "rmsprop_momentum": (1, True),
    "adagrad": (0, True),
    "lion": (1, False),
    "ademamix": (2, True),
    "lamb": (1, True),
    "lars": (1, False),
    "stable_adamw": (1, True),
}
# What a rule has to know of whole tensors; csrc/optim8/optim8.h.
SUMS = {"lamb": "norms", "lars": "norms", "stable_adamw": "ratio"}


def _order(params: list[Tensor]) -> list[int]:
    """Tensors in the order of the table: fp32 parameters, then those in 16 bit."""
    return sorted(range(len(params)), key=lambda i: params[i].dtype is not torch.float32)


def _row(param: Tensor, absmax: Tensor | None) -> int:
    """Elements of a row, which blocks do not cross."""
    in_rows = absmax is not None and absmax.dim() == 2 and absmax.shape[0] > 0
    return param.numel() // absmax.shape[0] if absmax is not None and in_rows else param.numel()


def optim_table(
    params: list[Tensor],
    grads: list[Tensor],
    steps: list[Tensor],
    states: list[Tensor],
    absmax: list[Tensor],
    compensation: list[Tensor],
    ids: list[int],
) -> Tensor:
    each = len(states) // max(len(params), 1)
    words: list[int] = []
    chunks: list[int] = []
    first_block = 0
    for position, i in enumerate(_order(params)):
        param, own, scales = params[i], states[i * each : (i + 1) * each], absmax[i * each : (i + 1) * each]
        quantized = bool(own) and own[0].dtype is torch.uint8
        row = _row(param, scales[0] if quantized else None)
        row_blocks = (row + _BLOCK - 1) // _BLOCK
        blocks = param.numel() // row * row_blocks if param.numel() else 0
        kept = compensation[i].data_ptr() if compensation and compensation[i].numel() else 0
        words += [param.data_ptr(), grads[i].data_ptr()]
        words += [*(state.data_ptr() for state in own), *([0] * (3 - each))]
        words += [*(scale.data_ptr() if quantized else 0 for scale in scales), *([0] * (3 - each))]
        words += [kept, steps[i].data_ptr(), param.numel(), row, row_blocks, first_block, len(chunks)]
        words += [_DTYPES[param.dtype] | _DTYPES[grads[i].dtype] << 32, int(quantized) | (ids[i] & 0xFFFFFFFF) << 32]
        words.append(i)
        chunks += [position] * ((blocks + _CHUNK_BLOCKS - 1) // _CHUNK_BLOCKS)
        first_block += blocks
    pairs = torch.tensor(chunks + [0] * (len(chunks) % 2), dtype=torch.int32).view(torch.int64)
    signed = [word - (1 << 64) if word >= 1 << 63 else word for word in words]
    return torch.cat([torch.tensor(signed, dtype=torch.int64), pairs])


def _ids(table: Tensor, params: list[Tensor]) -> list[int]:
    """The parameters' ids, which only the table has: the high half of their last word but one."""
    ids = [0] * len(params)
    for position, i in enumerate(_order(params)):
        ids[i] = int(table[position * _WORDS + _WORDS - 2]) >> 32 & 0xFFFFFFFF
    return ids


# ---- arithmetic ----------------------------------------------------------------------------------------------------


def _f32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float64).float())


def _sqrt(x: Tensor) -> Tensor:
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
    return fma(_sqrt(v), f.root_scale, torch.full_like(v, f.eps))


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
    return g / (_sqrt(v) + f.eps), [], v


def _rmsprop_momentum(
    f: Factors, p: Tensor, g: Tensor, m: list[Tensor], v: Tensor
) -> tuple[Tensor, list[Tensor], Tensor]:
    u, _, v = _rmsprop(f, p, g, m, v)
    buffer = fma(f.beta1, m[0], u)
    return buffer, [buffer], v


def _adagrad(f: Factors, p: Tensor, g: Tensor, m: list[Tensor], v: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
    g = fma(f.l2, p, g)
    v = fma(g, g, v)
    return g / (_sqrt(v) + f.eps), [], v


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
    return moment / (_sqrt(v) + f.eps), [moment], v


_RULES: dict[str, _Direction] = {
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


# ---- states and parameters -----------------------------------------------------------------------------------------


def _blocks_of(x: Tensor, row: int) -> Tensor:
    """[blocks, 256] of a flat x, rows of it padded with zeros."""
    return torch.nn.functional.pad(x.view(-1, row), (0, -row % _BLOCK)).reshape(-1, _BLOCK)


def _from_blocks(blocks: Tensor, row: int) -> Tensor:
    return blocks.reshape(-1, row + -row % _BLOCK)[:, :row].reshape(-1)


def _decode(codes: Tensor, absmax: Tensor, row: int, signed: bool) -> Tensor:
    blocks = state_value(_blocks_of(codes.flatten(), row), signed)
    return _from_blocks(blocks * absmax.reshape(-1, 1), row)


def _encode(x: Tensor, row: int, signed: bool, at_least: Tensor, key: int | None) -> tuple[Tensor, Tensor]:
    """Codes and absmax; key: of the dither, None for the nearest codes."""
    blocks = _blocks_of(x, row)
    # The map reaches from -0.99297 to 1.
    reach = torch.maximum(blocks, blocks * (torch.tensor(-1.0) / torch.tensor(0.992968738079071))) if signed else blocks
    absmax = torch.maximum(reach.amax(1), at_least.flatten())
    absmax = torch.where(absmax < 2.0**-126, 0.0, absmax.clamp(max=torch.finfo(torch.float32).max))
    inverse = torch.where(absmax == 0, 0.0, torch.div(torch.tensor(1.0, device=x.device), absmax))
    scaled = blocks * inverse[:, None]
    if key is None:
        return _from_blocks(state_code(scaled, signed), row), absmax
    draw = dither(key, _blocks_of(torch.arange(x.numel(), device=x.device), row))
    return _from_blocks(state_code_dithered(scaled, signed, draw), row), absmax


_Bits = TypeVar("_Bits", Tensor, int)


def mix_bits(x: _Bits) -> _Bits:
    """32 bits of the hash that makes random numbers, in int64."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D & 0xFFFFFFFF
    x = x ^ (x >> 15)
    x = x * 0x846CA68B & 0xFFFFFFFF
    return x ^ (x >> 16)


def _round_at_random(x: Tensor, row: int, seed: int, number: int, t: float) -> Tensor:
    seed &= (1 << 64) - 1
    key = mix_bits((seed & 0xFFFFFFFF) + 0x9E3779B9 & 0xFFFFFFFF)
    for word in (seed >> 32, number, int(t) & 0xFFFFFFFF):
        key = mix_bits(key ^ word)
    index = torch.arange(x.numel(), device=x.device)
    within = index % row % _BLOCK  # the block's first element enters apart, for more than 2^32
    first = index - within
    high = first >> 32
    random = mix_bits((mix_bits(high ^ key) + first + within) & 0xFFFFFFFF)
    bits = x.view(torch.int32).long() & 0xFFFFFFFF
    bits = bits + torch.where(x.isfinite(), random & 0xFFFF, 0)
    return (bits >> 16 << 48 >> 48).to(torch.int16).view(torch.bfloat16)


def _direction(rule: str, f: Factors, p: Tensor, g: Tensor, old: list[Tensor]) -> tuple[Tensor, list[Tensor], Tensor]:
    """The direction, the states after the step, and where the step is valid: where they are finite."""
    moments, second = STATES[rule]
    u, new, v = _RULES[rule](f, p, f.grad * g, old[:moments], old[-1] if second else p)
    new = [*new, v] if second else new
    finite = (new[-1] if new else u).isfinite()
    return u, new, finite & new[1].isfinite() if moments == 2 else finite


def _grad_factor(maximize: bool, grad_factor: Tensor | None, grad_scale: Tensor | None) -> float:
    factor = torch.tensor(-1.0 if maximize else 1.0)
    if grad_factor is not None:
        factor = factor * grad_factor.cpu().reshape(())
    if grad_scale is not None:
        factor = factor / grad_scale.cpu().reshape(())
    return float(factor)


@dataclass
class _Before:
    """One tensor before a step, flat, in fp32."""

    row: int
    p: Tensor  # with what Kahan's compensation keeps
    g: Tensor
    kept: list[Tensor]  # the states: of a second moment in 8 bits the root
    old: list[Tensor]  # as the rule takes them

    @classmethod
    def of(
        cls,
        rule: str,
        param: Tensor,
        grad: Tensor,
        states: list[Tensor],
        absmax: list[Tensor],
        compensation: Tensor | None,
    ) -> _Before:
        moments, second = STATES[rule]
        quantized = bool(states) and states[0].dtype is torch.uint8
        row = _row(param, absmax[0] if quantized else None)
        p, g = param.float().flatten(), grad.float().flatten()
        if compensation is not None:
            p = p + compensation.float().flatten()
        kept = [
            _decode(state, scale, row, not (second and s == moments)) if quantized else state.flatten()
            for s, (state, scale) in enumerate(zip(states, absmax, strict=True))
        ]
        return cls(row, p, g, kept, [*kept[:-1], kept[-1] * kept[-1]] if quantized and second else kept)


def _sums(rule: str, f: Factors, before: _Before) -> tuple[float, float]:
    u, new, valid = _direction(rule, f, before.p, before.g, before.old)
    g = before.g * f.grad
    if SUMS[rule] == "ratio":
        ratio = g * g / new[-1].clamp(min=f.a)
        return float(ratio[valid & ratio.isfinite()].double().sum()), float(g.numel())
    other = u if rule == "lamb" else g
    valid = other.isfinite()
    return float(before.p[valid].double().square().sum()), float(other[valid].double().square().sum())


def optim_sums(
    params: list[Tensor],
    grads: list[Tensor],
    steps: list[Tensor],
    states: list[Tensor],
    absmax: list[Tensor],
    compensation: list[Tensor],
    table: Tensor,
    rule: str,
    hyper: list[float],
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    grad_factor: Tensor | None = None,
    maximize: bool = False,
) -> Tensor:
    sums = torch.zeros((len(params), 2), dtype=torch.float64)
    device = params[0].device if params else sums.device
    if found_inf is not None and float(found_inf) != 0:
        return sums.to(device)
    h, each = dict(zip(HYPER, hyper, strict=True)), sum(STATES[rule])
    factor = _grad_factor(maximize, grad_factor, grad_scale)
    for i, param in enumerate(params):
        if param.numel() == 0:
            continue
        own, scales = states[i * each : (i + 1) * each], absmax[i * each : (i + 1) * each]
        kept = compensation[i] if compensation and compensation[i].numel() else None
        f = factors_of(rule, h, h["lr"], float(steps[i]), factor, None)
        sums[i, 0], sums[i, 1] = _sums(rule, f, _Before.of(rule, param, grads[i], own, scales, kept))
    return sums.to(device)


def optim_step(
    params: list[Tensor],
    grads: list[Tensor],
    steps: list[Tensor],
    states: list[Tensor],
    absmax: list[Tensor],
    compensation: list[Tensor],
    nonfinite: Tensor,
    table: Tensor,
    rule: str,
    hyper: list[float],
    lr: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    grad_factor: Tensor | None = None,
    maximize: bool = False,
    stochastic: bool = False,
    seed: int = 0,
    sums: Tensor | None = None,
) -> None:
    if found_inf is not None and float(found_inf) != 0:
        return
    h = dict(zip(HYPER, hyper, strict=True))
    rate = h["lr"] if lr is None else float(lr)
    factor = _grad_factor(maximize, grad_factor, grad_scale)
    moments, second = STATES[rule]
    each = moments + second
    if sums is None and rule in SUMS:
        lists = (params, grads, steps, states, absmax, compensation)
        sums = optim_sums(*lists, table, rule, hyper, grad_scale, found_inf, grad_factor, maximize)
    for i, number in enumerate(_ids(table, params)):
        param, own, scales = params[i], states[i * each : (i + 1) * each], absmax[i * each : (i + 1) * each]
        if param.numel() == 0:
            continue
        kept = compensation[i] if compensation and compensation[i].numel() else None
        quantized = bool(own) and own[0].dtype is torch.uint8
        t, before = float(steps[i]), _Before.of(rule, param, grads[i], own, scales, kept)
        row = before.row
        f = factors_of(rule, h, rate, t, factor, None if sums is None else (float(sums[i, 0]), float(sums[i, 1])))
        shrunk = before.p * f.shrink
        u, new, valid = _direction(rule, f, shrunk, before.g, before.old)
        p = torch.where(valid, fma(-f.size, u, shrunk), before.p)
        nonfinite += int((~valid).sum())
        for s, (state, scale, value, old) in enumerate(zip(own, scales, new, before.kept, strict=True)):
            root = second and s == moments
            value = torch.where(valid, _sqrt(value) if root and quantized else value, old)
            if quantized:
                # What is left alone keeps its code under the same absmax.
                left = (_blocks_of(valid.float().neg() + 1, row) > 0).any(1)
                key = dither_key(number, t, s) if root or s == 1 else None  # s == 1: AdEMAMix's slow moment
                value, most = _encode(value, row, not root, torch.where(left, scale.flatten(), 0.0), key)
                scale.copy_(most.view_as(scale))
            state.copy_(value.view_as(state))
        if param.dtype is torch.bfloat16 and stochastic:
            param.copy_(_round_at_random(p, row, seed, number, t).view_as(param))
            continue
        param.copy_(p.view_as(param))
        if kept is not None:
            kept.copy_((p - param.float().flatten()).view_as(kept))

"""The optimizers' operators in plain PyTorch, as `octavo.reference` has them: what `optim_table` holds, and one step of
each rule with its roundings.

The arithmetic is fp32 in a stated order with fused multiply-adds, exactly; states are coded as in
`octavo.blockwise.maps`. Only sums over whole tensors are in another order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..blockwise.maps import dither, dither_key, fma, state_code, state_value
from ..core.hashing import mix_bits
from .reference_rules import RULES, Factors, factors_of, sqrt

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
# The sums over whole tensors that a rule needs: see csrc/optim8/optim8.h.
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
    made = torch.cat([_int64(words), pairs])
    mark = _mark([word if i % _WORDS != _WORDS - 2 else word & 0xFFFFFFFF for i, word in enumerate(words)] + chunks)
    return torch.cat([made, _int64([mark])])


def _int64(words: list[int]) -> Tensor:
    return torch.tensor([word - (1 << 64) if word >= 1 << 63 else word for word in words], dtype=torch.int64)


def _mark(words: list[int]) -> int:
    """What a table was made of, but for the ids, in one word: the finalizer of splitmix64, word after word."""
    mark, mask = 0x6F637461766F3038, (1 << 64) - 1
    for word in words:
        mark = ((mark ^ (word & mask)) + 0x9E3779B97F4A7C15) & mask
        mark = (mark ^ mark >> 30) * 0xBF58476D1CE4E5B9 & mask
        mark = (mark ^ mark >> 27) * 0x94D049BB133111EB & mask
        mark ^= mark >> 31
    return mark


def _ids(table: Tensor, params: list[Tensor]) -> list[int]:
    """The parameters' ids, which only the table has: the high half of their last word but one."""
    ids = [0] * len(params)
    for position, i in enumerate(_order(params)):
        ids[i] = int(table[position * _WORDS + _WORDS - 2]) >> 32 & 0xFFFFFFFF
    return ids


# ---- states and parameters -----------------------------------------------------------------------------------------


def _blocks_of(x: Tensor, row: int) -> Tensor:
    """[blocks, 256] of a flat x, rows of it padded with zeros."""
    return torch.nn.functional.pad(x.view(-1, row), (0, -row % _BLOCK)).reshape(-1, _BLOCK)


def _from_blocks(blocks: Tensor, row: int) -> Tensor:
    return blocks.reshape(-1, row + -row % _BLOCK)[:, :row].reshape(-1)


def _decode(codes: Tensor, absmax: Tensor, row: int, signed: bool) -> Tensor:
    blocks = state_value(_blocks_of(codes.flatten(), row), signed)
    return _from_blocks(blocks * absmax.reshape(-1, 1), row)


def _encode(x: Tensor, row: int, signed: bool, at_least: Tensor, key: int) -> tuple[Tensor, Tensor]:
    """Codes and absmax; key: of the dither."""
    blocks = _blocks_of(x, row)
    # The map reaches from -0.99297 to 1.
    reach = torch.maximum(blocks, blocks * (torch.tensor(-1.0) / torch.tensor(0.992968738079071))) if signed else blocks
    absmax = torch.maximum(reach.amax(1), at_least.flatten())
    absmax = torch.where(absmax < 2.0**-126, 0.0, absmax.clamp(max=torch.finfo(torch.float32).max))
    inverse = torch.where(absmax == 0, 0.0, torch.div(torch.tensor(1.0, device=x.device), absmax))
    scaled = blocks * inverse[:, None]
    draw = dither(key, _blocks_of(torch.arange(x.numel(), device=x.device), row))
    return _from_blocks(state_code(scaled, signed, draw), row), absmax


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
    """The direction, the states after the step, and where the step is valid: where all are finite."""
    moments, second = STATES[rule]
    u, new, v = RULES[rule](f, p, f.grad * g, old[:moments], old[-1] if second else p)
    new = [*new, v] if second else new
    finite = u.isfinite() & (new[-1] if new else u).isfinite()
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
    old: list[Tensor]  # the old states, as the rule takes them

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
            value = torch.where(valid, sqrt(value) if root and quantized else value, old)
            if quantized:
                # An element that is left alone keeps its code under the same absmax.
                left = (_blocks_of(valid.float().neg() + 1, row) > 0).any(1)
                at_least = torch.where(left, scale.flatten(), 0.0)
                value, most = _encode(value, row, not root, at_least, dither_key(number, t, s))
                scale.copy_(most.view_as(scale))
            state.copy_(value.view_as(state))
        if param.dtype is torch.bfloat16 and stochastic:
            param.copy_(_round_at_random(p, row, seed, number, t).view_as(param))
            continue
        param.copy_(p.view_as(param))
        if kept is not None:
            kept.copy_((p - param.float().flatten()).view_as(kept))

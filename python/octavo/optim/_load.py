"""Reading states: octavo's own, torch.optim's and bitsandbytes'. Nothing here changes an optimizer."""

from __future__ import annotations

import math
from collections import defaultdict
from copy import deepcopy
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..blockwise.ops import dequantize_blockwise
from . import _state
from ._paging import Paging, aligned
from ._state import RULES, Make, Names, State

_NESTED = "__bnb_optimizer_quant_state__"


def merge_groups(optimizer: Any, saved: list[dict[str, Any]], version: int) -> list[dict[str, Any]]:
    """The optimizer's groups with the saved options; what the file does not name stays."""
    name, groups = type(optimizer).__name__, optimizer.param_groups
    if len(groups) != len(saved):
        raise ValueError(f"{name}: the loaded state has {len(saved)} parameter groups, the optimizer {len(groups)}")
    merged = []
    for index, (group, new) in enumerate(zip(groups, saved, strict=True)):
        if len(group["params"]) != len(new["params"]):
            raise ValueError(
                f"{name}: parameter group {index} of the loaded state has {len(new['params'])} parameters, that of the "
                f"optimizer {len(group['params'])}"
            )
        if (found := new.get("format_version", version)) > version:
            raise ValueError(
                f"{name}: the loaded state has format_version {found}, this octavo reads up to {version}: load it with "
                "the octavo that wrote it, or a newer one"
            )
        own = {key: value for key, value in group.items() if key not in new}
        options = deepcopy({key: value for key, value in new.items() if key != "params"})
        merged.append({**options, **own, "params": group["params"], "format_version": version})
    return merged


def convert(
    optimizer: Any, state_dict: dict[str, Any], groups: list[dict[str, Any]], paging: Paging | None
) -> defaultdict[Tensor, Any]:
    """The state for every parameter, in new tensors, in new pages where it is paged; what belongs to no parameter is
    passed on."""
    params = [(group, position) for group in groups for position in range(len(group["params"]))]
    ids = list(chain.from_iterable(group["params"] for group in state_dict["param_groups"]))
    state: defaultdict[Tensor, Any] = defaultdict(dict)
    known = set(ids)
    for key, value in state_dict["state"].items():
        if key not in known:
            state[key] = value
    pairs = [(saved, *place) for saved, place in zip(ids, params, strict=True)]
    if paging is not None:  # the places first, then state after state, as all may not fit in memory
        paging.reserve(
            [
                (group["params"][position], _bytes_of(entry, group["params"][position], group, optimizer._rule(group)))
                for saved, group, position in pairs
                if (entry := state_dict["state"].get(saved))
            ]
        )
    for number, (saved, group, position) in enumerate(pairs):
        entry = state_dict["state"].get(saved)
        if not entry:
            continue
        param, where = group["params"][position], optimizer._named(group, position, number)
        optimizer._check_param(group, param, where)
        names = RULES[optimizer._rule(group)]
        make = _state.beside(param) if paging is None else paging.maker(param)
        state[param] = _convert_entry(dict(entry), param, group, names, where, make)
    return state


def _bytes_of(entry: State, param: Tensor, group: dict[str, Any], rule: str) -> int:
    """The most bytes that a converted entry takes."""
    names = RULES[rule]
    size = _state.bytes_of(param, names, _state.wants_8bit(group, param), "compensation" in entry, aligned)
    found = [entry[key] for key in names.absmax if isinstance(entry.get(key), Tensor)]
    if size and any(absmax.dim() == 2 for absmax in found) and len(_state.absmax_shape(param)) == 1:
        # A sharded state stays in rows, which have more blocks.
        size += sum(aligned(absmax.nbytes) for absmax in found)
    return size


def _convert_entry(entry: State, param: Tensor, group: dict[str, Any], names: Names, where: str, make: Make) -> State:
    if _NESTED in entry or "state1" in entry:
        entry = _from_bitsandbytes(entry, param, names, where)
    quantized = _state.wants_8bit(group, param)
    new: State = {}
    entry = _one_format({key: value for key, value in entry.items() if value is not None}, names)
    present = [i for i in range(len(names.plain)) if names.codes[i] in entry or names.plain[i] in entry]
    for i, plain in enumerate(names.plain):
        if i in present:
            _convert_state(new, entry, param, names, quantized, i, where, make)
        elif not present or plain == "momentum_buffer":  # torch keeps none before it is needed
            _state.add_state(new, param, names, quantized, i, make=make)
        else:
            raise ValueError(
                f"{where}: the loaded state lacks {plain}; it has {', '.join(map(str, entry)) or 'nothing'}"
            )
    if "compensation" in entry:
        kept = _tensor(entry["compensation"], "compensation", where)
        if tuple(kept.shape) != tuple(param.shape) or kept.dtype is not param.dtype:
            _refuse("compensation", kept, f"{_name(param.dtype)} {list(param.shape)}", where)
        _put(new, "compensation", kept, param, make)
    # torch's SGD has a buffer from its first step on.
    step = entry.get("step", 1.0 if present else 0.0)
    number = float(step) if not isinstance(step, Tensor) or step.numel() == 1 else math.nan
    if not 0 <= number < math.inf:
        raise ValueError(f"{where}: step must be one number, 0 or positive, got {step!r}")
    new["step"] = _state.new_step(param, number)
    read = {"step", "compensation", *names.plain, *names.codes, *names.absmax}
    new.update({key: deepcopy(value) for key, value in entry.items() if key not in read})
    return new


def _one_format(entry: State, names: Names) -> State:
    """The entry without what is there in another format besides: torch.distributed.checkpoint adds to what it loads
    those keys of a new optimizer's state, all zero, that the file lacks."""
    entry = dict(entry)
    for plain, codes, absmax in zip(names.plain, names.codes, names.absmax, strict=True):
        if plain == codes:  # a moment: codes or values
            if isinstance(entry.get(plain), Tensor) and entry[plain].is_floating_point():
                entry.pop(absmax, None)
        elif all(isinstance(entry.get(key), Tensor) for key in (plain, codes, absmax)):
            for key in (plain,) if bool(_state.whole_of(entry[absmax]).any()) else (codes, absmax):
                del entry[key]
    return entry


def _convert_state(
    new: State, entry: State, param: Tensor, names: Names, quantized: bool, i: int, where: str, make: Make
) -> None:
    shape = tuple(param.shape)
    if names.codes[i] not in entry or names.absmax[i] not in entry:
        values = _tensor(entry.get(names.plain[i]), names.plain[i], where)
        if tuple(values.shape) != shape or not values.is_floating_point():
            _refuse(names.plain[i], values, f"floating-point {list(shape)}", where)
        if not quantized:
            _put(new, names.plain[i], values.float(), param, make)
            return
        _state.set_from_values(new, param, names, quantized, i, _local(values, param), make)
        return
    codes = _tensor(entry[names.codes[i]], names.codes[i], where)
    absmax = _tensor(entry[names.absmax[i]], names.absmax[i], where)
    if tuple(codes.shape) != shape or codes.dtype is not torch.uint8:
        _refuse(names.codes[i], codes, f"uint8 {list(shape)}", where)
    flat, rows = _state.absmax_shape(param, False), _state.absmax_shape(param, True) if param.dim() >= 2 else None
    if absmax.dtype is not torch.float32 or tuple(absmax.shape) not in (flat, rows):
        wanted = f"float32 {list(flat)}" + (f" or {list(rows)}" if rows else "")
        _refuse(names.absmax[i], absmax, wanted, where)
    if not bool(_state.local_of(absmax).isfinite().all()):
        raise ValueError(f"{where}: {names.absmax[i]} must be finite, it holds NaN or Inf")
    target = _state.absmax_shape(param)
    if _state.row_of(param) % _state.BLOCK == 0 and param.dim() >= 2 and not _state.is_dtensor(absmax):
        absmax = absmax.reshape(target)  # the same blocks either way
    if quantized and (tuple(absmax.shape) == target or not _state.is_dtensor(param)):
        _put(new, names.codes[i], codes, param, make)
        _put(new, names.absmax[i], absmax, param, make)
        return
    codes, absmax = _state.whole_of(codes), _state.whole_of(absmax)
    values = _state.values_of(codes.contiguous(), absmax.contiguous(), names.signed[i], not names.signed[i])
    _state.set_from_values(new, param, names, quantized, i, _local(values, param), make)


def _local(value: Tensor, param: Tensor) -> Tensor:
    local = _state.shard_of(value, param)
    return local.detach().to(_state.local_of(param).device)


def _put(new: State, name: str, value: Tensor, param: Tensor, make: Make) -> None:
    """A copy of the part of value that belongs here."""
    local = _state.shard_of(value, param).detach()
    new[name] = _state.like(make(local.shape, local.dtype).copy_(local), param, tuple(value.shape))


def _tensor(value: Any, name: str, where: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise ValueError(f"{where}: {name} must be a tensor, got {value!r}")
    return value


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _refuse(name: str, got: Tensor, wanted: str, where: str) -> None:
    raise ValueError(f"{where}: the loaded {name} must be {wanted}, got {_name(got.dtype)} {list(got.shape)}")


# ---- bitsandbytes --------------------------------------------------------------------------------------------------


def _from_bitsandbytes(entry: State, param: Tensor, names: Names, where: str) -> State:
    """Its states by torch's names, in fp32: the rule's moments in state1 (two of them: along a first dimension) and the
    second moment in state2, or in state1 where there is no moment."""
    nested = entry.get(_NESTED, {})
    entry = {**{key: value for key, value in entry.items() if key != _NESTED}, **nested}
    shape, moments = tuple(param.shape), sum(names.signed)
    new: State = {"step": entry.get("step", 0)}
    if any(f"max{k}" in entry and f"absmax{k}" not in entry for k in (1, 2)):
        raise ValueError(
            f"{where}: the loaded state of bitsandbytes has one maximum per tensor (block_wise=False), which cannot be "
            "read; only 8-bit states with absmax1, and 32-bit ones"
        )
    for k, (begin, end) in enumerate([(0, moments), (moments, len(names.plain))] if moments else [(0, 1)], 1):
        wanted = names.plain[begin:end]
        if not wanted:
            continue
        values = _bitsandbytes_values(entry, k, shape if len(wanted) == 1 else (len(wanted), *shape), where)
        new.update(zip(wanted, [values] if len(wanted) == 1 else values.unbind(), strict=True))
    return new


def _bitsandbytes_values(entry: State, k: int, shape: tuple[int, ...], where: str) -> Tensor:
    state = _tensor(entry.get(f"state{k}"), f"state{k}", where)
    if state.dtype is not torch.uint8:
        if state.numel() != math.prod(shape) or not state.is_floating_point():
            _refuse(f"state{k}", state, f"floating-point or uint8 {list(shape)}", where)
        return state.float().reshape(shape)
    absmax = _tensor(entry.get(f"absmax{k}"), f"absmax{k}", where).float()
    code = _tensor(entry.get(f"qmap{k}"), f"qmap{k}", where).float().contiguous()
    if state.numel() != math.prod(shape):
        _refuse(f"state{k}", state, f"uint8 {list(shape)}", where)
    if code.numel() != 256:
        _refuse(f"qmap{k}", code, "float32 [256]", where)
    parts = absmax.shape[0] if absmax.dim() == 2 else 1
    count, blocks = state.numel() // parts, absmax.numel() // parts
    sizes = [size for size in (256, 2048, 64, 128, 512, 1024, 4096) if (count + size - 1) // size == blocks]
    if not sizes:
        raise ValueError(
            f"{where}: absmax{k} of shape {list(absmax.shape)} fits no blocksize of state{k} with {state.numel()} "
            "elements"
        )
    values = [
        dequantize_blockwise(codes.contiguous(), scale.contiguous(), torch.float32, sizes[0], True, code)
        for codes, scale in zip(state.reshape(parts, count), absmax.reshape(parts, blocks), strict=True)
    ]
    return torch.stack(values).reshape(shape)

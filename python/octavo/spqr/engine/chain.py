"""The repeated blocks of a model, called in order, each on what the one before returned; and their inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ...core.calibration import Batch


class _Stop(Exception):
    """Raised by a hook when the rest of a forward is of no use."""


@dataclass
class Call:
    """Arguments of one forward of a block; `key` says which of them the block before returned."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    key: int | str | None = None  # None: nothing comes from a block before

    @property
    def hidden(self) -> Any:
        return None if self.key is None else self.args[self.key] if isinstance(self.key, int) else self.kwargs[self.key]

    def with_hidden(self, hidden: Any) -> Call:
        if isinstance(self.key, int):
            return Call((*self.args[: self.key], hidden, *self.args[self.key + 1 :]), self.kwargs, self.key)
        return self if self.key is None else Call(self.args, {**self.kwargs, self.key: hidden}, self.key)

    def run(self, block: nn.Module) -> Any:
        """The block's output. It sees a copy of what may be overwritten, as it will be called again."""
        call = self.with_hidden(self.hidden.clone()) if isinstance(self.hidden, Tensor) else self
        return block(*call.args, **call.kwargs)

    def stop_or_run(self, block: nn.Module) -> None:
        """Run the block like `run`; a hook may stop it."""
        with suppress(_Stop):
            self.run(block)


def stop() -> None:
    """Stop the forward pass; a hook calls this during `Call.stop_or_run`."""
    raise _Stop


def first_tensor(output: Any) -> Any:
    """The input of the next block: the output, or the first of several."""
    return output[0] if isinstance(output, (tuple, list)) and output else output


def call_of(batch: Batch) -> Call:
    return Call((batch,), {}) if isinstance(batch, Tensor) else Call((), dict(batch))


@dataclass
class Chain:
    """Blocks and, per batch, the arguments of each: the same for all blocks where `shared`, but for the input."""

    name: str
    blocks: list[nn.Module]
    key: int | str
    shared: bool


def find_chain(model: nn.Module, wanted: Iterable[nn.Module], batch: Batch) -> Chain | None:
    """The list of blocks (a ModuleList or Sequential) that holds most of the wanted modules and works as a chain: all
    its blocks run once, in order, each on the first output of the one before. None where there is none."""
    wanted = set(wanted)
    lists = {
        module: name
        for name, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 0
    }
    held = {entry: sum(module in wanted for module in entry.modules()) for entry in lists}
    calls: dict[nn.Module, list[tuple[int, Call, Any]]] = {entry: [] for entry in lists}

    def record(entry: nn.Module, i: int) -> Callable[..., None]:
        return lambda module, args, kwargs, output: calls[entry].append((i, Call(args, kwargs), output))

    handles = [
        block.register_forward_hook(record(entry, i), with_kwargs=True)
        for entry in lists
        if held[entry]
        for i, block in enumerate(entry.children())
    ]
    try:
        call_of(batch).run(model)
    finally:
        for handle in handles:
            handle.remove()
    for entry in sorted(lists, key=lambda each: -held[each]):  # stable: the outer one of two that hold as many
        found = calls[entry]
        if not held[entry] or [i for i, _, _ in found] != list(range(len(list(entry.children())))):
            continue
        key = _key(found)
        if key is not None:
            first = found[0][1]
            shared = all(_same_but(key, call, first) for _, call, _ in found)
            return Chain(lists[entry], list(entry.children()), key, shared)
    return None


def _key(found: Sequence[tuple[int, Call, Any]]) -> int | str | None:
    """Which argument of every block is the first output of the one before; of a single block, its first tensor."""
    first = found[0][1]
    keys: list[int | str] = [*range(len(first.args)), *first.kwargs]
    for key in keys:
        if not isinstance(Call(first.args, first.kwargs, key).hidden, Tensor):
            continue
        if all(
            (key < len(call.args) if isinstance(key, int) else key in call.kwargs)
            and Call(call.args, call.kwargs, key).hidden is first_tensor(before)
            for (_, _, before), (_, call, _) in pairwise(found)
        ):
            return key
    return None


def _same_but(key: int | str, a: Call, b: Call) -> bool:
    a, b = (Call(call.args, call.kwargs, key).with_hidden(None) for call in (a, b))
    return (
        len(a.args) == len(b.args)
        and a.kwargs.keys() == b.kwargs.keys()
        and _same((a.args, a.kwargs), (b.args, b.kwargs))
    )


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, Tensor) or isinstance(b, Tensor) or type(a) is not type(b):
        return False
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return isinstance(a, (int, float, str, bool)) and bool(a == b)


def capture(model: nn.Module, chain: Chain, batches: Sequence[Batch]) -> list[list[Call]]:
    """Per batch the calls of the blocks; only of the first where they share their other arguments. Equal tensors of
    different batches (masks, rotary tables) are kept once."""
    seen: dict[Any, Tensor] = {}

    def once(value: Any, path: tuple[Any, ...]) -> Any:
        if isinstance(value, Tensor):
            kept = seen.setdefault(path, value)
            same = kept.shape == value.shape and kept.dtype == value.dtype and torch.equal(kept, value)
            return kept if same else value
        if type(value) in (tuple, list):
            return type(value)(once(item, (*path, i)) for i, item in enumerate(value))
        if type(value) is dict:
            return {key: once(item, (*path, key)) for key, item in value.items()}
        return value

    result: list[list[Call]] = []
    blocks = chain.blocks[:1] if chain.shared else chain.blocks

    def record(i: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call = Call(args, kwargs, chain.key)
            hidden = call.hidden if i == 0 else None  # the others' comes from the block before
            empty = call.with_hidden(None)
            call = Call(once(empty.args, (i,)), once(empty.kwargs, (i,)), chain.key)
            result[-1].append(call.with_hidden(hidden))
            if i + 1 == len(blocks):
                raise _Stop

        return hook

    handles = [block.register_forward_pre_hook(record(i), with_kwargs=True) for i, block in enumerate(blocks)]
    try:
        for batch in batches:
            result.append([])
            call_of(batch).stop_or_run(model)
    finally:
        for handle in handles:
            handle.remove()
    return result


@contextmanager
def for_calibration(model: nn.Module) -> Iterator[None]:
    """eval mode, no gradients, no key-value cache; afterwards as it was."""
    training = {name: module.training for name, module in model.named_modules()}  # modules may be replaced
    config = getattr(model, "config", None)
    cache = getattr(config, "use_cache", None)
    try:
        model.eval()
        if cache is not None:
            config.use_cache = False  # type: ignore[union-attr]
        with torch.no_grad():
            yield
    finally:
        if cache is not None:
            config.use_cache = cache  # type: ignore[union-attr]
        for name, module in model.named_modules():
            module.training = training.get(name, module.training)

"""Quantizing the Linear layers of a model, block by block, on inputs that went through the quantized blocks before."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ...core.calibration import Batch
from .chain import Call, call_of, capture, find_chain, first_tensor, for_calibration, stop
from .codes import SpQRCodes
from .columns import quantize_weight
from .config import SpQRConfig
from .hessian import Factor, Hessian, factorize
from .store import Store

Done = Callable[[nn.Linear, SpQRCodes], None]


def quantize_layers(
    model: nn.Module,
    layers: Mapping[nn.Linear, str],
    config: SpQRConfig,
    calibration: Sequence[Batch] | None,
    store: Store | None,
    measured: Done,
    finished: Done,
) -> dict[str, str]:
    """Quantize `layers` (with their names), leaving their dequantized weights in them.

    The repeated blocks of the model are found by running it once: one block's layers and the calibration inputs of
    that block are all that is held. Inside a block, layers with the very same input tensor are a group and share a
    Hessian; groups are quantized in the order in which they are called, on inputs that the groups before have made
    after they were quantized (the paper's true-sequential order, found instead of listed). Layers outside the blocks,
    and all of a model without blocks, are done the same way with the whole model in place of a block.

    Args:
        measured: called for each layer once its codes are known.
        finished: called for each layer when its block is done and the next block's inputs are computed.

    Returns:
        Names of layers that were not quantized, to the reason: no calibration input reached them.

    Raises:
        ValueError: see `quantize_weight` and `Hessian`; the layer is named.
    """
    work = _Work(layers, config, store, measured, finished)
    if calibration is None:
        for layer in layers:
            work.quantize(layer, None)
            finished(layer, work.codes.pop(layer))
        return {}
    with for_calibration(model):
        chain = find_chain(model, layers, calibration[0])
        if chain is not None:
            captured = capture(model, chain, calibration)
            calls = [of_batch[0] for of_batch in captured]
            captured = [[call.with_hidden(None) for call in of_batch] for of_batch in captured]
            for i, block in enumerate(chain.blocks):
                outputs = work.block(block, calls, last=i + 1 == len(chain.blocks))
                if i + 1 < len(chain.blocks):
                    rest = [of_batch[0 if chain.shared else i + 1] for of_batch in captured]
                    calls = [call.with_hidden(hidden) for call, hidden in zip(rest, outputs, strict=True)]
            del captured, calls
        if work.left:
            work.block(model, [call_of(batch) for batch in calibration], last=True)
    return {layers[layer]: "no calibration input reached it" for layer in work.left}


class _Work:
    def __init__(
        self,
        layers: Mapping[nn.Linear, str],
        config: SpQRConfig,
        store: Store | None,
        measured: Done,
        finished: Done,
    ) -> None:
        self.names, self.config, self.store = layers, config, store
        self.measured, self.finished = measured, finished
        self.left = dict(layers)
        self.codes: dict[nn.Linear, SpQRCodes] = {}  # the quantized weights of the current block

    def block(self, block: nn.Module, calls: Sequence[Call], last: bool) -> list[Any]:
        """Quantize the layers in it, and return what the block then makes of each call; nothing of the last block."""
        layers = [module for module in block.modules() if isinstance(module, nn.Linear) and module in self.left]
        groups = [] if self._restored(layers) else _groups(block, layers, calls[0])
        for group, calls_each in groups:
            self._group(block, group, calls, only_call=calls_each == 1)
        seen = {layer for group, _ in groups for layer in group}
        unseen = [layer for layer in layers if layer in self.left and layer not in seen]
        if unseen and groups:  # experts, say, that the first batch was not routed to
            self._each(block, unseen, calls)
        outputs = [] if last else [first_tensor(call.run(block)) for call in calls]
        for layer in layers:
            if layer in self.codes:
                self.finished(layer, self.codes.pop(layer))
        return outputs

    def _restored(self, layers: Sequence[nn.Linear]) -> bool:
        """Whether all layers of the block are on disk; they are then in place."""
        if self.store is None or not layers:
            return not layers
        found = {layer: self.store.load(self.names[layer], *layer.weight.shape) for layer in layers}
        if any(codes is None for codes in found.values()):
            return False
        for layer, codes in found.items():
            assert codes is not None
            self._put(layer, codes)
        return True

    def _group(self, block: nn.Module, group: Sequence[nn.Linear], calls: Sequence[Call], only_call: bool) -> None:
        """Layers with one input: one Hessian. The forward ends where it is known."""
        stored = (
            {layer: self.store.load(self.names[layer], *layer.weight.shape) for layer in group} if self.store else {}
        )
        if stored and all(codes is not None for codes in stored.values()):
            for layer, codes in stored.items():
                assert codes is not None
                self._put(layer, codes)
            return
        hessian = self._hessian(group[0])

        def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hessian.add(_input(args, kwargs))
            if only_call:
                stop()

        handle = group[0].register_forward_pre_hook(watch, with_kwargs=True)
        try:
            for call in calls:
                call.stop_or_run(block)
        finally:
            handle.remove()
        self._quantize_group(group, hessian)

    def _each(self, block: nn.Module, layers: Sequence[nn.Linear], calls: Sequence[Call]) -> None:
        """Layers each with a Hessian of its own, in one go."""
        hessians = {layer: self._hessian(layer) for layer in layers}

        def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            assert isinstance(module, nn.Linear)
            hessians[module].add(_input(args, kwargs))

        handles = [layer.register_forward_pre_hook(watch, with_kwargs=True) for layer in layers]
        try:
            for call in calls:
                call.run(block)
        finally:
            for handle in handles:
                handle.remove()
        for layer in layers:
            hessian = hessians.pop(layer)
            if hessian.count:
                self._quantize_group([layer], hessian)

    def _hessian(self, layer: nn.Linear) -> Hessian:
        return Hessian(layer.in_features, layer.weight.device, self.names[layer])

    def _quantize_group(self, group: Sequence[nn.Linear], hessian: Hessian) -> None:
        given: Factor | Tensor = hessian.matrix
        if self.config.propagate:
            given = factorize(hessian.matrix, self.config.damping, self.config.act_order, self.names[group[0]])
        for layer in group:
            self.quantize(layer, given)

    def quantize(self, layer: nn.Linear, given: Factor | Tensor | None) -> None:
        name = self.names[layer]
        codes = self.store.load(name, *layer.weight.shape) if self.store else None
        if codes is None:
            codes = quantize_weight(layer.weight, given, self.config, name)
            if self.store:
                self.store.save(name, codes)
        self._put(layer, codes)

    def _put(self, layer: nn.Linear, codes: SpQRCodes) -> None:
        layer.weight.data = codes.dequantize().to(layer.weight.device, layer.weight.dtype)
        self.codes[layer] = codes
        del self.left[layer]
        self.measured(layer, codes)


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    x = args[0] if args else kwargs["input"]
    assert isinstance(x, Tensor)
    return x


def _groups(block: nn.Module, layers: Sequence[nn.Linear], call: Call) -> list[tuple[list[nn.Linear], int]]:
    """Layers in the order of their calls, those with the same input tensor together, and how often each is called."""
    seen: list[tuple[nn.Linear, Tensor]] = []  # holds the inputs, so that none is another's memory

    def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert isinstance(module, nn.Linear)
        seen.append((module, _input(args, kwargs)))

    handles = [layer.register_forward_pre_hook(watch, with_kwargs=True) for layer in layers]
    try:
        call.run(block)
    finally:
        for handle in handles:
            handle.remove()
    count = {layer: sum(other is layer for other, _ in seen) for layer, _ in seen}
    groups: list[tuple[list[nn.Linear], int, Tensor]] = []
    for layer, x in seen:
        if any(layer in group for group, _, _ in groups):
            continue
        fitting = [g for g, calls, of_group in groups if of_group is x and calls == count[layer] == 1]
        if fitting:
            fitting[0].append(layer)
        else:
            groups.append(([layer], count[layer], x))
    return [(group, calls) for group, calls, _ in groups]

"""Sites are the places where a model's activations enter its Linear layers; both analyses look at them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..core.linears import is_linear


@dataclass(frozen=True)
class Site:
    """An input that one or several Linear layers share, as q, k and v do.

    Attributes:
        linears: the layers by their names, in the order in which the model calls them.
        depth: the number of the block, from 0.
        projection: what the layers are called in every block, as in "self_attn.q_proj, k_proj, v_proj".
    """

    linears: dict[str, nn.Linear]
    depth: int
    projection: str

    @property
    def leader(self) -> nn.Linear:
        return next(iter(self.linears.values()))

    @property
    def features(self) -> int:
        return self.leader.in_features


def split_name(name: str) -> tuple[int, str]:
    """("model.layers.7.mlp.up_proj") -> (7, "mlp.up_proj"): the block's number, and the name inside of it."""
    parts = name.split(".")
    for index, part in enumerate(parts):
        if part.isdigit():
            return int(part), ".".join(parts[index + 1 :]) or name
    return 0, name


def find_sites(model: Any, ids: Tensor) -> list[Site]:
    """The Linear layers of the model but its head, grouped by the tensor that they are given when `ids` [n] run.

    A layer that is not called (an expert without a token, say) is left out.

    Raises:
        ValueError: the model has no such layer.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    linears = {n: m for n, m in model.named_modules() if is_linear(m) and m is not head and n != "lm_head"}
    groups: dict[int, list[str]] = {}
    held = []  # an id is of one tensor only while that tensor lives

    def see(name: str, x: Tensor) -> None:
        held.append(x)
        names = groups.setdefault(id(x), [])
        if name not in names:
            names.append(name)

    with watching([(partial(see, name), module) for name, module in linears.items()]):
        forward(model, ids)
    if not groups:
        quantized = [type(m).__name__ for m in model.modules() if type(m).__module__.startswith("octavo")]
        why = f"its layers are {quantized[0]}: give the model that it was made from" if quantized else "nothing to see"
        raise ValueError(f"{type(model).__name__} has no torch.nn.Linear but its head; {why}")
    return [_site({name: linears[name] for name in names}) for names in groups.values()]


def _site(linears: dict[str, nn.Linear]) -> Site:
    split = [split_name(name) for name in linears]
    first = split[0][1]
    return Site(linears, split[0][0], ", ".join([first, *(name.rpartition(".")[2] for _, name in split[1:])]))


@contextmanager
def watching(watchers: Sequence[tuple[Callable[[Tensor], object], nn.Module]]) -> Iterator[None]:
    """Calls each function with the input of its module whenever the module runs."""

    def hook(see: Callable[[Tensor], object]) -> Callable[..., None]:
        def call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            see(args[0] if args else kwargs["input"])

        return call

    handles = [module.register_forward_pre_hook(hook(see), with_kwargs=True) for see, module in watchers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def forward(model: Any, ids: Tensor) -> None:
    """Run a window of token ids [context] for what the hooks see of it."""
    device = next(model.parameters()).device
    with torch.inference_mode():
        model(ids[None].to(device), use_cache=False, logits_to_keep=1)

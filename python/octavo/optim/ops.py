"""The operators of optimizers over many tensors: see :mod:`octavo.ops`, which exports them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.fakes import fake


def optim_table(
    params: list[Tensor],
    grads: list[Tensor],
    steps: list[Tensor],
    states: list[Tensor],
    absmax: list[Tensor],
    compensation: list[Tensor],
    ids: list[int],
) -> Tensor:
    """The table of addresses that `optim_step` reads, for these very tensors in this order; `ids` number the
    parameters for stochastic rounding and dither.

    Returns int64 [words] on the CPU: to be moved to the parameters' device, and to be made anew when any tensor is
    another or lies elsewhere. Checks all that `optim_step` checks of its lists.

    Example:
        >>> import octavo, torch
        >>> p, g = torch.ones(4), torch.full((4,), 2.0)
        >>> lists = [p], [g], [torch.ones(1, dtype=torch.float64)], [], [], []
        >>> octavo.ops.optim_table(*lists, ids=[0]).dtype
        torch.int64
    """
    return torch.ops.octavo.optim_table(params, grads, steps, states, absmax, compensation, ids)


_TABLE_WORDS, _BLOCK, _CHUNK_BLOCKS = 18, 256, 32


def table_words(params: list[Tensor], absmax: list[Tensor]) -> int:
    """Length of the table: 18 words per parameter, half a word for each chunk of 32 blocks, and a mark."""
    chunks, each = 0, len(absmax) // max(len(params), 1)
    for i, param in enumerate(params):
        flat = (param.numel() + _BLOCK - 1) // _BLOCK
        blocks = absmax[i * each].numel() or flat if each and flat else flat  # an fp32 state has no absmax
        chunks += (blocks + _CHUNK_BLOCKS - 1) // _CHUNK_BLOCKS
    return _TABLE_WORDS * len(params) + (chunks + 1) // 2 + 1


@fake("optim_table")
def _(
    params: list[Tensor],
    grads: list[Tensor],
    steps: list[Tensor],
    states: list[Tensor],
    absmax: list[Tensor],
    compensation: list[Tensor],
    ids: list[int],
) -> Tensor:
    return torch.empty((table_words(params, absmax),), dtype=torch.int64, device="cpu")


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
    """One step of an optimizer over many parameters of one device, in place; `octavo.optim` is made of it.

    States are decoded, updated in fp32 and encoded again within one pass: moments by the signed dynamic map, of a
    second moment v its root sqrt(v) by the unsigned map, where what is above 0 gets at least code 1. An element whose
    gradient, new state or direction is NaN or Inf is left alone, state and parameter, and counted.

    Args:
        params: contiguous, fp32, fp16 or bf16.
        grads: of the same shapes, any of these dtypes.
        steps: float64, one element each: the number of this step, from 1 on.
        states: for parameter i of n, ``states[i * k + s]`` are its k states in the rule's order, moments first: uint8
            codes or fp32, of the parameter's shape.
        absmax: of each state: fp32 [ceil(numel / 256)], or [rows, ceil(numel / rows / 256)] for blocks that do not
            cross rows; no elements for an fp32 state.
        compensation: empty, or per parameter Kahan's compensation in its 16-bit dtype, or no elements.
        nonfinite: int64 [1], to which the count of elements left alone is added.
        table: from `optim_table` of the same lists; another one is an error, on a GPU a fault of the kernel.
        rule: sgd, momentum, adam, rmsprop, rmsprop_momentum, adagrad, lion, ademamix, lamb, lars or stable_adamw.
        hyper: lr, weight_decay, eps, beta1, beta2, beta3, dampening, alpha, alpha_steps, beta3_steps, lr_decay,
            trust_coefficient, decoupled, nesterov, bias_correction; a rule reads those it knows.
        lr: fp32, one element: replaces that of `hyper`.
        grad_scale: fp32, one element: gradients are divided by it.
        found_inf: fp32, one element: where it is not 0, nothing changes.
        grad_factor: fp32, one element: gradients are multiplied by it.
        maximize: step along the gradient.
        stochastic: round bf16 parameters up or down at random, the nearer the likelier.
        seed: of the random numbers, with the parameters' ids and step numbers.
        sums: of a rule that has any, those of `optim_sums` for this step, where they are not to be taken here.

    Example:
        >>> import octavo, torch
        >>> p, g = torch.ones(4), torch.full((4,), 2.0)
        >>> lists = [p], [g], [torch.ones(1, dtype=torch.float64)], [], [], []
        >>> table = octavo.ops.optim_table(*lists, ids=[0])
        >>> octavo.ops.optim_step(*lists, torch.zeros(1, dtype=torch.int64), table, "sgd", [0.25] + [0.0] * 14)
        >>> p
        tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """
    torch.ops.octavo.optim_step(
        params, grads, steps, states, absmax, compensation, nonfinite, table, rule, hyper, lr, grad_scale, found_inf,
        grad_factor, maximize, stochastic, seed, sums,
    )  # fmt: skip


@fake("optim_step")
def _(params: list[Tensor], *arguments: object, **options: object) -> None:
    return None


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
    """Compute the sums over whole parameters that `optim_step` needs under the rules lamb, lars and stable_adamw: two
    sums over each, which add up over the shards of one. Nothing is changed.

    For lamb and lars they are the squares of the parameter, and of lamb's direction or lars's gradient. Of stable_adamw
    ``g**2 / max(v, eps**2)``, with the gradient and the new second moment, and the number of elements. Elements that
    the step will leave alone add nothing but to that number.

    Args:
        params, grads, steps, states, absmax, compensation, table, hyper, grad_scale, found_inf, grad_factor, maximize:
            as of `optim_step`.
        rule: lamb, lars or stable_adamw.

    Returns float64 [number of params, 2], zeros where found_inf says that nothing changes.

    Example:
        >>> import octavo, torch
        >>> p, g = torch.ones(4), torch.full((4,), 2.0)
        >>> states, absmax = [torch.zeros(4)], [torch.empty(0)]
        >>> lists = [p], [g], [torch.ones(1, dtype=torch.float64)], states, absmax, []
        >>> table = octavo.ops.optim_table(*lists, ids=[0])
        >>> octavo.ops.optim_sums(*lists, table, "lars", [0.25] + [0.0] * 14)
        tensor([[ 4., 16.]], dtype=torch.float64)
    """
    made: Tensor = torch.ops.octavo.optim_sums(
        params, grads, steps, states, absmax, compensation, table, rule, hyper, grad_scale, found_inf, grad_factor,
        maximize,
    )  # fmt: skip
    return made


@fake("optim_sums")
def _(params: list[Tensor], grads: list[Tensor], *arguments: object, **options: object) -> Tensor:
    device = params[0].device if params else None
    return torch.empty((len(params), 2), dtype=torch.float64, device=device)

"""optim_table and optim_step: every rule against the reference, on every backend."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, field

import octavo
import pytest
import torch
from backends import Ops
from compare import FLOATS, assert_same
from octavo import reference
from octavo.blockwise import maps as reference_states
from octavo.optim.reference import HYPER, STATES, SUMS
from torch import Tensor

VALUES = {
    "lr": 1e-2,
    "weight_decay": 0.01,
    "eps": 1e-8,
    "beta1": 0.9,
    "beta2": 0.99,
    "beta3": 0.999,
    "dampening": 0.1,
    "alpha": 3.0,
    "alpha_steps": 3.0,
    "beta3_steps": 3.0,
    "lr_decay": 0.01,
    "trust_coefficient": 0.1,
    "bias_correction": 1.0,
}
IDS = [5, 7, 2**31 + 3, 0]


@dataclass
class Run:
    """Lists of four parameters: rows with tails, a flat one with a ragged tail, a small one in fp32, an empty one."""

    rule: str
    params: list[Tensor]
    quantized: bool
    kahan: bool = False
    steps: list[Tensor] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)
    absmax: list[Tensor] = field(default_factory=list)
    compensation: list[Tensor] = field(default_factory=list)
    nonfinite: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int64))

    def __post_init__(self) -> None:
        moments, second = STATES[self.rule]
        for i, param in enumerate(self.params):
            self.steps.append(torch.zeros((), dtype=torch.float64))
            for s in range(moments + second):
                root = second and s == moments
                if self.quantized and i != 2:
                    self.states.append(torch.full(param.shape, 0 if root else 127, dtype=torch.uint8))
                    blocks = (param.numel() + 255) // 256
                    self.absmax.append(torch.zeros((4, 2) if i == 0 else (blocks,)))
                else:
                    self.states.append(torch.zeros(param.shape))
                    self.absmax.append(torch.empty(0))
            if self.kahan:
                wide = param.dtype is torch.float32
                self.compensation.append(torch.empty(0) if wide else torch.zeros_like(param))

    def lists(self, grads: list[Tensor]) -> list[list[Tensor]]:
        return [self.params, grads, self.steps, self.states, self.absmax, self.compensation]

    def step(self, where: Ops | None, grads: list[Tensor], hyper: dict[str, float], **options: object) -> None:
        """On a backend, or (None) by the reference."""
        for step in self.steps:
            step += 1
        numbers = [float(hyper.get(name, 0.0)) for name in HYPER]
        lists = self.lists(grads)
        if where is None:
            table = reference.optim_table(*lists, IDS[: len(lists[0])])
            reference.optim_step(*lists, self.nonfinite, table, self.rule, numbers, **options)
            return
        device = "cuda" if where.backend == "cuda" else "cpu"
        packets = getattr(torch.ops, where.namespace)
        moved = [[t.to(device) for t in tensors] for tensors in lists]
        nonfinite = self.nonfinite.to(device)
        options = {key: o.to(device) if isinstance(o, Tensor) else o for key, o in options.items()}
        table = packets.optim_table(*moved, IDS[: len(lists[0])]).to(device)
        packets.optim_step(*moved, nonfinite, table, self.rule, numbers, **options)
        for tensors, results in zip([*lists, [self.nonfinite]], [*moved, [nonfinite]], strict=True):
            for t, result in zip(tensors, results, strict=True):
                t.copy_(result)


def make(rule: str, quantized: bool, dtype: torch.dtype, kahan: bool = False) -> Run:
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, 300), (70, 13), (3, 5), (0,))
    params = [torch.randn(s, generator=generator).to(torch.float32 if i == 1 else dtype) for i, s in enumerate(shapes)]
    return Run(rule, params, quantized, kahan)


def gradients(run: Run, generator: torch.Generator, dtype: torch.dtype) -> list[Tensor]:
    return [(torch.randn(p.shape, generator=generator) * 0.1).to(dtype) for p in run.params]


def trace(
    where: Ops | None, rule: str, dtype: torch.dtype, quantized: bool, hyper: dict[str, float], **options: object
) -> list[Run]:
    """What a few steps with gradients of every dtype leave behind, on a backend or (None) by the reference."""
    kahan = bool(options.pop("kahan", False))
    run, generator, after = make(rule, quantized, dtype, kahan), torch.Generator().manual_seed(1), []
    for number in range(3):
        grads = gradients(run, generator, FLOATS[number % 3])
        run.step(where, grads, hyper, **options)
        after.append(copy.deepcopy(run))
    return after


@functools.cache
def expected(
    rule: str, dtype: torch.dtype, quantized: bool, hyper: tuple[tuple[str, float], ...], **options: object
) -> list[Run]:
    """The reference's trace: the same for every backend."""
    return trace(None, rule, dtype, quantized, dict(hyper), **options)


def assert_as_reference(actual: Run, wanted: Run) -> None:
    """The same bits, but for rules with sums over whole tensors: sums in double in another order, after which the
    rounding of a ratio to fp32 may be the other one. That moves parameters by a rounding, LARS's buffer with them."""
    assert torch.equal(actual.nonfinite, wanted.nonfinite)
    exact = actual.rule not in SUMS
    names = ("states", "absmax", "params", "compensation")
    for name in names if exact else names[:3]:
        for a, e in zip(getattr(actual, name), getattr(wanted, name), strict=True):
            if exact:
                assert_same(a, e)
            elif a.dtype is torch.uint8:
                assert int((a.int() - e.int()).abs().max() if len(a) else 0) <= 1
            else:
                torch.testing.assert_close(a, e, rtol=4 * torch.finfo(a.dtype).eps, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("signed", [True, False])
def test_states_at_every_threshold(ops: Ops, signed: bool):
    """One step that stores given values as a state: each midpoint of the map with its neighbours, zeros, denormals."""
    middle = reference_states.thresholds(reference_states.dynamic_map(signed)).float()
    values = [middle, torch.tensor([0.0, -0.0, 1e-45, -1e-45, 2e-38, 1e-7, 1e-20, 1.0, -0.992, 0.3] + [0.0] * 245)]
    above, below = middle, middle
    for _ in range(4):
        above, below = above.nextafter(torch.tensor(9.0)), below.nextafter(torch.tensor(-9.0))
        values += [above, below]
    rows = torch.stack(values) if signed else torch.stack(values).clamp(min=0)
    grad = torch.cat([torch.ones(len(rows), 1), rows], 1)  # a 1 in every block: its absmax
    # The first step of momentum keeps the gradient itself, Adagrad's the root of its square.
    rule, stored = "momentum" if signed else "adagrad", grad if signed else grad.square().double().sqrt().float()
    run = Run(rule, [torch.zeros_like(grad)], True)
    run.absmax = [torch.zeros(len(grad), 1)]
    run.step(ops, [grad], dict.fromkeys(VALUES, 0.0))
    key = reference_states.dither_key(IDS[0], 1.0, 0)
    draw = reference_states.dither(key, torch.arange(grad.numel()).view_as(grad))
    assert_same(run.states[0], reference_states.state_code(stored, signed, draw))


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize(
    ("dtype", "decoupled"), [(torch.float32, 0.0), (torch.float32, 1.0), (torch.float16, 0.0), (torch.bfloat16, 1.0)]
)
@pytest.mark.parametrize("rule", STATES)
def test_rules(ops: Ops, rule: str, dtype: torch.dtype, quantized: bool, decoupled: float):
    hyper = {**VALUES, "decoupled": decoupled, "nesterov": decoupled}
    wanted = expected(rule, dtype, quantized, tuple(hyper.items()))
    for a, e in zip(trace(ops, rule, dtype, quantized, hyper), wanted, strict=True):
        assert_as_reference(a, e)
    assert wanted[-1].nonfinite.item() == 0


@pytest.mark.parametrize("rule", STATES)
def test_nonfinite_elements_are_left_alone(ops: Ops, rule: str):
    """Parameter and state of the element keep their values; its block mates step as if it were not there."""
    runs = [make(rule, True, torch.float32) for _ in range(2)]
    generator = torch.Generator().manual_seed(1)
    for number in range(3):
        grads = gradients(runs[0], generator, torch.float32)
        if number > 0:
            grads[0][1, 2], grads[0][1, 299] = float("nan"), float("inf")
            grads[1][3, 3], grads[1][69, 12] = -float("inf"), 1e30  # of the last, the square is Inf
            grads[2][0] = float("nan")
        before = [p.clone() for p in runs[0].params]
        for run, where in zip(runs, (ops, None), strict=True):
            run.step(where, grads, VALUES)
        assert_as_reference(*runs)
        for p, old, g in zip(runs[0].params, before, grads, strict=True):
            bad = ~g.isfinite()
            assert torch.equal(p[bad], old[bad])
            assert p.numel() == 0 or float((p[~bad] != old[~bad]).float().mean()) > 0.9
    squares = rule not in ("sgd", "momentum", "lion", "lars")
    assert runs[0].nonfinite.item() == 2 * (8 + squares)


@pytest.mark.parametrize("rule", ["sgd", "adam", "lion", "lamb", "lars", "stable_adamw"])
def test_amp_clipping_and_lr_tensor(ops: Ops, rule: str):
    numbers = {"grad_scale": 128.0, "grad_factor": 0.3, "lr": 3e-3, "found_inf": 0.0}
    options = {"maximize": True, **{key: torch.tensor(value) for key, value in numbers.items()}}
    after = [trace(where, rule, torch.bfloat16, True, VALUES, **options) for where in (ops, None)]
    for a, e in zip(*after, strict=True):
        assert_as_reference(a, e)
    run = after[0][-1]
    before = [t.clone() for t in (*run.params, *run.states, *run.absmax)]
    run.step(ops, [torch.ones_like(p) for p in run.params], VALUES, found_inf=torch.tensor(2.0))
    assert all(torch.equal(a, b) for a, b in zip((*run.params, *run.states, *run.absmax), before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rule", STATES)
def test_kahan(ops: Ops, rule: str, dtype: torch.dtype):
    wanted = expected(rule, dtype, True, tuple(VALUES.items()), kahan=True)
    for a, e in zip(trace(ops, rule, dtype, True, VALUES, kahan=True), wanted, strict=True):
        assert_as_reference(a, e)
    assert any(bool(kept.any()) for kept in a.compensation)


@pytest.mark.parametrize("seed", [0, -1, 12345678901234567])
def test_stochastic_rounding_draws_the_reference_numbers(ops: Ops, seed: int):
    options = {"stochastic": True, "seed": seed}
    wanted = expected("sgd", torch.bfloat16, False, tuple(VALUES.items()), **options)
    for a, e in zip(trace(ops, "sgd", torch.bfloat16, False, VALUES, **options), wanted, strict=True):
        for p, q in zip(a.params, e.params, strict=True):
            assert torch.equal(p, q)  # no codes here: the sum is the same to the bit


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("rule", SUMS)
def test_sums(ops: Ops, rule: str, quantized: bool):
    """Of every parameter, in their order, without the elements left alone; a step with given sums uses them."""
    run, generator = make(rule, quantized, torch.bfloat16), torch.Generator().manual_seed(1)
    for number in range(2):
        run.step(None, gradients(run, generator, FLOATS[number]), VALUES)
    grads = gradients(run, generator, torch.float32)
    grads[0][1, 2], grads[1][3, 3], grads[2][0] = float("nan"), float("inf"), -float("inf")
    for step in run.steps:
        step += 1
    numbers, options = [VALUES.get(name, 0.0) for name in HYPER], {"maximize": True, "grad_scale": torch.tensor(3.0)}
    device = "cuda" if ops.backend == "cuda" else "cpu"
    moved = [[t.to(device) for t in tensors] for tensors in run.lists(grads)]
    packets = getattr(torch.ops, ops.namespace)
    table = packets.optim_table(*moved, IDS).to(device)
    given = {**options, "grad_scale": options["grad_scale"].to(device)}
    sums = packets.optim_sums(*moved, table, rule, numbers, **given)
    wanted = reference.optim_sums(*run.lists(grads), table.cpu(), rule, numbers, **options)
    torch.testing.assert_close(sums.cpu(), wanted, rtol=1e-12, atol=0.0)
    assert bool((wanted[:3] > 0).all()) and not bool(wanted[3].any())
    found = torch.ones((), device=device)
    assert not bool(packets.optim_sums(*moved, table, rule, numbers, **given, found_inf=found).any())
    # Given ones are used: of 9 times the size in the first column, for one. (Of fp32 parameters it is sure to show.)
    ways = []
    for factor in (None, 1.0, 9.0):
        lists = copy.deepcopy(moved)
        nonfinite = torch.zeros(1, dtype=torch.int64, device=device)
        table = packets.optim_table(*lists, IDS).to(device)
        more = None if factor is None else sums * torch.tensor([factor, 1.0], dtype=torch.float64, device=device)
        packets.optim_step(*lists, nonfinite, table, rule, numbers, **given, sums=more)
        ways.append(lists[0])
    assert all(torch.equal(p, q) for p, q in zip(ways[0], ways[1], strict=True))
    assert not torch.equal(ways[0][1], ways[2][1])


def test_table_is_as_documented():
    run = make("ademamix", True, torch.float16, kahan=True)
    lists = run.lists([torch.zeros_like(p) for p in run.params])
    table = octavo.ops.optim_table(*lists, IDS[: len(lists[0])])
    assert torch.equal(table, reference.optim_table(*lists, IDS[: len(lists[0])]))
    assert len(table) == octavo.optim.ops.table_words(run.params, run.absmax)


@pytest.mark.parametrize("kind", [octavo.optim.LAMB8bit, octavo.optim.StableAdamW8bit])
def test_threads_do_not_change_bits(kind: type[octavo.optim.Optimizer8bit], generator: torch.Generator):
    threads, results = torch.get_num_threads(), []
    start, grad = torch.randn(1 << 20, generator=generator), torch.randn(1 << 20, generator=generator)
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            param = start.clone().bfloat16().requires_grad_()
            param.grad = grad.bfloat16()
            optimizer = kind([param], rounding="stochastic")
            for _ in range(3):
                optimizer.step()
            results.append((param, optimizer.state[param]))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(results[0][1][key], results[1][1][key]) for key in results[0][1])


def changed(rule: str = "adam", **lists: object) -> tuple[list[object], str]:
    run = make(rule, True, torch.float32)
    names = ("params", "grads", "steps", "states", "absmax", "compensation")
    values: dict[str, list[Tensor]] = dict(zip(names, run.lists([p.clone() for p in run.params]), strict=True))
    for name, change in lists.items():
        assert callable(change)
        values[name] = change(list(values[name]))
    return list(values.values()), rule


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grads": lambda t: t[:3]}, "4 params need 4 grads, got 3"),
        ({"steps": lambda t: t[:3]}, "4 params need 4 steps, got 3"),
        ({"absmax": lambda t: t[:3]}, "4 params need 8 absmax, got 3"),
        ({"states": lambda t: t[:7], "absmax": lambda t: t[:7]}, "4 params cannot have 7 states"),
        ({"params": lambda t: [t[0].double(), *t[1:]]}, "got float64"),
        ({"params": lambda t: [t[0].t(), *t[1:]]}, r"params\[0\] must be contiguous"),
        ({"grads": lambda t: [t[0][:3], *t[1:]]}, r"grads\[0\] has shape \[3, 300\] but its parameter has \[4, 300\]"),
        ({"steps": lambda t: [torch.ones(2).double(), *t[1:]]}, r"steps\[0\] must be one number"),
        ({"states": lambda t: [t[0].int(), *t[1:]]}, r"states\[0\] must be uint8 or float32, got int32"),
        ({"states": lambda t: [t[0].float(), *t[1:]]}, r"states\[1\]: the states of a parameter are all"),
        ({"absmax": lambda t: [torch.ones(3), *t[1:]]}, r"absmax\[0\] has shape \[3\], which does not fit"),
        ({"absmax": lambda t: [torch.ones(5), *t[1:]]}, "have the same rows"),
        ({"compensation": lambda t: [torch.ones(4, 300).half()] * 4}, r"compensation\[0\] must be of its parameter"),
    ],
    ids=lambda v: None if isinstance(v, dict) else v[:24],
)
def test_errors_name_the_values(change: dict[str, object], message: str):
    lists, _ = changed(**change)
    with pytest.raises(RuntimeError, match=message):
        octavo.ops.optim_table(*lists, IDS[: len(lists[0])])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("adamw", [0.0] * 15), "unknown rule 'adamw'"),
        (("adam", [0.0] * 14), "hyper must hold 15 numbers, got 14"),
        (("lion", [0.0] * 15), "rule 'lion' has 1 states per parameter, got 2"),
        (("adam", [0.0] * 15, torch.ones(2)), r"lr must be one number, got shape \[2\]"),
    ],
)
def test_errors_of_a_step(arguments: tuple[object, ...], message: str):
    lists, _ = changed()
    table = octavo.ops.optim_table(*lists, IDS[: len(lists[0])])
    with pytest.raises(RuntimeError, match=message):
        octavo.ops.optim_step(*lists, torch.zeros(1, dtype=torch.int64), table, *arguments)
    with pytest.raises(RuntimeError, match=r"the table does not belong to these tensors: it has \d+ words instead of"):
        octavo.ops.optim_step(*lists, torch.zeros(1, dtype=torch.int64), table[1:], "adam", [0.0] * 15)

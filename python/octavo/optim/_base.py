"""The step that all optimizers share: gather lists, one `octavo.ops.optim_step` per parameter group and device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, cast, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # its public name would import the compiler at once

from . import _load, _state, ops
from ._foreach import advance, over_shards, total_norm
from ._launch import Launch, Shards
from ._options import DEFAULTS, OF_PAGING, Options, check_group
from ._paging import Page, Paging, aligned
from ._state import FLOATS, RULES, WITH_SUMS, State

FORMAT_VERSION = 1
_TABLES_KEPT = 16  # per group and device: gradients may alternate between a few addresses
_HYPER = (
    *("lr", "weight_decay", "eps", "beta1", "beta2", "beta3", "dampening", "alpha", "alpha_steps", "beta3_steps"),
    *("lr_decay", "trust_coefficient", "decoupled", "nesterov", "bias_correction"),
)


class Optimizer8bit(torch.optim.Optimizer, ABC):
    """A `torch.optim.Optimizer` whose states are 8-bit codes (arXiv 2110.02861), stepped by one kernel per parameter
    group and device, without host synchronisation.

    Options of every parameter group, beside those of the rule:

    Args:
        maximize: step along the gradient.
        bits: 8, or 32 for fp32 states in the format of torch.optim.
        min_8bit_size: parameters with fewer elements keep fp32 states.
        rounding: of 16-bit parameters: "nearest"; "stochastic" (bf16), up or down at random, the nearer the likelier;
            "kahan", which keeps in one more tensor of 16 bit what rounding cuts off, for the next step.
        seed: of stochastic rounding; a step's random numbers depend on it, the step and the parameter's position.
        max_grad_norm: gradients are scaled by ``min(1, max_grad_norm / (norm + 1e-6))`` on the way, as
            `torch.nn.utils.clip_grad_norm_` would, with the norm of all gradients of the groups that set this. The
            norm of the last step is in the attribute `grad_norm`. A norm that is NaN or Inf leaves these groups'
            parameters alone.
        foreach, fused, capturable: accepted and without effect: there is one implementation, and it can be captured
            (with lr a tensor on the device, if it is to change between replays).
        differentiable: only False.
        paged, page_dir, device_budget: of the optimizer, not of groups; see below.

    States are coded with dither: each step a code is the one below or above, the nearer the likelier, by numbers that
    depend on the step, the parameter's position and the element only. (A step may change a state by less than the
    distance of codes; the nearest code would then never change.) A second moment is kept as its root: what is above 0
    stays above 0. 0 stays 0.

    States are made at a parameter's first step: `bits` and `min_8bit_size` take effect then, or when a state is loaded.
    A parameter with an attribute ``octavo_state_bits = 32`` (`octavo.nn.StableEmbedding` sets it) keeps fp32 states.
    Elements whose gradient, new state or direction is NaN or Inf are left alone: see `nonfinite_count`.

    Sharded parameters (DTensor, as FSDP2 makes them) have sharded states, in 8 bit where they are sharded along
    dimension 0 in rows of at least 64 elements. `load_state_dict` also reads states of torch.optim and bitsandbytes.

    With ``paged=True`` (arXiv 2305.14314) states that do not fit in device_budget bytes live on the host. Of parameters
    on a GPU: in pinned memory, copied to one of two buffers on the device and back while others are copied and stepped.
    Of parameters on the CPU: in a memory-mapped file in the folder page_dir, which nobody else sees and which is gone
    with the optimizer, so that states larger than memory train; without page_dir in ordinary memory. device_budget
    counts states that stay and both buffers, on each device; None: 128 MiB, or what two of the largest need. Steps give
    the same bits as without, but cannot be captured in CUDA graphs where states are paged, and sharded parameters may
    be paged on the CPU only, and not by LAMB, LARS and StableAdamW. After a step on a GPU, `state` holds its results
    once the device is done (`torch.cuda.synchronize`); `state_dict` waits for that.

    Example:
        >>> import octavo, torch
        >>> weight = torch.nn.Parameter(torch.ones(64, 64))
        >>> optimizer = octavo.optim.Adam8bit([weight], max_grad_norm=1.0)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> optimizer.grad_norm.item(), isinstance(optimizer, octavo.optim.Optimizer8bit)
        (128.0, True)
    """

    _step_supports_amp_scaling = True  # torch.amp.GradScaler leaves grad_scale and found_inf with the optimizer
    grad_norm: Tensor | None = None
    _betas = 2  # how many, where the rule has any
    _keeps_sums = False  # whether the last step's sums over whole parameters are kept for the user
    _preset: ClassVar[Options] = {}  # the options of the class where they are not given
    _paging: Paging | None = None

    def __init__(self, params: Any, defaults: dict[str, Any], options: Options) -> None:
        if unknown := set(options) - set(DEFAULTS) - set(OF_PAGING):
            raise TypeError(
                f"{type(self).__name__} has no option {', '.join(sorted(unknown))}; beside those of its rule it has "
                f"{', '.join((*DEFAULTS, *OF_PAGING))}"
            )
        options = {**self._preset, **options}
        self._paging = Paging.of(type(self).__name__, options)
        self._reset_caches()
        shared = {key: value for key, value in options.items() if key not in OF_PAGING}
        super().__init__(params, {**defaults, **DEFAULTS, **shared, "format_version": FORMAT_VERSION})

    # ---- of the rule: subclasses ----

    @abstractmethod
    def _rule(self, group: dict[str, Any]) -> str:
        """The name of the rule, as the operators have it."""

    @abstractmethod
    def _hyper(self, group: dict[str, Any]) -> dict[str, float]:
        """The hyperparameters that the rule reads beside lr, weight_decay and eps."""

    def _initial(self, group: dict[str, Any]) -> float:
        """The value that a second moment starts with."""
        return 0.0

    def _check_rule(self, group: dict[str, Any]) -> None:
        """ValueError where the group's options do not go together."""

    # ---- checks ----

    def _check_group(self, group: dict[str, Any], index: int) -> None:
        check_group(group, f"{type(self).__name__}: parameter group {index}", self._betas)
        self._check_rule(group)

    def _named(self, group: dict[str, Any], position: int, number: int) -> str:
        names = group.get("param_names")
        return f"{type(self).__name__}: parameter {number}" + (f" ({names[position]!r})" if names else "")

    def _check_param(self, group: dict[str, Any], param: Tensor, where: str) -> None:
        if not param.requires_grad and param.grad is None:
            return  # frozen: codes of low-bit layers are parameters, too
        if param.dtype not in FLOATS:
            raise ValueError(f"{where} must be float32, float16 or bfloat16, got {_dtype(param)} {list(param.shape)}")
        if group["rounding"] == "stochastic" and param.dtype is torch.float16:
            raise ValueError(f"{where}: rounding='stochastic' is for bfloat16, got float16 {list(param.shape)}")
        if self._paging is not None and self._rule(group) in WITH_SUMS and _state.is_dtensor(param):
            raise ValueError(
                f"{where} is a DTensor of shape {list(param.shape)}: {type(self).__name__} sums over all shards of its "
                "parameters at once, which it cannot with paged=True, as processes page different ones"
            )
        if self._paging is not None:
            self._paging.check(param, where)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as `torch.optim.Optimizer.add_param_group`."""
        super().add_param_group(param_group)
        group, first = self.param_groups[-1], sum(len(g["params"]) for g in self.param_groups[:-1])
        try:
            self._check_group(group, len(self.param_groups) - 1)
            for i, param in enumerate(group["params"]):
                self._check_param(group, param, self._named(group, i, first + i))
        except ValueError:
            self.param_groups.pop()
            raise

    def _check_entry(self, rule: str, param: Tensor, grad: Tensor, state: State, page: Page | None, where: str) -> None:
        """Check what may have changed since the last step; the lengths of lists of blocks are the operator's to
        check."""
        if grad.dtype not in FLOATS:
            raise ValueError(f"{where}: its gradient must be float32, float16 or bfloat16, got {_dtype(grad)}")
        names = RULES[rule]
        for name in dict.fromkeys((*names.plain, *names.codes, *names.absmax)):
            if name not in state:
                continue
            value = _state.local_of(state[name])
            if value.device != param.device and (page is None or page.place_of(value) is None):
                raise ValueError(
                    f"{where} is on {param.device} but its {name} on {value.device}: move a model before its first "
                    "step, or load the optimizer's state again after moving it"
                )
            if name not in names.absmax and value.shape != param.shape:
                raise ValueError(
                    f"{where} has shape {list(param.shape)} but its {name} {list(value.shape)}: it was resized after "
                    "its first step"
                )

    # ---- step ----

    def _reset_caches(self) -> None:
        self._tables: dict[tuple[object, ...], OrderedDict[tuple[object, ...], tuple[Tensor, Tensor]]] = {}
        self._captured: list[tuple[Tensor, Tensor]] = getattr(self, "_captured", [])  # CUDA graphs read these tables
        self._nonfinite: dict[torch.device, Tensor] = getattr(self, "_nonfinite", {})
        # The last step's numbers of parameters, and `ops.optim_sums` of them.
        self._sums: list[tuple[list[int], Tensor]] = []

    def __getstate__(self) -> dict[str, Any]:
        if self._paging is None:
            return super().__getstate__()
        self._paging.synchronize()
        return {**super().__getstate__(), "_paging": self._paging}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._reset_caches()
        for entry in self.state.values():  # octavo 0.1.0 pickled steps in fp32
            if isinstance(entry, dict) and isinstance(step := entry.get("step"), Tensor):
                entry["step"] = step.double()
        if self._paging is not None and "_paging" in state:  # a copy: its states are in ordinary memory so far
            self._place_again(self._paging)

    def _complete_state(
        self, group: dict[str, Any], rule: str, param: Tensor, where: str, make: _state.Make | None = None
    ) -> State:
        """The parameter's state, made or completed."""
        names, state = RULES[rule], self.state[param]
        self._check_param(group, param, where)
        quantized = any(name in state for name in names.absmax)
        if not quantized and not any(name in state for name in names.plain):
            quantized = _state.wants_8bit(group, param)
        for i, name in enumerate(names.codes if quantized else names.plain):
            if name not in state:
                fill = 0.0 if names.signed[i] else self._initial(group)
                _state.add_state(state, param, names, quantized, i, fill, make)
        if "step" not in state:
            state["step"] = _state.new_step(param)
        if group["rounding"] == "kahan" and param.dtype is not torch.float32 and "compensation" not in state:
            _state.add_compensation(state, param, make)
        return cast(State, state)

    def _make_paged_states(self, paging: Paging) -> Paging:
        """The states of parameters that have a gradient for the first time, made in place. Returns what pages them."""
        new: list[tuple[dict[str, Any], Tensor, str, int]] = []
        number = -1
        for group in self.param_groups:
            names, kahan = RULES[self._rule(group)], group["rounding"] == "kahan"
            kept = (*names.plain, *names.codes, "compensation")
            for position, param in enumerate(group["params"]):
                number += 1
                if param.grad is None or any(name in self.state.get(param, ()) for name in kept):
                    continue
                where, quantized = self._named(group, position, number), _state.wants_8bit(group, param)
                self._check_param(group, param, where)
                compensated = kahan and param.dtype is not torch.float32
                if size := _state.bytes_of(param, names, quantized, compensated, aligned):
                    new.append((group, param, where, size))
        sizes = [(param, size) for _, param, _, size in new]
        if any(param in paging.places for param, _ in sizes):  # the owner has cleared the old states
            paging = self._place_again(paging, sizes)
        else:
            try:
                paging.reserve(sizes)
            except ValueError:  # the states that stay so far may leave too little of the budget
                paging = self._place_again(paging, sizes)
        for group, param, where, _ in new:
            self._complete_state(group, self._rule(group), param, where, paging.maker(param))
        return paging

    def _place_again(self, old: Paging, new: Sequence[tuple[Tensor, int]] = ()) -> Paging:
        """Move all states to where they belong now, with places for new ones."""
        old.synchronize()
        paging = old.without_pages()
        found = [
            (param, self.state[param], RULES[self._rule(group)])
            for group in self.param_groups
            for param in group["params"]
            if param in self.state
        ]
        paging.reserve([*((param, paging.size_of(state, names)) for param, state, names in found), *new])
        for param, state, names in found:
            paging.put(param, state, names, copied=old.places.get(param) is not None)
        self._paging = paging
        return paging

    def _gather(self) -> tuple[list[Launch], list[Tensor], list[tuple[Tensor, Tensor]]]:
        """The calls of this step; all step counters, also those of parameters with no elements here; and, of groups
        with clipping, parameters with their gradients. Everything is checked before anything is changed."""
        launches: list[Launch] = []
        counters: list[Tensor] = []
        clipped: list[tuple[Tensor, Tensor]] = []
        dtensor, wide, number = _state.dtensor_type(), torch.float32, -1
        if (paging := self._paging) is not None:
            paging = self._make_paged_states(paging)
            paging.prepare()
        for index, group in enumerate(self.param_groups):
            rule, by_place = self._rule(group), dict[tuple[torch.device, Page | None, Shards], Launch]()
            names, kahan, clips = RULES[rule], group["rounding"] == "kahan", group["max_grad_norm"] is not None
            for position, param in enumerate(group["params"]):
                number += 1
                grad = param.grad
                if grad is None:
                    continue
                if grad.layout is not torch.strided:
                    raise ValueError(
                        f"{self._named(group, position, number)} has a gradient of layout {grad.layout}: only dense "
                        "ones are supported (an Embedding's, for one, with sparse=False)"
                    )
                try:
                    step, values, absmax, kept = _state.read(
                        self.state[param], names, kahan and param.dtype is not wide
                    )
                except KeyError:
                    state = self._complete_state(group, rule, param, self._named(group, position, number))
                    step, values, absmax, kept = _state.read(state, names, kahan and param.dtype is not wide)
                p, g, shards = cast(Tensor, param), grad, None
                if dtensor is not None and isinstance(param, dtensor):
                    if isinstance(g, dtensor) and g.placements != param.placements:
                        g = g.redistribute(placements=param.placements)
                    shards = (param.device_mesh, param.placements) if rule in WITH_SUMS else None
                    p, g = _state.local_of(p), _state.local_of(g)
                    values, absmax = [_state.local_of(v) for v in values], [_state.local_of(a) for a in absmax]
                    kept = None if kept is None else _state.local_of(kept)
                counters.append(step)
                if clips:
                    clipped.append((param, g))
                if p.numel() == 0 and rule not in WITH_SUMS:  # other processes may hold what there is to sum
                    continue
                page = None if paging is None else paging.page_of(param)
                if paging is not None and page is not None:
                    values, absmax = paging.stage(page, values), paging.stage(page, absmax)
                    kept = None if kept is None else paging.stage(page, [kept])[0]
                launch = by_place.get((p.device, page, shards))
                if launch is None:
                    launch = by_place[p.device, page, shards] = Launch(group, index, rule, p.device, page, shards)
                if not p.is_contiguous():
                    launch.copies.append((p, copy := p.contiguous()))
                    p = copy
                launch.params.append(p)
                launch.grads.append(g if g.is_contiguous() else g.contiguous())
                launch.steps.append(step)
                launch.states += values
                launch.absmax += absmax or [self._empty(p.device)] * len(names.plain)
                if kahan:
                    launch.compensation.append(self._empty(p.device) if kept is None else kept)
                launch.ids.append(number)
            launches += by_place.values()
        for launch in launches:
            self._find_table(launch)
            self._find_hyper(launch)
        return launches, counters, clipped

    def _find_hyper(self, launch: Launch) -> None:
        """The numbers of a call; options may have been set to anything since the group was made."""
        group = launch.group
        self._check_group(group, launch.index)
        lr, lr_value = group["lr"], 0.0
        if isinstance(lr, Tensor) and lr.device.type != "cpu":
            launch.lr = lr.detach().to(launch.device, torch.float32, non_blocking=True)
        else:
            lr_value = float(lr)
        hyper = {"lr": lr_value, "weight_decay": group["weight_decay"], "eps": group.get("eps", 0.0)}
        hyper.update(self._hyper(group))
        launch.hyper = [float(hyper.get(name, 0.0)) for name in _HYPER]

    @staticmethod
    def _empty(device: torch.device) -> Tensor:
        """Stands for no absmax and no compensation."""
        if device not in _EMPTY:
            _EMPTY[device] = torch.empty(0, device=device)
        return _EMPTY[device]

    def _find_table(self, launch: Launch) -> None:
        place = (launch.index, launch.device, None if launch.page is None else launch.page.number)
        key, cache = launch.key(), self._tables.setdefault(place, OrderedDict())
        if key in cache:
            cache.move_to_end(key)
        else:
            self._check_launch(launch)
            host = ops.optim_table(*launch.lists(), launch.ids)
            if launch.device.type == "cpu":
                cache[key] = (host, host)
            else:
                host = host.pin_memory()
                cache[key] = (host.to(launch.device, non_blocking=True), host)
            while len(cache) > _TABLES_KEPT:
                cache.popitem(last=False)
        if launch.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self._captured.append(cache[key])
        launch.table = cache[key][0]

    def _check_launch(self, launch: Launch) -> None:
        params = [p for group in self.param_groups for p in group["params"]]
        first = sum(len(group["params"]) for group in self.param_groups[: launch.index])
        for number, p, g in zip(launch.ids, launch.params, launch.grads, strict=True):
            where = self._named(launch.group, number - first, number)
            self._check_param(launch.group, params[number], where)
            self._check_entry(launch.rule, p, g, self.state[params[number]], launch.page, where)

    def _clip(self, clipped: list[tuple[Tensor, Tensor]], scale: Tensor | None) -> None:
        """Sets grad_norm, on the device of the first gradient."""
        norm = total_norm(clipped)
        self.grad_norm = norm if scale is None else norm / scale.to(norm.device, torch.float32, non_blocking=True)

    def _launch(self, launch: Launch, scale: Tensor | None, found: Tensor | None) -> None:
        group, device = launch.group, launch.device
        factor = None
        if group["max_grad_norm"] is not None and self.grad_norm is not None:
            norm = self.grad_norm.to(device, non_blocking=True)
            # The second term makes a norm of Inf a factor of NaN, which leaves everything alone.
            factor = (group["max_grad_norm"] / (norm + 1e-6)).clamp(max=1.0) + 0.0 * norm
        if device not in self._nonfinite:
            self._nonfinite[device] = torch.zeros(1, dtype=torch.int64, device=device)
        assert launch.table is not None
        scale = None if scale is None else scale.to(device, torch.float32, non_blocking=True)
        found = None if found is None else found.to(device, torch.float32, non_blocking=True)
        of_rule, of_grads = (launch.table, launch.rule, launch.hyper), (scale, found, factor)
        sums, maximize = None, bool(group["maximize"])
        if launch.shards is not None or self._keeps_sums:
            sums = ops.optim_sums(*launch.lists(), *of_rule, *of_grads, maximize)
            if launch.shards is not None:
                sums = over_shards(sums, launch.shards)
            self._sums.append((launch.ids, sums))
        ops.optim_step(
            *launch.lists(),
            self._nonfinite[device],
            *of_rule,
            launch.lr,
            *of_grads,
            maximize,
            group["rounding"] == "stochastic",
            group["seed"],
            sums,
        )
        for param, copy in launch.copies:
            param.copy_(copy)
        torch.autograd.graph.increment_version(launch.params)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @_disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step. closure: computes the loss and its gradients again, and returns the loss, which is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale, found = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        launches, counters, clipped = self._gather()
        if clipped:
            self._clip(clipped, scale)
        advance(counters, None)
        self._sums = []
        for launch in launches:
            if launch.page is None:
                self._launch(launch, scale, found)
        if self._paging is not None:
            self._paging.run(launches, lambda launch: self._launch(launch, scale, found))
        if found is not None:  # then nothing was changed, and this was no step
            advance(counters, found)
        return loss

    # ---- counts of what was left alone ----

    def nonfinite_count(self) -> int:
        """How many elements were left alone so far because their gradient, new state or direction was NaN or Inf. Waits
        for the device, as nothing else here does."""
        return sum(int(count) for count in self._nonfinite.values())

    def reset_nonfinite_count(self) -> None:
        """Start counting from 0."""
        for count in self._nonfinite.values():
            count.zero_()

    def paged_bytes(self) -> int:
        """How many bytes of the states are in pages; the rest is beside the parameters."""
        return 0 if self._paging is None else self._paging.paged_bytes()

    # ---- persistence ----

    @_disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """The state, as torch's; what is in pages as tensors on the host, which outlive the optimizer."""
        if self._paging is not None:
            self._paging.synchronize()
        return super().state_dict()

    @_disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state: one of this class's `state_dict`, exactly; of torch.optim's optimizer of the same rule, whose
        fp32 states are quantized where this optimizer has 8 bit; or of bitsandbytes, in 8 or 32 bit.

        Options that the file names replace those here, others stay. States keep their dtypes, and are in 8 bit or fp32
        as the groups' options then say. Everything is checked, and converted, before anything here changes.

        Raises:
            ValueError: a newer format, states or groups that do not fit the parameters, options that are not supported.
        """
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            if (replaced := pre_hook(self, state_dict)) is not None:
                state_dict = replaced
        groups = _load.merge_groups(self, state_dict["param_groups"], FORMAT_VERSION)
        for index, group in enumerate(groups):
            self._check_group(group, index)
        paging = None if self._paging is None else self._paging.without_pages()
        state = _load.convert(self, state_dict, groups, paging)
        self._paging = paging
        self.__setstate__({"state": state, "param_groups": groups})
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)


_EMPTY: dict[torch.device, Tensor] = {}


def _dtype(t: Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")

"""`Method` and its registry: the one place that quantize_model, OctavoConfig, files and commands ask for methods.

A method lives in a room of its own and is added by one decorator::

    @register("nf4")
    class NF4(Method):
        title = "QLoRA's 4 bits, arXiv 2305.14314"
        layer = NF4Linear

        @dataclass(frozen=True)
        class Settings(MethodSettings):
            blocksize: int = option(64, "weights that share a scale", choices=(32, 64, 128))

        def quantize_linear(self, linear, settings, kept=None):
            return NF4Linear.from_linear(linear, blocksize=settings.blocksize)

Another package adds one through an entry point of the group ``octavo.methods`` whose object is the class, or the module
that registers it.
"""

from __future__ import annotations

import dataclasses
import difflib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .low_bit import LowBitLinear
from .progress import progress_bar
from .report import LayerReport
from .settings import OPTION
from .settings import MethodSettings as MethodSettings
from .settings import Option as Option
from .settings import about as about
from .settings import option as option
from .targets import Target, replace_each

ENTRY_POINTS = "octavo.methods"
# Commands call a model that no method changes by the first of these names, and accept the others for it.
UNQUANTIZED = ("none", "16bit")


@dataclass(frozen=True)
class Trial:
    """An example on which the contract of every method is tried: see ``tests/python/test_contract.py``.

    Attributes:
        model: makes the model, with at least two `torch.nn.Linear` layers to quantize.
        inputs: makes what it is called with.
        settings: of the method.
        calibration: makes what `octavo.quantize_model` takes as calibration; None for none.
        bound: of the relative error of the model's output.

    Example:
        >>> from octavo.core.method import methods
        >>> trial = methods()["nf4"].trial()
        >>> trial.model()(trial.inputs()).shape
        torch.Size([5, 32])
    """

    model: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    settings: Mapping[str, Any] = field(default_factory=dict)
    calibration: Callable[[], Any] | None = None
    bound: float = 0.1


class Showcase(NamedTuple):
    """One row of `octavo demo` and of ``octavo.bench.quality``: a title, settings and a remark.

    Example:
        >>> from octavo.core.method import Showcase
        >>> Showcase("4 bit", {"blocksize": 128}).note
        ''
    """

    title: str
    settings: Mapping[str, Any]
    note: str = ""


class Method(ABC):
    """How linear layers are quantized, and what is known of the layers that come out.

    Attributes:
        name: the method's; given by `register`.
        title: a phrase of what it is and where it is published.
        Settings: a frozen dataclass, a `MethodSettings`.
        layer: the class of the layers that it makes. It is also what the method is in files; two methods may share it.
        stored: the name that files have for `layer`; by default the method's own.
        aliases: other names of the method, each with the settings that it stands for.
        beside: names in files of other methods whose layers a checkpoint of this one may hold, too.
        widest: the largest in_features of a layer; wider ones are left alone. None for no limit.
        needs_calibration: whether it runs the model on data.
        in_stream: whether one weight is enough to make one layer, so that a checkpoint is quantized while it is read.
            The layer then has a tensor "weight": transformers finds it by the name in the checkpoint.
        for_training: settings of a base for adapters, where they are not given.
        residual: whether adapters on it begin with what quantization lost, unless they are told not to.
        showcase: rows of the demo.

    Example:
        >>> from octavo.core.method import methods
        >>> method = methods()["nf4"]
        >>> method.layer.__name__, method.needs_calibration
        ('NF4Linear', False)
        >>> method.settings({"blocksize": 128}).blocksize
        128
    """

    name: ClassVar[str]
    title: ClassVar[str] = ""
    Settings: ClassVar[type[MethodSettings]]
    layer: ClassVar[type[LowBitLinear]]
    stored: ClassVar[str] = ""
    aliases: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    beside: ClassVar[tuple[str, ...]] = ()
    widest: ClassVar[int | None] = None
    needs_calibration: ClassVar[bool] = False
    in_stream: ClassVar[bool] = False
    for_training: ClassVar[Mapping[str, Any]] = {}
    residual: ClassVar[bool] = False
    showcase: ClassVar[tuple[Showcase, ...]] = ()

    # ---- settings ----------------------------------------------------------------------------------------------------

    def setting_names(self) -> tuple[str, ...]:
        """The names of its settings."""
        return tuple(entry.name for entry in dataclasses.fields(self.Settings))

    def settings(self, given: Mapping[str, Any]) -> Any:
        """The settings of this method with those that are given; None counts as not given.

        Raises:
            ValueError: a setting that the method does not have, or a value that cannot be.
        """
        own, known = self.setting_names(), _switches()
        # None is not given, nor is a switch of another method that is off.
        idle = [n for n, value in given.items() if value is None or (value is False and n not in own and n in known)]
        given = {name: value for name, value in given.items() if name not in idle}
        self.check_names(given)
        return self.Settings(**given)

    def check_names(self, given: Iterable[str], what: str = "setting", known: Sequence[str] | None = None) -> None:
        """ValueError for a name that is not of a setting: the one wording of this mistake."""
        known = self.setting_names() if known is None else known
        if foreign := [name for name in given if name not in known]:
            names = ", ".join(foreign)
            raise ValueError(f"{self.name} has no {what} {names}; it has {', '.join(known) or 'none'}")

    def check_calibration(self, settings: Any, calibration: Any) -> None:
        """ValueError unless there is calibration data where it is needed, and none where it is of no use."""
        if calibration is not None and not self.needs_calibration:
            raise ValueError(f"{self.name} takes no calibration data")
        if calibration is None and self.needs_calibration:
            raise ValueError(
                f"{self.name} needs calibration data: a text of a few hundred kilobytes or more, or batches"
            )

    # ---- quantizing --------------------------------------------------------------------------------------------------

    @abstractmethod
    def quantize_linear(self, linear: nn.Linear, settings: Any, kept: Any = None) -> LowBitLinear:
        """One layer. `kept` is what a method's own `quantize` has learned of it.

        Raises:
            ValueError: weights with NaN or Inf; a method that needs more than one layer.
        """

    def quantize(
        self, model: nn.Module, targets: list[Target], settings: Any, calibration: Any, progress: bool
    ) -> tuple[list[LayerReport], dict[str, str]]:
        """Put quantized layers in the place of `targets`, and say what was done.

        Returns:
            The report's layers, and names of layers that were left alone after all, with the reason.
        """
        with progress_bar("quantizing", len(targets), progress) as done:
            return replace_each(model, targets, done, lambda t: self.quantize_linear(t.linear, settings)), {}

    def quantize_stored(self, weight: Tensor, settings: Any) -> dict[str, Tensor]:
        """The tensors of a layer, of one weight as a checkpoint has it: for methods that are `in_stream`.

        A NaN or Inf of the weight must be in a scale afterwards: the check after loading names the layer.
        """
        raise NotImplementedError(f"{self.name} does not quantize while a checkpoint is read")

    # ---- checkpoints and adapters ------------------------------------------------------------------------------------

    def layout(self, settings: Any) -> dict[str, Any]:
        """The part of the settings that a checkpoint records once for all its layers: fields of the layers'
        configuration, with values."""
        return {name: getattr(settings, name) for name in self.layout_defaults() if hasattr(settings, name)}

    def layout_defaults(self) -> dict[str, Any]:
        """Names and defaults of `layout`: the settings that are fields of the layers' configuration, too."""
        entries = dataclasses.fields(self.Settings)
        return {entry.name: entry.default for entry in entries if entry.name in self.layer.fields}

    def layout_of_all(self) -> tuple[str, ...]:
        """The names of `layout` whose values every layer of a checkpoint must have: by default those that neither the
        layer's tensors nor the configuration of its own can say."""
        return tuple(name for name in self.layout_defaults() if name not in self.layer.read_from({}))

    def check_layout(self, layout: Mapping[str, Any]) -> dict[str, Any]:
        """The layout as it will be used. ValueError unless it can be."""
        return self.layout(self.Settings(**layout))

    def settings_of(self, description: str) -> dict[str, Any] | None:
        """The settings that `LowBitLinear.describe` writes into an adapter; None where it is not of this method."""
        return {} if description == self.layer.stored_as and self.name == self.layer.stored_as else None

    def trial(self) -> Trial:
        """The example of `Trial`."""

        def model() -> nn.Module:
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(64, 96), nn.LayerNorm(96), nn.GELU(), nn.Linear(96, 32, bias=False))

        return Trial(model, lambda: torch.randn(5, 64, generator=torch.Generator().manual_seed(1)))


_Class = TypeVar("_Class", bound=type[Method])
_methods: dict[str, Method] = {}
_pending = True  # entry points are looked for once


def register(name: str) -> Callable[[_Class], _Class]:
    """Add a method to the registry under `name`.

    Raises:
        ValueError: there is a method or alias of this name; one that is `in_stream`, with a layer without "weight".

    Example:
        >>> from octavo.core.method import Method, register
        >>> @register("nf4")
        ... class Mine(Method):
        ...     pass
        Traceback (most recent call last):
        ValueError: there is a method 'nf4' already
    """

    def add(cls: _Class) -> _Class:
        if cls.in_stream and "weight" not in cls.layer.tensors:
            tensors = ", ".join(cls.layer.tensors)
            raise ValueError(f"{name} is in_stream: one tensor of its layer must be called weight, not {tensors}")
        if cls.in_stream and cls.quantize_stored is Method.quantize_stored:
            raise ValueError(f"{name} is in_stream and must write quantize_stored")
        names = (name, *cls.aliases)
        for taken in names:
            known = taken in _methods or any(taken in m.aliases for m in _methods.values())
            if known or taken in (*UNQUANTIZED, "mixed") or names.count(taken) > 1:
                raise ValueError(f"there is a method {taken!r} already")
        settings = getattr(cls, "Settings", None)
        if not (isinstance(settings, type) and issubclass(settings, MethodSettings)):
            raise ValueError(f"{name} must have a class Settings, a MethodSettings, got {settings!r}")
        for entry in dataclasses.fields(settings):
            if OPTION not in entry.metadata or entry.name in ("model", "method", "skip", "calibration", "progress"):
                raise ValueError(f"{name}: the setting {entry.name} must be made by option, and be no argument of all")
        stored = cls.stored or name
        if (taken := cls.layer.__dict__.get("stored_as", "")) not in ("", stored):
            raise ValueError(f"{name}: files call {cls.layer.__name__} {taken!r} already; set stored to that")
        cls.name = name
        cls.stored = stored
        if cls.stored == name:
            cls.layer.stored_as = name
        _methods[name] = cls()
        return cls

    return add


def methods() -> dict[str, Method]:
    """All methods by name: octavo's own, and those of other packages.

    Example:
        >>> from octavo.core.method import methods
        >>> sorted({"int8", "nf4", "spqr"} & methods().keys())
        ['int8', 'nf4', 'spqr']
    """
    global _pending
    if _pending:
        _pending = False
        for entry in metadata.entry_points(group=ENTRY_POINTS):
            try:
                entry.load()
            except Exception as error:  # the other package is at fault, and octavo works without its method
                warnings.warn(f"octavo's method {entry.name} ({entry.value}) cannot be loaded: {error!r}", stacklevel=2)
    return _methods


def method_names(unquantized: bool = False) -> list[str]:
    """Every name that a method may be called by, aliases behind their method; `unquantized` adds "none".

    Example:
        >>> from octavo.core.method import method_names
        >>> "fp4" in method_names(), method_names(unquantized=True)[0]
        (True, 'none')
    """
    names = [n for name, method in methods().items() for n in (name, *method.aliases)]
    return [UNQUANTIZED[0], *names] if unquantized else names


def find_method(name: str, given: Mapping[str, Any] | None = None) -> tuple[Method, dict[str, Any]]:
    """The method that a name or alias stands for, and the settings: given ones, and those of the alias.

    Raises:
        ValueError: an unknown name; a setting that contradicts the alias.

    Example:
        >>> from octavo.core.method import find_method
        >>> method, settings = find_method("fp4", {"blocksize": 128})
        >>> method.name, settings
        ('nf4', {'quant_type': 'fp4', 'blocksize': 128})
    """
    given = dict(given or {})
    if not isinstance(name, str):
        raise ValueError(unknown_method(name))
    for method in methods().values():
        if name == method.name:
            return method, given
        if name in method.aliases:
            fixed = dict(method.aliases[name])
            for key, value in fixed.items():
                if given.get(key) not in (None, value):
                    raise ValueError(f"{name} is {method.name} with {key} {value!r}, got {key}={given[key]!r}")
            return method, {**fixed, **{key: value for key, value in given.items() if key not in fixed}}
    raise ValueError(unknown_method(name))


def unknown_method(name: object, unquantized: bool = False) -> str:
    """The error message for a name that no method has.

    Example:
        >>> from octavo.core.method import unknown_method
        >>> unknown_method("npf4").partition(";")[0]
        "unknown method 'npf4' (did you mean nf4?)"
    """
    known = method_names(unquantized)
    close = difflib.get_close_matches(str(name), known, 1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    return f"unknown method {name!r}{hint}; known: {', '.join(known)}"


def _switches() -> set[str]:
    """The names of settings that are True or False, over all methods."""
    fields = (entry for method in _methods.values() for entry in dataclasses.fields(method.Settings))
    return {entry.name for entry in fields if isinstance(entry.default, bool)}


def is_unquantized(name: str) -> bool:
    """Whether it is a name for a model that stays as it is.

    Example:
        >>> from octavo.core.method import is_unquantized
        >>> is_unquantized("none"), is_unquantized("nf4")
        (True, False)
    """
    return name in UNQUANTIZED


def stored_methods() -> dict[str, type[LowBitLinear]]:
    """The classes of quantized layers by the names that files have for them.

    Example:
        >>> from octavo.core.method import stored_methods
        >>> stored_methods()["nf4"].__name__
        'NF4Linear'
    """
    return {method.name: method.layer for method in methods().values() if method.stored == method.name}


def layer_class(stored: str) -> type[LowBitLinear]:
    """The class of layers that files call `stored`.

    Example:
        >>> from octavo.core.method import layer_class
        >>> layer_class("int8").__name__
        'Int8Linear'
    """
    return stored_methods()[stored]


def method_of(module: nn.Module) -> str | None:
    """The name in files of a quantized layer's method; None for any other module.

    Example:
        >>> import octavo, torch
        >>> from octavo.core.method import method_of
        >>> method_of(octavo.nn.Int8Linear(4, 2)), method_of(torch.nn.Linear(4, 2))
        ('int8', None)
    """
    return module.stored_as if isinstance(module, LowBitLinear) else None


def method_of_description(description: str) -> tuple[Method, dict[str, Any]] | None:
    """Method and settings of what `LowBitLinear.describe` wrote; None where no method knows it.

    Example:
        >>> import octavo, torch
        >>> from octavo.core.method import method_of_description
        >>> method, settings = method_of_description(octavo.nn.Int8Linear(4, 2).describe())
        >>> method.name
        'int8'
    """
    for method in methods().values():
        if (settings := method.settings_of(description)) is not None:
            return method, settings
    return None

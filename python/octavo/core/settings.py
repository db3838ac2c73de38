"""Settings of a method: a frozen dataclass whose fields know their help, choices and option on the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

OPTION = "octavo.option"


class Option(NamedTuple):
    """The description of a setting beside its type and default: see `option`.

    Example:
        >>> from octavo.core.method import about, find_method
        >>> import dataclasses
        >>> method, settings = find_method("nf4")
        >>> about(dataclasses.fields(method.Settings)[0]).metavar
        'TYPE'
    """

    help: str
    choices: tuple[Any, ...] | None
    least: float | None
    most: float | None
    command: str | None
    metavar: str | None
    shown: str | None


def option(
    default: Any,
    help: str,
    *,
    choices: Iterable[Any] | None = None,
    least: float | None = None,
    most: float | None = None,
    command: str | None = "",
    metavar: str | None = None,
    shown: str | None = None,
) -> Any:
    """A field of a method's settings.

    Args:
        default: its value where it is not given.
        help: a phrase, for the command line and the documentation.
        choices: the values that it may have.
        least, most: the range of a number.
        command: its option on the command line, without the dashes: "" for the field's own name, None for no option.
        metavar: what stands for its value in the help.
        shown: what stands for its default in the help.

    Example:
        >>> from dataclasses import dataclass
        >>> from octavo.core.settings import MethodSettings, option
        >>> @dataclass(frozen=True)
        ... class Settings(MethodSettings):
        ...     blocksize: int = option(64, "weights that share a scale", choices=(32, 64))
        >>> Settings(blocksize=48)
        Traceback (most recent call last):
        ValueError: blocksize must be one of 32, 64, got 48
    """
    about = Option(help, None if choices is None else tuple(choices), least, most, command, metavar, shown)
    return field(default=default, metadata={OPTION: about})


def about(entry: dataclasses.Field[Any]) -> Option:
    """The description that `option` stored in a field.

    Example:
        >>> import dataclasses
        >>> from octavo.core.method import about, methods
        >>> about(dataclasses.fields(methods()["int8"].Settings)[0]).help
        "|x| from which an activation's column is multiplied in 16 bit; 0: never; lower: more accurate, slower"
    """
    found: Option = entry.metadata[OPTION]
    return found


@dataclass(frozen=True)
class MethodSettings:
    """The settings of a method: a frozen dataclass whose fields are made by `option`.

    Raises:
        ValueError: a value that the field's choices do not have, or that is not True or False where it must be one.
            Ranges are those of the command line: `check` has the others.

    Example:
        >>> from dataclasses import dataclass
        >>> from octavo.core.settings import MethodSettings, option
        >>> @dataclass(frozen=True)
        ... class Settings(MethodSettings):
        ...     bits: int = option(4, "bits of a code", choices=(2, 4))
        >>> Settings(bits=2).describe()
        'bits 2'
    """

    def __post_init__(self) -> None:
        for entry in dataclasses.fields(self):
            known, value = about(entry), getattr(self, entry.name)
            if value is None and entry.default is None:
                continue
            if isinstance(entry.default, bool) and not isinstance(value, bool):
                raise ValueError(f"{entry.name} must be True or False, got {value!r}")
            if known.choices is not None and not any(
                value is c or (type(value) is type(c) and value == c) for c in known.choices
            ):
                raise ValueError(f"{entry.name} must be one of {', '.join(map(str, known.choices))}, got {value!r}")
        self.check()

    def check(self) -> None:
        """ValueError unless the settings can be, each and together; for a subclass to write."""

    def describe(self) -> str:
        """One line for reports; by default the settings that are not the defaults."""
        changed = [e.name for e in dataclasses.fields(self) if getattr(self, e.name) != e.default]
        return ", ".join(f"{name} {getattr(self, name)}" for name in changed) or "default settings"

    def to_dict(self) -> dict[str, Any]:
        """The settings by name, as values that JSON can hold."""
        return dataclasses.asdict(self)

"""Options of methods on the command line, all of them made from the registry."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..core.method import (
    Method,
    Option,
    about,
    find_method,
    is_unquantized,
    method_names,
    methods,
    unknown_method,
)
from .shared import one_line_errors


def method_option(what: str, unquantized: bool, shown: str | None = None) -> Any:
    """The annotation of ``--method``: names are checked, and its help lists them."""

    def known(name: str | None) -> str | None:
        if name is not None and not (unquantized and is_unquantized(name)) and name not in method_names():
            raise typer.BadParameter(unknown_method(name, unquantized))
        return name

    names = [f"{', '.join((name, *method.aliases))}: {method.title}." for name, method in methods().items()]
    if unquantized:
        names.append("none: as it is stored.")
    help = " ".join((what, *names))
    return Annotated[str | None, typer.Option(callback=known, show_default=shown or True, help=help)]


Calibration = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        show_default=False,
        help=f"{', '.join(n for n, m in methods().items() if m.needs_calibration)}: a text to calibrate on, UTF-8.",
    ),
]


def flag_of(name: str, entry: Option) -> str:
    """The option of a setting, as it is typed."""
    return "--" + (entry.command or name).replace("_", "-")


def method_options(
    *, without: Sequence[str] = (), training: bool = False, method_from_adapter: bool = False
) -> Callable[[Any], Any]:
    """Give a command an option for every setting of every method, and the given ones in its argument `settings`.

    A setting that the chosen method does not have is an error in one line, a value that it cannot have wrong usage. The
    method is the command's argument `method`.

    Args:
        without: settings whose names the command uses for something else.
        training: show the defaults of bases to train on.
        method_from_adapter: without a method the command finds one, and checks the settings itself.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        taken = {*without, *inspect.signature(command).parameters}
        options = {name: entries for name, entries in _settings().items() if name not in taken}

        @functools.wraps(command)
        def wrapped(**arguments: Any) -> Any:
            off = {name for name in options if arguments.pop(_off(name), False)}
            given = {name: value for name in options if (value := arguments.pop(name)) is not None}
            if both := off & given.keys():
                flags = ", ".join(flag_of(name, about(options[name][0][1])) for name in both)
                raise typer.BadParameter("given both on and off", param_hint=flags)
            given |= dict.fromkeys(off, False)
            if arguments.get("method") is not None or not method_from_adapter:
                with one_line_errors():
                    check_settings(arguments.get("method"), given)
            return command(**arguments, settings=given)

        signature = inspect.signature(command, eval_str=True)
        kept = [parameter for name, parameter in signature.parameters.items() if name != "settings"]
        added = [p for name, entries in options.items() for p in _parameters(name, entries, training)]
        at = next(i for i, parameter in enumerate(kept) if parameter.name == "method") + 1
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*kept[:at], *added, *kept[at:])]
        wrapped.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        wrapped.__annotations__ = {}
        return wrapped

    return decorate


def check_settings(name: str | None, given: Mapping[str, Any]) -> None:
    """Check what was given on the command line.

    Raises:
        ValueError: a setting that the method does not have, or any without a method.
        typer.BadParameter: a value that it cannot have.
    """
    if not given:
        return
    flags = {key: flag_of(key, about(entries[0][1])) for key, entries in _settings().items() if key in given}
    if name is None or is_unquantized(name):
        raise ValueError(f"{', '.join(flags.values())}: settings of a method: give --method, too")
    method, settings = find_method(name, given)
    foreign = [flags[key] for key in given if key not in method.setting_names()]
    try:
        method.check_names(given)
    except ValueError as error:
        having = dict.fromkeys(m.name for key in given for m, _ in _settings()[key])
        raise ValueError(
            f"{', '.join(foreign)}: {error}; {', '.join(flags.values())}: for {', '.join(having)}"
        ) from None
    try:
        method.settings(settings)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=", ".join(flags.values())) from None


def options_of(name: str, settings: Mapping[str, Any]) -> list[str]:
    """The words that give a method these settings on the command line, without those that its name stands for."""
    method, _ = find_method(name)
    words: list[str] = []
    for entry in dataclasses.fields(method.Settings):
        known, value = about(entry), settings.get(entry.name)
        if value is None or known.command is None or entry.name in method.aliases.get(name, {}):
            continue
        flag = flag_of(entry.name, known)
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag.removeprefix('--')}")
        else:
            words += [flag, str(value)]
    return words


@functools.cache
def _settings() -> dict[str, list[tuple[Method, dataclasses.Field[Any]]]]:
    """Every setting that is an option, with the methods that have it."""
    found: dict[str, list[tuple[Method, dataclasses.Field[Any]]]] = {}
    for method in methods().values():
        for entry in dataclasses.fields(method.Settings):
            if about(entry).command is not None:
                found.setdefault(entry.name, []).append((method, entry))
    return found


def _type_of(method: Method, name: str) -> type:
    """The type of a setting's values on the command line."""
    hint = typing.get_type_hints(method.Settings)[name]
    kinds = [kind for kind in typing.get_args(hint) or (hint,) if kind is not type(None)]
    if any(isinstance(kind, type) and issubclass(kind, os.PathLike) for kind in map(_origin, kinds)):
        return Path
    return typing.cast(type, kinds[0])


def _origin(kind: Any) -> Any:
    return typing.get_origin(kind) or kind


def _off(name: str) -> str:
    return f"no_{name}"


def _parameters(
    name: str, entries: list[tuple[Method, dataclasses.Field[Any]]], training: bool
) -> list[inspect.Parameter]:
    """The option of a setting; of a switch also the hidden one that turns it off, for which the help has no room."""
    by_help: dict[str, list[str]] = {}
    for method, entry in entries:
        by_help.setdefault(about(entry).help, []).append(method.name)
    help = " ".join(f"{', '.join(names)}: {text}." for text, names in by_help.items())
    first, entry = entries[0]
    known, kind = about(entry), _type_of(first, name)
    default = first.for_training.get(name, entry.default) if training else entry.default
    flag = flag_of(name, known)
    shown: Any = known.shown or (False if default is None else str(default))
    if kind is bool:
        shown = "on" if default else "off"
    range_of: dict[str, Any] = {}
    if kind in (int, float):  # where methods differ, the widest range; the method's own settings check their value
        least, most = ([getattr(about(e), end) for _, e in entries] for end in ("least", "most"))
        range_of = {"min": None if None in least else min(least), "max": None if None in most else max(most)}
    made = []
    if kind is bool:
        off = f"--no-{flag.removeprefix('--')}"
        help += f" {off} is its opposite."
        made.append(_keyword(_off(name), bool, False, typer.Option(off, hidden=True)))
    described = typer.Option(flag, help=help, show_default=shown, metavar=known.metavar, **range_of)
    return [_keyword(name, kind | None, None, described), *made]


def _keyword(name: str, kind: Any, default: Any, option: Any) -> inspect.Parameter:
    annotation = Annotated[kind, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)

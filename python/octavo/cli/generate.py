"""`octavo generate`: a model in 4, 8 or 16 bit answers, with LoRA adapters on it."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from .. import models
from ..core.method import UNQUANTIZED, method_of_description
from ..lora import adapters
from ..lora.linear import check_adapter_name
from ..lora.peft_format import FILES, read_config, read_quantization
from .app import app
from .options import Calibration, check_settings, method_option, method_options
from .shared import DTYPES, SOURCE_HELP, Threads, console, known_dtype, one_line_errors

_BARE = "none"  # the adapter that is none: the base alone


@app.command()
@method_options(without=("context", "samples", "resume"), training=True, method_from_adapter=True)
def generate(
    base: Annotated[str, typer.Argument(metavar="BASE", show_default=False, help=SOURCE_HELP)],
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]DIR",
            show_default=False,
            help="A LoRA adapter in PEFT's format: a directory, or OWNER/NAME on the hub. Repeatable: each answers in "
            "turn, on the same base. none: the base alone.",
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(show_default="read from standard input, line by line on a terminal", help="What to continue."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="The most tokens of an answer.")] = 200,
    method: method_option(  # type: ignore[valid-type]
        "Quantize BASE while loading.", unquantized=True, shown="what the adapter was trained on, or else none"
    ) = None,
    calibration: Calibration = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a user's message: use the model's chat template.")
    ] = False,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0: always the likeliest token. Higher: more at random.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the random choices.")] = 0,
    dtype: Annotated[
        str,
        typer.Option(callback=known_dtype, help="auto (as stored), fp32, bf16 or fp16, of what is not quantized."),
    ] = "auto",
    threads: Threads = None,
    settings: dict[str, Any] | None = None,
) -> None:
    """Let BASE answer, with one or several LoRA adapters on it.

    BASE is loaded once, in 4, 8 or 16 bit: without --method as the first adapter says that its base was, where octavo
    wrote it. Adapters switch without reloading or changing it. On a terminal without --prompt, every line is a
    prompt; `/adapter NAME` switches, `/adapter none` is the base alone, `/quit` ends it.

    ```sh
    octavo generate ./Llama-3.1-8B --adapter ./my-adapter --method int8 --prompt "Dear reader," --max-tokens 100
    octavo generate ./Llama-3.1-8B-int8 --adapter polite=./a --adapter terse=./b --chat --prompt "What is a quarto?"
    octavo generate smollm2 --chat
    ```
    """
    with one_line_errors():
        wanted = _parse(adapter or ())
        _check_files(wanted)  # before the base, which takes long to load
        session = _Session(
            base, method, DTYPES[dtype], wanted, chat, max_tokens, temperature, seed, settings or {}, calibration
        )
        if prompt is None and sys.stdin.isatty():
            session.converse()
            return
        text = sys.stdin.read() if prompt is None else prompt
        if not text.strip():
            raise ValueError("the prompt is empty: give --prompt, or text on standard input")
        for name in session.names:
            if len(session.names) > 1:
                console().print(f"[bold]{escape(name)}[/bold]")
            session.answer(text, name)


def _parse(entries: Sequence[str]) -> dict[str, Path | None]:
    """Adapters by name; None for the base alone."""
    found: dict[str, Path | None] = {}
    for entry in entries:
        name, equals, place = entry.partition("=")
        if not equals or Path(entry).exists():
            name, place = "", entry
        if entry == _BARE and not Path(entry).exists():
            directory, name = None, _BARE
        else:
            directory = _directory(place)
            name = name or re.sub(r"[^A-Za-z0-9_-]", "_", Path(place).resolve().name)
            if name == _BARE:
                raise ValueError(f"--adapter {entry}: {_BARE} is the base alone; give another name by NAME={place}")
        if name in found:
            raise ValueError(
                f"--adapter {entry}: there is an adapter {name} already; give another name by NAME={place}"
            )
        found[name] = directory
    return found


def _directory(place: str) -> Path:
    """A path wins; OWNER/NAME is taken from the hub's cache, or downloaded into it."""
    owner, _, repository = place.partition("/")
    if Path(place).exists() or not owner.strip(".~") or not repository or "/" in repository:
        return Path(place)
    try:
        import huggingface_hub

        return Path(huggingface_hub.snapshot_download(place, allow_patterns=[*FILES, "adapter_model.bin"]))
    except Exception as error:  # several packages raise errors here: no network, no such name, no permission
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise models.ModelError(f"--adapter {place} is no path, and the hub does not give it: {reason}") from error


def _check_files(wanted: dict[str, Path | None]) -> None:
    for name, directory in wanted.items():
        if directory is not None:
            check_adapter_name(name)
            read_config(directory)


class _Session:
    """A model with its adapters, loaded."""

    def __init__(
        self,
        base: str,
        method: str | None,
        dtype: str | None,
        wanted: dict[str, Path | None],
        chat: bool,
        max_tokens: int,
        temperature: float,
        seed: int,
        settings: Mapping[str, Any] | None = None,
        calibration: Path | None = None,
    ) -> None:
        import torch

        source = models.resolve(base)
        self.tokenizer = models.load_tokenizer(source)
        self.chat, self.max_tokens, self.temperature, self.seed = chat, max_tokens, temperature, seed
        if chat and not self.tokenizer.chat_template:
            raise ValueError(f"--chat: the tokenizer of {base} has no chat template")
        trained_on = {name: read_quantization(path) for name, path in wanted.items() if path is not None}
        if method is None:
            method, recorded = _method_of(next(iter(trained_on.values()), None), source, calibration)
            settings = {**recorded, **(settings or {})}
            check_settings(method, settings)
        of_torch = None if dtype is None else getattr(torch, dtype)
        how: dict[str, Any] = {"calibration": calibration, "tokenizer": self.tokenizer, **(settings or {})}
        self.model = models.load_base(source, method, of_torch, **how)
        for name, directory in wanted.items():
            if directory is not None:
                adapters.load_adapter(self.model, directory, name)
                base_now = adapters.base_quantization(self.model, name)
                if trained_on[name] not in (None, base_now):
                    message = (
                        f"warning: adapter {name} was trained on a base whose quantization is {trained_on[name]}; here "
                        f"it is {base_now}: answers may be worse"
                    )
                    console(stderr=True).print(message, soft_wrap=True, markup=False, highlight=False)
        self.names = list(wanted) or [_BARE]
        self.switch(self.names[0])

    def switch(self, name: str) -> None:
        known = adapters.list_adapters(self.model)
        if name != _BARE and name not in known:
            raise ValueError(f"there is no adapter {name}; known: {', '.join((*known, _BARE))}")
        if known:
            adapters.set_adapter(self.model, None if name == _BARE else name)
        self.active = name

    def answer(self, text: str, name: str) -> None:
        """Print what the model says, token by token."""
        import torch
        from transformers import TextStreamer

        self.switch(name)
        if self.chat:
            turn = [{"role": "user", "content": text}]
            ids = self.tokenizer.apply_chat_template(
                turn, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )["input_ids"]
        else:
            ids = self.tokenizer(text, return_tensors="pt").input_ids
        positions = getattr(self.model.config, "max_position_embeddings", None)
        if positions is not None and ids.shape[1] >= positions:
            raise ValueError(f"the prompt has {ids.shape[1]} tokens, the model {positions} positions")
        room = self.max_tokens if positions is None else min(self.max_tokens, positions - ids.shape[1])
        how: dict[str, Any] = {"do_sample": self.temperature > 0.0}
        if self.temperature:
            torch.manual_seed(self.seed)
            how["temperature"] = self.temperature
        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        ids = ids.to(self.model.device)
        with torch.inference_mode():
            self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=room, streamer=streamer, **how)

    def converse(self) -> None:
        """Prompts from a terminal, until its end."""
        console(stderr=True).print(f"adapters: {', '.join(self.names)}; /adapter NAME switches, /quit ends")
        while True:
            try:
                line = input(f"{self.active}> ").strip()
            except (EOFError, KeyboardInterrupt):
                return
            command, _, rest = line.partition(" ")
            try:
                if command == "/quit":
                    return
                if command == "/adapter":
                    self.switch(rest.strip())
                elif line:
                    self.answer(line, self.active)
            except ValueError as error:
                console(stderr=True).print(escape(str(error)))


def _method_of(recorded: str | None, source: Any, calibration: Path | None) -> tuple[str, dict[str, Any]]:
    """Method and settings of a base that an adapter's file describes.

    It is "none" for a base that is quantized already, or whose method needs calibration data that was not given.
    """
    found = None if recorded is None or source.quantization is not None else method_of_description(recorded)
    if found is None or (found[0].needs_calibration and calibration is None):
        return UNQUANTIZED[0], {}
    return found[0].name, found[1]

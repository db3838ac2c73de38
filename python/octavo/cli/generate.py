"""`octavo generate`: a model in 4, 8 or 16 bit answers, with LoRA adapters on it."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from .app import _DTYPES, _SOURCE_HELP, Threads, _console, _known_dtype, _one_line_errors, app

_BARE = "none"  # the adapter that is none: the base alone
_METHODS = ("none", "int8", "nf4", "fp4")
_4BIT = ("nf4", "fp4")
_DOUBLE = " double_quant"  # as octavo.adapters.base_quantization has it


def _known_method(name: str | None) -> str | None:
    if name is not None and name not in _METHODS:
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(_METHODS)}")
    return name


@app.command()
def generate(
    base: Annotated[str, typer.Argument(metavar="BASE", show_default=False, help=_SOURCE_HELP)],
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
    method: Annotated[
        str | None,
        typer.Option(
            callback=_known_method,
            show_default="what the adapter was trained on, or else none",
            help="Quantize BASE while loading: int8, nf4, fp4. none: as it is stored.",
        ),
    ] = None,
    double_quant: Annotated[
        bool | None,
        typer.Option(
            "--double-quant/--no-double-quant",
            show_default="on",
            help="nf4, fp4: the scales in 8 bits, too, as octavo finetune has them.",
        ),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a user's message: use the model's chat template.")
    ] = False,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0: always the likeliest token. Higher: more at random.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the random choices.")] = 0,
    dtype: Annotated[
        str,
        typer.Option(callback=_known_dtype, help="auto (as stored), fp32, bf16 or fp16, of what is not quantized."),
    ] = "auto",
    threads: Threads = None,
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
    with _one_line_errors():
        wanted = _parse(adapter or ())
        if double_quant is not None and method not in (None, *_4BIT):
            raise ValueError(f"--double-quant is of methods nf4 and fp4, not of {method}")
        _check_files(wanted)  # before the base, which takes long to load
        session = _Session(base, method, _DTYPES[dtype], wanted, chat, max_tokens, temperature, seed, double_quant)
        if prompt is None and sys.stdin.isatty():
            session.converse()
            return
        text = sys.stdin.read() if prompt is None else prompt
        if not text.strip():
            raise ValueError("the prompt is empty: give --prompt, or text on standard input")
        for name in session.names:
            if len(session.names) > 1:
                _console().print(f"[bold]{escape(name)}[/bold]")
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
    from .. import models
    from .._peft_format import FILES

    owner, _, repository = place.partition("/")
    if Path(place).exists() or not owner.strip(".~") or not repository or "/" in repository:
        return Path(place)
    try:
        import huggingface_hub

        return Path(huggingface_hub.snapshot_download(place, allow_patterns=[*FILES, "adapter_model.bin"]))
    except Exception as error:  # of several packages: no network, no such name, no permission
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise models.ModelError(f"--adapter {place} is no path, and the hub does not give it: {reason}") from error


def _check_files(wanted: dict[str, Path | None]) -> None:
    from .._peft_format import read_config
    from ..nn_lora import check_adapter_name

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
        double_quant: bool | None = None,
    ) -> None:
        import torch

        from .. import adapters, models
        from .._peft_format import read_quantization

        source = models.resolve(base)
        self.tokenizer = models.load_tokenizer(source)
        self.chat, self.max_tokens, self.temperature, self.seed = chat, max_tokens, temperature, seed
        if chat and not self.tokenizer.chat_template:
            raise ValueError(f"--chat: the tokenizer of {base} has no chat template")
        trained_on = {name: read_quantization(path) for name, path in wanted.items() if path is not None}
        if method is None:
            method, recorded = _method_of(next(iter(trained_on.values()), None), source)
            if double_quant is None:
                double_quant = recorded
            elif method not in _4BIT:
                raise ValueError("--double-quant is of methods nf4 and fp4: give --method nf4 or fp4")
        self.model = load_base(source, method, None if dtype is None else getattr(torch, dtype), double_quant)
        for name, directory in wanted.items():
            if directory is not None:
                adapters.load_adapter(self.model, directory, name)
                base_now = adapters.base_quantization(self.model, name)
                if trained_on[name] not in (None, base_now):
                    message = (
                        f"warning: adapter {name} was trained on a base whose quantization is {trained_on[name]}; here "
                        f"it is {base_now}: answers may be worse"
                    )
                    _console(stderr=True).print(message, soft_wrap=True, markup=False, highlight=False)
        self.names = list(wanted) or [_BARE]
        self.switch(self.names[0])

    def switch(self, name: str) -> None:
        from .. import adapters

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
        _console(stderr=True).print(f"adapters: {', '.join(self.names)}; /adapter NAME switches, /quit ends")
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
                _console(stderr=True).print(escape(str(error)))


def _method_of(recorded: str | None, source: Any) -> tuple[str, bool | None]:
    """Method and double_quant of a base that `octavo.adapters.base_quantization` describes; "none" for one that is
    quantized already, or not by options of this command."""
    if recorded is None or source.quantization is not None:
        return "none", None
    name = recorded.removesuffix(_DOUBLE)
    if name in _4BIT:
        return name, recorded != name
    return (recorded if recorded in _METHODS else "none"), None


def load_base(source: Any, method: str, dtype: Any = None, double_quant: bool | None = None) -> Any:
    """The causal language model at `source` (`octavo.models.resolve`), quantized by `method` unless that is "none".

    It is the base that `octavo.finetune` trains on, if `dtype` is the same. For int8, a transformers directory is
    quantized tensor by tensor while it is read.

    Args:
        source: of the model.
        method: "none", "int8", "nf4" or "fp4".
        dtype: of what is not quantized; None for the one that it is stored in.
        double_quant: of nf4 and fp4: quantize the scales, too; None: yes.

    Raises:
        ModelError: it cannot be read, or is quantized already and `method` is not "none".
    """
    from .. import models
    from ..integrations.transformers import OctavoConfig
    from ..quantize import quantize_model

    if method == "none":
        return models.load_model(source, dtype)
    if source.quantization is not None:
        made = f"{source.path} is quantized already ({source.quantization})"
        raise models.ModelError(f"{made}; leave --method out, or give the model that it was made from")
    if method == "int8" and source.kind == "transformers":
        return models.load_model(source, dtype, OctavoConfig(method))
    model = models.load_model(source, dtype)
    if method in _4BIT:
        quantize_model(model, "nf4", progress=False, quant_type=method, double_quant=double_quant is not False)
    else:
        quantize_model(model, method, progress=False)
    return model

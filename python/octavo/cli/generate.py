"""`octavo generate`: a model in 4, 8 or 16 bit answers, with LoRA adapters on it."""

from __future__ import annotations

import io
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from rich.markup import escape

from .. import models
from ..core.method import UNQUANTIZED, method_of_description
from ..lora import adapters
from ..lora.linear import check_adapter_name
from ..lora.peft_format import FILES, read_config, read_quantization
from .app import app
from .options import Calibration, check_settings, method_option, method_options
from .shared import SOURCE_HELP, AsJson, Dtype, Quiet, Threads, console, one_line_errors, print_json, say, torch_dtype

_BARE = "none"  # the adapter that is none: the base alone
# Options that `generate` and `chat` share.
_Method = method_option(
    "Quantize the model while it is loaded.", unquantized=True, shown="what the adapter was trained on, or else none"
)
_Temperature = Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token. Higher: more at random.")]
_Seed = Annotated[int, typer.Option(help="Of the random choices.")]
_MaxTokens = Annotated[int, typer.Option(min=1, metavar="N", help="The most tokens of an answer.")]


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
    max_tokens: _MaxTokens = 200,
    method: _Method = None,  # type: ignore[valid-type]
    calibration: Calibration = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a user's message: use the model's chat template.")
    ] = False,
    temperature: _Temperature = 0.0,
    seed: _Seed = 0,
    dtype: Dtype = "auto",
    as_json: AsJson = False,
    quiet: Quiet = False,
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
    with one_line_errors(quiet):
        session = _Session(base, method, dtype, adapter, chat, max_tokens, temperature, seed, settings, calibration)
        if prompt is None and _readable_input().isatty():
            session.converse()
            return
        text = _readable_input().read() if prompt is None else prompt
        if not text.strip():
            raise ValueError("the prompt is empty: give --prompt, or text on standard input")
        answers = []
        for name in session.names:
            if len(session.names) > 1 and not as_json:
                console().print(f"[bold]{escape(name)}[/bold]")
            begin = time.perf_counter()
            answer, count = session.answer(text, name, show=not as_json)
            seconds = time.perf_counter() - begin
            answers.append({"adapter": name, "prompt": text, "answer": answer, "tokens": count, "seconds": seconds})
    if as_json:
        print_json(answers)


@app.command()
@method_options(without=("context", "samples", "resume"), training=True, method_from_adapter=True)
def chat(
    model: Annotated[str, typer.Argument(metavar="MODEL", show_default=False, help=SOURCE_HELP)],
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]DIR", show_default=False, help="A LoRA adapter, as of octavo generate."),
    ] = None,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", show_default="the model's own", help="What the model is told first.")
    ] = None,
    max_tokens: _MaxTokens = 512,
    method: _Method = None,  # type: ignore[valid-type]
    calibration: Calibration = None,
    temperature: _Temperature = 0.0,
    seed: _Seed = 0,
    dtype: Dtype = "auto",
    quiet: Quiet = False,
    threads: Threads = None,
    settings: dict[str, Any] | None = None,
) -> None:
    """A conversation with MODEL, which remembers what was said.

    Answers appear as they are made; Ctrl-C stops an answer, and not the program. `/exit` or Ctrl-D ends it, `/clear`
    forgets everything, `/adapter NAME` switches, `/help` says so. From a pipe, every line is a message.

    ```sh
    octavo chat smollm2
    octavo chat ./Llama-3.1-8B --method nf4 --adapter ./my-adapter --system "Answer in one sentence."
    ```
    """
    with one_line_errors(quiet):
        session = _Session(model, method, dtype, adapter, True, max_tokens, temperature, seed, settings, calibration)
        session.remember(system)
        session.converse(greet=not quiet)


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
        dtype: str,
        adapter: Sequence[str] | None,
        chat: bool,
        max_tokens: int,
        temperature: float,
        seed: int,
        settings: Mapping[str, Any] | None = None,
        calibration: Path | None = None,
    ) -> None:

        wanted = _parse(adapter or ())
        _check_files(wanted)  # before the base, which takes long to load
        source = models.resolve(base)
        self.tokenizer = models.load_tokenizer(source)
        self.chat, self.max_tokens, self.temperature, self.seed = chat, max_tokens, temperature, seed
        if chat and not self.tokenizer.chat_template:
            raise ValueError(f"the tokenizer of {base} has no chat template; octavo generate continues a text")
        trained_on = {name: read_quantization(path) for name, path in wanted.items() if path is not None}
        if method is None:
            method, recorded = _method_of(next(iter(trained_on.values()), None), source, calibration)
            settings = {**recorded, **(settings or {})}
            check_settings(method, settings)
        how: dict[str, Any] = {"calibration": calibration, "tokenizer": self.tokenizer, **(settings or {})}
        self.model = models.load_base(source, method, torch_dtype(dtype), **how)
        for name, directory in wanted.items():
            if directory is not None:
                adapters.load_adapter(self.model, directory, name)
                base_now = adapters.base_quantization(self.model, name)
                if trained_on[name] not in (None, base_now):
                    message = (
                        f"warning: adapter {name} was trained on a base whose quantization is {trained_on[name]}; here "
                        f"it is {base_now}: answers may be worse"
                    )
                    say(console(stderr=True), message)
        self.said: list[dict[str, str]] | None = None  # only a conversation remembers
        self.system: list[dict[str, str]] = []
        self.names = list(wanted) or [_BARE]
        self.switch(self.names[0])

    def switch(self, name: str) -> None:
        known = adapters.list_adapters(self.model)
        if name != _BARE and name not in known:
            raise ValueError(f"there is no adapter {name}; known: {', '.join((*known, _BARE))}")
        if known:
            adapters.set_adapter(self.model, None if name == _BARE else name)
        self.active = name

    def remember(self, system: str | None) -> None:
        """From here on what was said stays in mind."""
        self.system = [] if system is None else [{"role": "system", "content": system}]
        self.said = [*self.system]

    def answer(self, text: str, name: str, show: bool = True) -> tuple[str, int]:
        """What the model says, printed token by token if `show`, and its count of tokens. Ctrl-C ends it early, in a
        conversation, and what was said until then is remembered."""
        import torch
        from transformers import TextStreamer

        self.switch(name)
        turn = [*(self.said or ()), {"role": "user", "content": text}]
        if self.chat:
            ids = self.tokenizer.apply_chat_template(
                turn, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )["input_ids"]
        else:
            ids = self.tokenizer(text, return_tensors="pt").input_ids
        positions = getattr(self.model.config, "max_position_embeddings", None)
        if positions is not None and ids.shape[1] >= positions:
            hint = "; /clear forgets what was said" if self.said is not None else ""
            raise ValueError(f"the prompt has {ids.shape[1]} tokens, the model {positions} positions{hint}")
        room = self.max_tokens if positions is None else min(self.max_tokens, positions - ids.shape[1])
        how: dict[str, Any] = {"do_sample": self.temperature > 0.0}
        if self.temperature:
            torch.manual_seed(self.seed)
            how["temperature"] = self.temperature
        made: list[int] = []
        wrap = _Wrap(console().width) if sys.stdout.isatty() else str

        class Streamer(TextStreamer):  # type: ignore[misc]
            """Keeps what it is given, and prints words as soon as they are whole."""

            def put(self, value: Any) -> None:
                if not self.next_tokens_are_prompt:
                    made.extend(value.flatten().tolist())
                super().put(value)

            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                if show:
                    super().on_finalized_text(wrap(text), stream_end)

        streamer = Streamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        ids = ids.to(self.model.device)
        try:
            with torch.inference_mode():
                mask = torch.ones_like(ids)
                self.model.generate(ids, attention_mask=mask, max_new_tokens=room, streamer=streamer, **how)
        except KeyboardInterrupt:
            if self.said is None:
                raise
            streamer.end()
        answer = str(self.tokenizer.decode(made, skip_special_tokens=True)).strip()
        if self.said is not None and answer:
            self.said = [*turn, {"role": "assistant", "content": answer}]
        return answer, len(made)

    def converse(self, greet: bool = True) -> None:
        """Prompts from a terminal, or lines from a pipe, until their end."""
        terminal = _readable_input().isatty()
        hints = ["/adapter NAME switches" if len(self.names) > 1 or self.names != [_BARE] else "", "/exit ends"]
        if self.said is not None:
            hints.insert(0, "Ctrl-C stops an answer, /clear forgets")
        help = ", ".join(hint for hint in hints if hint)
        if greet and terminal:
            say(console(stderr=True), f"{', '.join(self.names)}: {help}" if self.names != [_BARE] else help)
        while True:
            try:
                line = input(f"{self.active}> " if self.names != [_BARE] else "> ") if terminal else _next_line()
            except EOFError:
                return
            except KeyboardInterrupt:
                if self.said is None:
                    return
                print(file=sys.stderr)
                continue
            line = line.strip()
            command, _, rest = line.partition(" ")
            try:
                if command in ("/quit", "/exit"):
                    return
                if command == "/help":
                    say(console(stderr=True), help)
                elif command == "/clear" and self.said is not None:
                    self.said = [*self.system]
                elif command == "/adapter":
                    self.switch(rest.strip())
                elif re.fullmatch(r"/[a-z]+", command):
                    raise ValueError(f"there is no {command}: {help}")
                elif line:
                    if not terminal:
                        print(f"> {line}")
                    self.answer(line, self.active)
            except ValueError as error:
                say(console(stderr=True), str(error))
            except KeyboardInterrupt:  # before the answer began
                if self.said is None:
                    raise
                print(file=sys.stderr)


def _readable_input() -> TextIO:
    """Standard input; what is not text in it is replaced, and one that is closed is empty."""
    if sys.stdin is None:
        return io.StringIO()
    if isinstance(sys.stdin, io.TextIOWrapper) and sys.stdin.errors != "replace":  # once, before the first read
        sys.stdin.reconfigure(errors="replace")
    return sys.stdin


class _Wrap:
    """Breaks lines between words, for a terminal, in text that comes in pieces which end between words."""

    def __init__(self, width: int) -> None:
        self.width, self.column = width, 0

    def __call__(self, text: str) -> str:
        made, space = "", ""
        for piece in re.findall(r"\n|[^\S\n]+|\S+", text):
            if piece == "\n":
                made, space, self.column = made + piece, "", 0
            elif piece.isspace():
                space += piece
            elif self.column and self.column + len(space) + len(piece) > self.width:
                made, space, self.column = f"{made}\n{piece}", "", len(piece)
            else:
                made, self.column, space = made + space + piece, self.column + len(space) + len(piece), ""
        self.column += len(space)
        return made + space


def _next_line() -> str:
    line = _readable_input().readline()
    if not line:
        raise EOFError
    return line


def _method_of(recorded: str | None, source: Any, calibration: Path | None) -> tuple[str, dict[str, Any]]:
    """Method and settings of a base that an adapter's file describes.

    It is "none" for a base that is quantized already, or whose method needs calibration data that was not given.
    """
    found = None if recorded is None or source.quantization is not None else method_of_description(recorded)
    if found is None or (found[0].needs_calibration and calibration is None):
        return UNQUANTIZED[0], {}
    return found[0].name, found[1]

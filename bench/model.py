"""Whole language models: prefill and decode in bf16, with octavo's layers and with a peer's, on the same tokens."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from octavo import models, quantize_model
from octavo.models import evaluate
from octavo.models.texts import prose
from rich.console import Console
from torch import Tensor

from . import cases, common, int8, limits
from .common import Call, Record, Row
from .int8 import THRESHOLD, Setting

# LLaMA's architecture in the sizes of TinyLlama-1.1B: 1,100,048,384 parameters, the head not tied to the embedding.
LLAMA_1B = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}


@dataclass(frozen=True)
class Work:
    """Token counts: `prefill` at once; `decode` one by one after a prompt of `prompt`."""

    prefill: int = 512
    prompt: int = 64
    decode: int = 32


FULL = Work()
QUICK = Work(prefill=256, decode=8)


@dataclass(frozen=True)
class Subject:
    """An unquantized model in bf16, and token ids, as many as the longest prefill, to run it on."""

    network: Any
    ids: Tensor

    @property
    def parameters(self) -> int:
        """A head tied to its embedding counts once."""
        return sum(parameter.numel() for parameter in self.network.parameters())


@dataclass(kw_only=True)
class ModelRow(Row):
    """One contender on one model. shape is (tokens,); error is of the logits after the prefill, relative to bf16's."""

    model: str
    parameters: int
    prompt: int  # tokens in the cache before the first
    weight_bytes: int  # of all parameters and buffers
    tokens_per_s: float

    @property
    def case(self) -> str:
        tokens = f"{self.shape[0]} tokens" + (f" after {self.prompt}" if self.prompt else "")
        return f"{self.model} ({self.parameters:,} parameters), {self.section} of {tokens}, threads={self.threads}"


# ---- subjects ------------------------------------------------------------------------------------------------------


def smollm2(device: str) -> Subject:
    """SmolLM2-135M-Instruct on a chapter of Python's language reference: trained, with outliers of its own."""
    source = models.smollm2()
    network = models.load_model(source, torch.bfloat16).to(device)
    ids = models.load_tokenizer(source)(prose(("execmodel",)), add_special_tokens=False).input_ids
    return Subject(network, torch.tensor(ids[: FULL.prefill], device=device))


def random_llama(device: str, sizes: Mapping[str, int] = LLAMA_1B) -> Subject:
    """A Llama that nobody trained, on random tokens.

    Seven columns of every normalized input are outliers, as in trained models: their norm weights are 16. The standard
    deviation of 0.01 keeps the inputs of down_proj and o_proj below the threshold.
    """
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**sizes, initializer_range=0.01, pad_token_id=None)
    network = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    columns = torch.randperm(config.hidden_size)[: cases.OUTLIER_COLUMNS]
    with torch.no_grad():
        for layer in network.model.layers:
            layer.input_layernorm.weight[columns] = 16.0
            layer.post_attention_layernorm.weight[columns] = 16.0
    ids = torch.randint(config.vocab_size, (FULL.prefill,))
    return Subject(network.to(device), ids.to(device))


SUBJECTS: dict[str, Callable[[str], Subject]] = {"SmolLM2-135M-Instruct": smollm2, "Llama 1.1B, random": random_llama}


# ---- contenders ----------------------------------------------------------------------------------------------------


def sharing(network: Any) -> Any:
    """A copy whose parameters and buffers are those of `network`: what is not replaced takes no memory twice."""
    return copy.deepcopy(network, {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())})


def octavo_layers(threshold: float) -> Callable[[Any], object]:
    return functools.partial(quantize_model, threshold=threshold, progress=False)


def bitsandbytes_layers(network: Any) -> None:
    """The layers that octavo quantizes; LLaMA's have no bias."""
    for name, module in list(network.named_modules()):
        if type(module) is torch.nn.Linear and name != "lm_head":
            network.set_submodule(name, int8.bitsandbytes_layer(module.weight.detach(), THRESHOLD))


REFERENCE = "torch bf16"
DEFAULT = "octavo t=6"
# What turns a copy of the model into the contender, in place, and the contender that its time is divided by.
METHODS: dict[str, tuple[Callable[[Any], object] | None, str | None]] = {
    REFERENCE: (None, DEFAULT),
    "octavo t=0": (octavo_layers(0.0), DEFAULT),
    DEFAULT: (octavo_layers(THRESHOLD), None),
    "bitsandbytes t=6": (bitsandbytes_layers, DEFAULT),
}


def prepare(subject: Subject, skipped: dict[str, str]) -> dict[str, Any]:
    """Each contender's model, which has run once; one that cannot take part says why in `skipped`."""
    networks = {}
    for name, (apply, _) in METHODS.items():
        network = sharing(subject.network)
        try:
            if apply is not None:
                apply(network)
            prefill(network, subject.ids[:8])()
        except (ImportError, NotImplementedError, RuntimeError) as error:
            if not name.startswith("bitsandbytes"):
                raise
            skipped[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        networks[name] = network
    return networks


def weight_bytes(network: Any) -> int:
    """Of everything that it keeps, shared or not; bitsandbytes keeps its scales apart from the parameters."""
    states = (getattr(module, "state", None) for module in network.modules())
    scales = (getattr(state, "SCB", None) for state in states)
    return evaluate.model_bytes(network) + sum(scale.nbytes for scale in scales if isinstance(scale, Tensor))


# ---- measuring -----------------------------------------------------------------------------------------------------


def prefill(network: Any, ids: Tensor) -> Callable[[], Any]:
    return functools.partial(network, ids[None], use_cache=True, logits_to_keep=1)


def decode(network: Any, prompt: Tensor, steps: int) -> Callable[[], Tensor]:
    """Greedy decoding of `steps` ids after the prompt, which the cache holds already. Each call does the same."""
    begin = prefill(network, prompt)()
    first, cached = begin.logits[:, -1:].argmax(-1), evaluate.cache_of(network, begin)
    (cache,) = cached.values()

    def call() -> Tensor:
        ids = [first]
        for _ in range(steps):
            out = network(ids[-1], **cached, use_cache=True, logits_to_keep=1)
            ids.append(out.logits[:, -1:].argmax(-1))
        cache.crop(-steps)
        return torch.cat(ids[1:], -1)[0]

    return call


def bench(
    name: str, subject: Subject, networks: Mapping[str, Any], work: Work, setting: Setting
) -> Iterator[list[ModelRow]]:
    """The rows of prefill, then those of decode."""
    ids, prompt = subject.ids[: work.prefill], subject.ids[: work.prompt]
    exact = prefill(networks[REFERENCE], ids)().logits
    errors = {method: common.relative_error(prefill(each, ids)().logits, exact) for method, each in networks.items()}
    # A forward reads every weight, but of the embedding only the rows looked up, unless it is the head too.
    embedding, head = subject.network.get_input_embeddings().weight, subject.network.get_output_embeddings().weight
    unread = 0 if embedding is head else embedding.nbytes
    for section, tokens, before, forwards in (
        ("prefill", len(ids), 0, 1),
        ("decode", work.decode, len(prompt), work.decode),
    ):
        calls: dict[str, list[Call]] = {
            method: [decode(network, prompt, tokens) if before else prefill(network, ids)]
            for method, network in networks.items()
        }
        timings = common.time_paired(calls, setting.effort, common.clock_for(setting.device))
        rows = []
        for method, timing in timings.items():
            kept = weight_bytes(networks[method])
            moved = float(forwards * (kept - unread))
            rows.append(
                ModelRow(
                    section,
                    (tokens,),
                    common.dtype_name(subject.network.dtype),
                    method,
                    setting.threads,
                    **common.timed(timing, timings, METHODS[method][1]),
                    ops=0.0,
                    bytes=moved,
                    copies=1,
                    from_memory=kept >= 2 * common.last_level_cache(),
                    limit="memory" if before else None,
                    limit_share=moved / setting.limits.read / timing.median if before else None,
                    error=None if method == REFERENCE else errors[method],
                    model=name,
                    parameters=subject.parameters,
                    prompt=before,
                    weight_bytes=kept,
                    tokens_per_s=tokens / timing.median,
                )
            )
        yield rows


def print_rows(console: Console, rows: Sequence[ModelRow]) -> None:
    headings = ("contender", "tokens/s", "best", "weights, MB", "of limit", "logits", *common.COMPARISON)
    cells = [
        (
            row.method,
            f"{row.tokens_per_s:.1f}",
            f"{row.shape[0] / row.best_s:.1f}",
            f"{row.weight_bytes / 1e6:.0f}",
            "" if row.limit_share is None else f"{row.limit_share:.0%} {row.limit}",
            "" if row.error is None else f"{row.error:.2e}",
            *common.comparison(row),
        )
        for row in rows
    ]
    common.print_table(console, rows[0].case, headings, cells)


def run(
    console: Console, *, quick: bool = False, out: Path | None = None, threads: Sequence[int] = (), device: str = "cpu"
) -> Record:
    """Measure, print as it goes, and write JSON into `out` when it is given."""
    before = torch.get_num_threads()
    record = Record("model", common.describe_machine(device))
    work, effort = (QUICK, common.QUICK) if quick else (FULL, common.FULL)
    settings = []
    for count in list(threads) or [before]:
        measured = limits.measure(count, device)
        record.limits.append(measured.to_dict())
        limits.print_limits(console, measured)
        settings.append(Setting(effort, measured, count, device))
    for name in list(SUBJECTS)[: 1 if quick else None]:
        try:
            subject = SUBJECTS[name](device)
        except (ImportError, models.ModelError) as error:
            record.skipped[name] = str(error)
            continue
        try:
            with torch.inference_mode():
                networks = prepare(subject, record.skipped)
                for setting in settings:
                    torch.set_num_threads(setting.threads)
                    for rows in bench(name, subject, networks, work, setting):
                        record.rows += rows
                        print_rows(console, rows)
        finally:
            torch.set_num_threads(before)
        del subject, networks  # before the next is built
    if not record.rows:
        raise ValueError("nothing was measured: " + "; ".join(f"{name}: {why}" for name, why in record.skipped.items()))
    common.print_skipped(console, record)
    if out is not None:
        console.print(f"wrote {record.write(out)}")
    return record

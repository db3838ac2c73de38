"""octavo's methods on models of diffusers: while they load, in memory, saved and read again."""

from __future__ import annotations

import json

import octavo
import pytest
import torch
from octavo.core.low_bit import LowBitLinear

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

METHODS = [("int8", {}), ("nf4", {"double_quant": True}), ("rtn", {"group_size": 16})]


def unet():
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=32,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=8,
    ).eval()


def run(model):
    g = torch.Generator().manual_seed(1)
    x, context = torch.randn(1, 4, 16, 16, generator=g), torch.randn(1, 5, 32, generator=g)
    with torch.no_grad():
        return model(x, torch.tensor([1]), context).sample


def layers(model):
    return [m for m in model.modules() if isinstance(m, LowBitLinear)]


@pytest.mark.parametrize(("method", "settings"), METHODS)
def test_in_memory_saved_and_read_again(tmp_path, method, settings):
    model = unet()
    y = run(model)
    report = octavo.quantize_model(model, method, progress=False, **settings)
    z = run(model)
    assert len(report.layers) == len(layers(model)) == 50 and float((z - y).norm() / y.norm()) < 0.1
    model.save_pretrained(tmp_path / "saved")
    assert (
        json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]["quant_method"] == "octavo"
    )
    again = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "saved")
    assert len(layers(again)) == 50 and torch.equal(run(again), z)
    again.save_pretrained(tmp_path / "twice")
    twice = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "twice")
    assert torch.equal(run(twice), z)
    assert not layers(twice.dequantize()) and float((run(twice) - z).norm() / z.norm()) < 0.01


@pytest.mark.parametrize(("method", "settings"), METHODS[:2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_while_it_is_loaded(tmp_path, method, settings, dtype):
    load = diffusers.UNet2DConditionModel.from_pretrained
    unet().save_pretrained(tmp_path / "source")
    config = octavo.OctavoConfig(method, skip=["time_embedding"], **settings)
    model = load(tmp_path / "source", quantization_config=config, torch_dtype=dtype)
    assert len(layers(model)) == 48 and type(model.time_embedding.linear_1) is torch.nn.Linear
    plain = unet().to(dtype)
    octavo.quantize_model(plain, method, skip=["time_embedding"], progress=False, **settings)
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in model.state_dict().items())
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved", torch_dtype=dtype)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())


def test_what_needs_data_and_what_is_not_there(tmp_path):
    unet().save_pretrained(tmp_path / "source")
    load = diffusers.UNet2DConditionModel.from_pretrained
    with pytest.raises(ValueError, match="spqr needs calibration data and cannot quantize a model while it is loaded"):
        load(tmp_path / "source", quantization_config=octavo.OctavoConfig("spqr"))
    with pytest.raises(ValueError, match="skip names no linear layer of UNet2DConditionModel: nothing"):
        load(tmp_path / "source", quantization_config=octavo.OctavoConfig("nf4", skip=["nothing"]))

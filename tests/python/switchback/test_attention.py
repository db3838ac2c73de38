"""`SwitchBackMultiheadAttention`: all that lies around the products as in torch, and the products in int8."""

from __future__ import annotations

import copy
import re
from typing import Any

import octavo
import pytest
import torch
from octavo.nn import SwitchBackMultiheadAttention
from octavo.switchback import linear as nn_switchback
from torch import Tensor, nn
from torch.nn import functional as F


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def exact_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    return F.linear(x, weight, bias)


MASKS = ("none", "bool", "float", "per head", "causal", "padding", "padding and causal")


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", ["self", "key is value", "all differ", "unbatched"])
def test_attention_is_that_of_torch(
    kind: str, batch_first: bool, need_weights: bool, mask: str, monkeypatch: pytest.MonkeyPatch
):
    """With exact products in place of int8 ones, all that lies around them must equal torch's module."""
    monkeypatch.setattr(nn_switchback, "training_linear", exact_linear)
    attention = nn.MultiheadAttention(16, 4, batch_first=batch_first)
    nn.init.normal_(attention.in_proj_bias)
    batch, length, keys = 3, 5, 5 if kind == "self" or "causal" in mask else 7
    shape = (batch, length, 16) if batch_first else (length, batch, 16)
    key_shape = (batch, keys, 16) if batch_first else (keys, batch, 16)
    if kind == "unbatched":
        batch, shape, key_shape = 1, (length, 16), (keys, 16)
    query = torch.randn(shape)
    key = query if kind == "self" else torch.randn(key_shape)
    value = torch.randn(key_shape) if kind == "all differ" else key
    forbidden = torch.ones(length, keys, dtype=torch.bool).triu(1)
    if "causal" not in mask:
        forbidden = forbidden & (torch.rand(length, keys) > 0.3)
    arguments: dict[str, Any] = {"need_weights": need_weights}
    if mask == "bool":
        arguments["attn_mask"] = forbidden
    elif mask == "float":
        arguments["attn_mask"] = torch.randn(length, keys)
    elif mask == "per head":
        arguments["attn_mask"] = torch.randn(batch * 4, length, keys)
    elif "causal" in mask:
        arguments |= {"attn_mask": forbidden, "is_causal": True}
    if "padding" in mask:
        padding = torch.zeros(batch, keys, dtype=torch.bool)
        padding[:, -2:] = True
        arguments["key_padding_mask"] = padding[0] if kind == "unbatched" else padding
    leaves = [t.detach().clone().requires_grad_() for t in (query, key, value)]
    if kind in ("self", "key is value", "unbatched"):
        leaves[2] = leaves[1]
    if kind == "self":
        leaves[0] = leaves[1]
    other = copy.deepcopy(attention)
    octavo.convert_linears(other)
    assert type(other) is SwitchBackMultiheadAttention
    results = []
    for module in (attention, other):
        for leaf in leaves:
            leaf.grad = None
        out, weights = module(*leaves, **arguments)
        out.square().sum().backward()
        results.append((out, weights, *(leaf.grad for leaf in leaves), module.in_proj_weight.grad))
    for want, got in zip(*results, strict=True):
        if want is None:
            assert got is None
        else:
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", ["switchback", "vectorwise", "all_int8", "fp8"])
@pytest.mark.parametrize("cross", [False, True])
def test_attention_in_int8(variant: str, cross: bool):
    attention = nn.MultiheadAttention(32, 4, batch_first=True)
    x = torch.randn(2, 6, 32)
    y = torch.randn(2, 7, 32) if cross else x
    want, _ = attention(x, y, y)
    want.square().sum().backward()
    grad = attention.in_proj_weight.grad.clone()
    attention.zero_grad()
    octavo.convert_linears(attention, variant=variant)
    got, _ = attention(x, y, y)
    got.square().sum().backward()
    assert 0 < (got - want).norm() < 0.1 * want.norm()
    assert 0 < (attention.in_proj_weight.grad - grad).norm() < 0.25 * grad.norm()
    if variant == "fp8":
        return
    attention.eval()
    with torch.no_grad():
        before, _ = attention(x, y, y)
        octavo.prepare_for_eval(attention)
        after, _ = attention(x, y, y)
    assert torch.equal(before, after)


def test_attention_made_directly():
    attention = SwitchBackMultiheadAttention(16, 2, batch_first=True, variant="vectorwise")
    assert list(attention.state_dict()) == list(nn.MultiheadAttention(16, 2).state_dict())
    x = torch.randn(2, 5, 16)
    out, weights = attention(x, x, x)
    plain = nn.MultiheadAttention(16, 2, batch_first=True)
    plain.load_state_dict(attention.state_dict())
    want, _ = plain(x, x, x)
    assert weights.shape == (2, 5, 5) and 0 < (out - want).norm() < 0.1 * want.norm()
    octavo.convert_linears(attention, nn.Linear)
    assert torch.equal(attention(x, x, x)[0], want)
    with pytest.raises(ValueError, match="unknown variant"):
        SwitchBackMultiheadAttention(16, 2, variant="none")
    with pytest.raises(ValueError, match="dtype must be float32, float16 or bfloat16, got float64"):
        SwitchBackMultiheadAttention(16, 2, dtype=torch.float64)


@pytest.mark.parametrize("turned", [True, False])
def test_attention_starts_like_torchs(turned: bool):
    def made() -> nn.MultiheadAttention:
        torch.manual_seed(7)
        if turned:
            attention = nn.MultiheadAttention(16, 4, batch_first=True)
            octavo.convert_linears(attention)
            return attention
        return SwitchBackMultiheadAttention(16, 4, batch_first=True)

    attention = made()
    torch.manual_seed(8)
    attention._reset_parameters()
    torch.manual_seed(8)
    plain = nn.MultiheadAttention(16, 4, batch_first=True)
    plain._reset_parameters()
    torch.manual_seed(8)
    plain._reset_parameters()
    assert torch.equal(attention.in_proj_weight, plain.in_proj_weight)
    empty = torch.randn(0, 5, 16)
    assert attention(empty, empty, empty)[0].shape == (0, 5, 16)


def test_attention_compiles_to_one_graph():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    octavo.convert_linears(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 5, 16)
    out = compiled(x)
    out.square().sum().backward()
    gradients = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    want = layer(x)
    want.square().sum().backward()
    torch.testing.assert_close(out, want)
    for got, p in zip(gradients, layer.parameters(), strict=True):
        torch.testing.assert_close(got, p.grad)


@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_refuses_what_torch_refuses(batch_first: bool):
    plain = nn.MultiheadAttention(16, 2, batch_first=batch_first)
    attention = copy.deepcopy(plain)
    octavo.convert_linears(attention)
    x = torch.randn(3, 5, 16) if batch_first else torch.randn(5, 3, 16)
    one, wide, four = torch.randn(5, 16), torch.randn(3, 5, 8), torch.randn(1, 3, 5, 16)
    bad: list[tuple[str, tuple[Tensor, Tensor, Tensor], dict[str, Tensor]]] = [
        ("attn_mask must be of a boolean or float dtype, got uint8", (x, x, x), {
            "attn_mask": torch.ones(5, 5).triu(1).to(torch.uint8)
        }),
        ("attn_mask must be of a boolean or float dtype, got int32", (x, x, x), {
            "attn_mask": torch.ones(5, 5, dtype=torch.int32)
        }),
        ("attn_mask must have shape [5, 5] or [6, 5, 5], got [1, 1]", (x, x, x), {"attn_mask": torch.zeros(1, 1)}),
        ("attn_mask must have shape [5, 5] or [6, 5, 5], got [5]", (x, x, x), {"attn_mask": torch.zeros(5)}),
        ("attn_mask must have shape [5, 5] or [6, 5, 5], got [1, 5, 5]", (x, x, x), {
            "attn_mask": torch.zeros(1, 5, 5)
        }),
        ("key_padding_mask must have shape [3, 5], got [5]", (x, x, x), {
            "key_padding_mask": torch.zeros(5, dtype=torch.bool)
        }),
        ("must all have 3 dimensions, or 2 without a batch", (one, x, x), {}),
        ("must all have 3 dimensions, or 2 without a batch", (four, four, four), {}),
        ("must have 16 features", (wide, wide, wide), {}),
        ("key and value one shape", (x, x, x[:, :2]), {}),
    ]  # fmt: skip
    for message, inputs, masks in bad:
        with pytest.raises((RuntimeError, AssertionError)):
            plain(*inputs, **masks)
        with pytest.raises(RuntimeError, match=re.escape(message)):
            attention(*inputs, **masks)


def test_a_causal_hint_needs_a_mask():
    attention = nn.MultiheadAttention(16, 4)
    octavo.convert_linears(attention)
    x = torch.randn(3, 2, 16)
    with pytest.raises(RuntimeError, match="is_causal is a hint about attn_mask, which is missing"):
        attention(x, x, x, is_causal=True)
    assert "embed_dim=16, num_heads=4" in str(attention) and "variant='switchback'" in str(attention)

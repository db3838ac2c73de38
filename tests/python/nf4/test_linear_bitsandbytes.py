"""NF4Linear reads and writes the 4-bit state of bitsandbytes; damaged ones change nothing."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nf4_layers import CASES, assert_same_state, changed, make, state_of
from octavo.integrations.bitsandbytes import to_bitsandbytes_state
from octavo.nf4.bitsandbytes import MARK
from octavo.nn import NF4Linear
from torch import Tensor, nn


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("target", [False, True])
@pytest.mark.parametrize("case", ["default", "double", "fp4"])
def test_reads_what_bitsandbytes_would_write(case: str, target: bool, assign: bool):
    source = make(dtype=torch.bfloat16, **CASES[case])
    state = to_bitsandbytes_state(source)
    keys = ["weight", "bias", "weight.absmax", "weight.quant_map"]
    keys += ["weight.nested_absmax", "weight.nested_quant_map"] if source.double_quant else []
    assert list(state) == [*keys, f"{MARK}{source.quant_type}"]
    kept = dict(state)
    module = nn.Sequential(NF4Linear(48, 37, True, source.quant_type, source.blocksize, target))
    module.load_state_dict({f"0.{name}": value for name, value in state.items()}, assign=assign)
    layer = module[0]
    assert isinstance(layer, NF4Linear)
    assert_same_state(state_of(layer), state_of(source.float() if not assign else source))
    assert layer.weight_dtype is torch.bfloat16
    assert state == kept  # the caller's dict is not changed


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32, torch.int8])
def test_reads_other_storage_dtypes_of_bitsandbytes(storage: torch.dtype):
    """Its quant_storage: the same bytes, for FSDP's sake under another dtype."""
    source = make()
    state = to_bitsandbytes_state(source)
    module = NF4Linear(48, 37)
    module.load_state_dict(state | {"weight": state["weight"].flatten().view(storage).view(-1, 1)})
    assert torch.equal(module.weight, source.weight)


def test_an_offset_of_0_is_a_number():
    module = make(double_quant=True)
    module.load_state_dict(STATE | {f"{MARK}nf4": header(nested_offset=0)})
    assert module.offset.tolist() == [0.0]


def header(**changes: Any) -> Tensor:
    text = bytes(STATE[f"{MARK}nf4"].tolist()).decode()
    described = json.loads(text) | changes
    text = json.dumps({name: value for name, value in described.items() if value != "gone"})
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


STATE = to_bitsandbytes_state(NF4Linear.from_linear(nn.Linear(48, 37), double_quant=True))
BAD_LINEAR4BIT: dict[str, tuple[dict[str, Any], str]] = {
    "json": ({f"{MARK}nf4": STATE[f"{MARK}nf4"][:-9]}, "is not JSON"),
    "utf8": ({f"{MARK}nf4": torch.full((9,), 255, dtype=torch.uint8)}, "is not JSON"),
    "empty": ({f"{MARK}nf4": STATE[f"{MARK}nf4"][:0]}, "is not JSON"),
    "deep": ({f"{MARK}nf4": torch.tensor(list(b"[" * 99999), dtype=torch.uint8)}, "is not JSON"),
    "list": (
        {f"{MARK}nf4": torch.tensor(list(b"[1]"), dtype=torch.uint8)},
        r"got list; it is b'\[1\]'",
    ),
    "dtype": ({f"{MARK}nf4": STATE[f"{MARK}nf4"].int()}, "must be uint8 of one dimension, got torch.int32"),
    "type": ({f"{MARK}nf4": header(quant_type="fp4")}, "has quant_type = 'fp4'"),
    "unknown": ({f"{MARK}nf4": header(quant_type="int4")}, "has quant_type = 'int4'"),
    "two": ({f"{MARK}fp4": header(quant_type="fp4")}, "there must be one .*nf4, .*fp4"),
    "blocksize": ({f"{MARK}nf4": header(blocksize=65)}, "power of two from 32 to 4096, got 65"),
    "no blocksize": ({f"{MARK}nf4": header(blocksize="gone")}, "has blocksize = None"),
    "true": ({f"{MARK}nf4": header(blocksize=True)}, "has blocksize = True"),
    "other blocksize": ({f"{MARK}nf4": header(blocksize=128)}, r"is \('nf4', 128, \(37, 48\)\) in the checkpoint"),
    "shape": ({f"{MARK}nf4": header(shape=[48, 37])}, r"\(48, 37\)\) in the checkpoint, .*\(37, 48\)\) in the module"),
    "negative": ({f"{MARK}nf4": header(shape=[-37, -48])}, r"has shape = \[-37, -48\]"),
    "text": ({f"{MARK}nf4": header(shape="37x48")}, "has shape = '37x48'"),
    "weight dtype": (
        {f"{MARK}nf4": header(dtype="float64")},
        "has dtype = 'float64'; known: float32, float16, bfloat16",
    ),
    "nested": ({f"{MARK}nf4": header(nested_blocksize=128)}, "nested_blocksize = 128.*256 and 'float32' can be read"),
    "nested dtype": ({f"{MARK}nf4": header(nested_dtype="float16")}, "nested_dtype = 'float16'"),
    "offset": ({f"{MARK}nf4": header(nested_offset=float("nan"))}, "has nested_offset = nan"),
    "no offset": ({f"{MARK}nf4": header(nested_offset="gone")}, "has nested_offset = None"),
    "huge offset": ({f"{MARK}nf4": header(nested_offset=1e300)}, r"has nested_offset = 1e\+300"),
    "absmax": ({"weight.absmax": None}, r"weight\.absmax missing beside"),
    "map": ({"weight.quant_map": STATE["weight.quant_map"].flip(0)}, r"weight\.quant_map is not the code book of nf4"),
    "nested map": ({"weight.nested_quant_map": torch.zeros(256)}, r"nested_quant_map is not the signed dynamic map"),
    "map dtype": (
        {"weight.quant_map": STATE["weight.quant_map"].double()},
        r"the code book of nf4, torch\.float32 \[16\]",
    ),
    "nested map dtype": (
        {"weight.nested_quant_map": torch.zeros(256).half()},
        r"the signed dynamic map, .* got .*float16",
    ),
    "no dimension": ({"weight": torch.tensor(1.0)}, r"weight must be bytes, .* got torch\.float32 \[\]"),
    "storage": ({"weight": torch.zeros(111, dtype=torch.int64)}, r"weight must be bytes, .* got torch\.int64 \[111\]"),
    "meta": ({f"{MARK}nf4": STATE[f"{MARK}nf4"].to("meta")}, "nf4 is on the meta device"),
    "stranger": ({"weight.zero_point": torch.zeros(1)}, r"unknown weight\.zero_point"),
    "short": ({"weight": STATE["weight"][:-1]}, r"weight must be uint8 \[888\], got uint8 \[887\]"),
    "short absmax": ({"weight.absmax": STATE["weight.absmax"][:-1]}, r"absmax must be uint8 \[28\], got uint8 \[27\]"),
    "plain absmax": ({"weight.absmax": torch.ones(28)}, r"absmax must be uint8 \[28\], got float32 \[28\]"),
}


@pytest.mark.parametrize("case", BAD_LINEAR4BIT)
def test_damaged_states_of_bitsandbytes_change_nothing(case: str):
    change, message = BAD_LINEAR4BIT[case]
    module = make()
    before = state_of(module)
    with pytest.raises(RuntimeError, match=message):
        module.load_state_dict(changed(STATE, change))
    assert_same_state(state_of(module), before)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.sampled_from(("nf4", "float32")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=2),
    max_leaves=5,
)
FIELDS = ("quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_dtype", "nested_offset", "other")


@settings(max_examples=150, deadline=None)
@given(changes=st.dictionaries(st.sampled_from(FIELDS), JSON, min_size=1, max_size=3))
def test_any_description_loads_or_is_refused_in_words(changes: dict[str, Any]):
    module = make(double_quant=True)
    before, refusal = state_of(module), ""
    try:
        module.load_state_dict(STATE | {f"{MARK}nf4": header(**changes)})
    except RuntimeError as error:
        refusal = str(error)
    if refusal:
        assert "Error(s) in loading state_dict for NF4Linear:\n\tNF4Linear: " in refusal
        assert_same_state(state_of(module), before)
    else:
        assert torch.equal(module.codes, STATE["weight"].flatten())

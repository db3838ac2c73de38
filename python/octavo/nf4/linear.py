"""`NF4Linear`: see :mod:`octavo.nn`, which exports it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.checks import bias_errors, check_weight, name_of_dtype
from ..core.low_bit import LowBitLinear
from .bitsandbytes import is_linear4bit, read_linear4bit
from .functional import nf4_matmul_flat
from .ops import packed_bytes
from .weight import NESTED_BLOCKSIZE, NF4Weight, check_low_bit_state, check_options, quantize_4bit


class NF4Linear(LowBitLinear):
    """`torch.nn.Linear` with a weight in 4 bits (QLoRA, arXiv 2305.14314): see `octavo.nf4_matmul`.

    ``y = x @ W.T + bias`` with ``W = value[code] * absmax`` of its block. x is [..., in_features] in fp32, fp16 or bf16
    and y is [..., out_features] in the same dtype. Differentiable in x and bias; the weight is frozen.

    What is uint8 is a parameter that requires no gradient, flat, so that FSDP2 shards and gathers it; what is fp32 is a
    buffer, because FSDP2 would gather it in the dtype of its mixed-precision policy. (So absmax is sharded with double
    quantization, and replicated without.) `.to(dtype)`, `.half()` and the like change only the bias. A new module is
    all zeros: fill it by `from_linear`, `from_weight` or `load_state_dict`, which also reads the 4-bit state of
    bitsandbytes (``weight.absmax``, ``weight.quant_state.bitsandbytes__nf4`` and so on) and takes from the state
    whether there is double quantization; quant_type and blocksize must be the module's.

    Attributes:
        in_features, out_features: k and n, any.
        quant_type: "nf4", "fp4", "nf2", "nf3" or "nf8".
        blocksize: weights of the flattened matrix that share an absmax.
        weight: reads as the dequantized weight: see `octavo.core.low_bit.LowBitLinear`.
        codes: uint8 [ceil(n * k * bits / 8)], as `octavo.ops.nf4_quantize` packs them; "weight" in state dicts.
        absmax: fp32 [ceil(n * k / blocksize)]; uint8 with double quantization.
        nested_absmax, offset: fp32, or None without double quantization.
        weight_dtype: of the weight that was quantized, and of `dequantize` by default.
        bias: [out_features], parameter, or None.

    Raises:
        ValueError: an unknown quant_type or blocksize.

    Example:
        >>> import octavo, torch
        >>> linear = torch.nn.Linear(64, 32)
        >>> layer = octavo.nn.NF4Linear.from_linear(linear, double_quant=True)
        >>> layer
        NF4Linear(in_features=64, out_features=32, bias=True, quant_type=nf4, blocksize=64, double_quant=True)
        >>> x = torch.randn(4, 64)
        >>> bool((layer(x) - linear(x)).norm() < 0.2 * linear(x).norm())
        True
    """

    tensors = ("weight", "absmax", "nested_absmax", "offset")
    optional: ClassVar[dict[str, str]] = {"nested_absmax": "double_quant", "offset": "double_quant"}
    fields: ClassVar[dict[str, Any]] = {"quant_type": str, "blocksize": int, "double_quant": bool, "weight_dtype": str}
    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        quant_type: str = "nf4",
        blocksize: int = 64,
        double_quant: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """`dtype` is the bias's, and `weight_dtype`; the default dtype where it is None."""
        super().__init__(in_features, out_features, dtype)
        check_options(quant_type, blocksize)
        self.quant_type, self.blocksize = quant_type, blocksize
        self.weight_dtype = dtype or torch.get_default_dtype()
        count = in_features * out_features
        blocks = -(-count // blocksize)

        def zeros(length: int, of: torch.dtype) -> Tensor:
            return torch.zeros(length, dtype=of, device=device)

        self._put("weight", zeros(packed_bytes(count, quant_type), torch.uint8))
        self._put("absmax", zeros(blocks, torch.uint8 if double_quant else torch.float32))
        nested = -(-blocks // NESTED_BLOCKSIZE)
        self._put("nested_absmax", zeros(nested, torch.float32) if double_quant else None)
        self._put("offset", zeros(1, torch.float32) if double_quant else None)
        self._zero_bias(bias, device, dtype)

    def _put(self, name: str, tensor: Tensor | None) -> None:
        """Make it the module's tensor of this name, as what its dtype asks for."""
        self._parameters.pop(name, None)
        self._buffers.pop(name, None)
        if tensor is not None and tensor.dtype is torch.uint8:
            self._parameters[name] = nn.Parameter(tensor.detach(), requires_grad=False)
        else:
            self._buffers[name] = None if tensor is None else tensor.detach()

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, quant_type: str = "nf4", blocksize: int = 64, double_quant: bool = False
    ) -> NF4Linear:
        """Quantize a `torch.nn.Linear`: see `octavo.quantize_4bit`.

        Args:
            linear: weight fp32, fp16 or bf16, on any device. It is not changed; the bias is copied.
            quant_type, blocksize, double_quant: of the new module.

        Raises:
            ValueError: weights that are NaN or Inf or of another dtype, an unknown quant_type or blocksize.
        """
        check_weight(linear)
        weight = quantize_4bit(linear.weight.detach(), quant_type, blocksize, double_quant)
        return cls.from_weight(weight, linear.bias).train(linear.training)

    @classmethod
    def from_weight(cls, weight: NF4Weight, bias: Tensor | None = None) -> NF4Linear:
        """A module with this weight: its tensors are shared, the bias is copied.

        Args:
            weight: [n, k], on any device.
            bias: [n], fp32, fp16 or bf16; it goes on to require a gradient if it did.

        Raises:
            ValueError: not a matrix, tensors that do not fit together.
        """
        if len(weight.shape) != 2:
            raise ValueError(f"NF4Linear.from_weight: weight must be a matrix, got shape {list(weight.shape)}")
        n, k = weight.shape
        nested = weight.nested_absmax is not None
        out = cls(k, n, False, weight.quant_type, weight.blocksize, nested, device="meta", dtype=weight.dtype)
        state = {name: t for name, t in zip(cls.tensors, weight.tensors(), strict=True) if t is not None}
        if bias is not None:
            state["bias"] = bias
        if errors := cls.tensor_errors(state, out.configuration()):
            raise ValueError(f"NF4Linear.from_weight: {'; '.join(errors)}")
        for name in cls.tensors:
            out._put(name, state.get(name))
        out._copy_bias(bias)
        return out

    @property
    def double_quant(self) -> bool:
        """Whether absmax is quantized, too."""
        return self.nested_absmax is not None

    @property
    def packed_weight(self) -> NF4Weight:
        """The weight: the module's own tensors, not copies."""
        shape = torch.Size((self.out_features, self.in_features))
        tensors = (self.codes, self.absmax, self.nested_absmax, self.offset)
        return NF4Weight(*tensors, shape, self.weight_dtype, self.quant_type, self.blocksize)

    def default_dtype(self) -> torch.dtype:
        """`weight_dtype`."""
        return self.weight_dtype

    def float_dtype(self) -> torch.dtype:
        """`weight_dtype`."""
        return self.weight_dtype

    def quantize_like(self, linear: nn.Linear) -> NF4Linear:
        out = self.from_linear(linear, self.quant_type, self.blocksize, self.double_quant)
        out.weight_dtype = self.weight_dtype
        self._frozen_bias_for(out)
        return out

    def _dequantized(self, dtype: torch.dtype) -> Tensor:
        return self.packed_weight.dequantize(dtype)

    @property
    def nominal_bits(self) -> float:
        """Bits per weight by the paper's formula: see `NF4Weight.nominal_bits`."""
        return self.packed_weight.nominal_bits

    # ---- what files say of it ----------------------------------------------------------------------------------------

    def describe(self) -> str:
        """ "nf4", "nf4 double_quant", "fp4 blocksize=128", ..."""
        blocks = "" if self.blocksize == 64 else f" blocksize={self.blocksize}"
        return f"{self.quant_type}{' double_quant' if self.double_quant else ''}{blocks}"

    def configuration(self) -> dict[str, Any]:
        return super().configuration() | {"weight_dtype": name_of_dtype(self.weight_dtype)}

    @classmethod
    def from_configuration(cls, config: Mapping[str, Any], dtype: torch.dtype | None) -> NF4Linear:
        n, k = config["out_features"], config["in_features"]
        options = (config["quant_type"], config["blocksize"], config["double_quant"])
        layer = cls(k, n, config["bias"], *options, device="meta", dtype=dtype)
        if (weight_dtype := config.get("weight_dtype")) is not None:
            layer.weight_dtype = getattr(torch, weight_dtype)
        return layer

    @classmethod
    def check_configuration(cls, config: Mapping[str, Any]) -> None:
        if min(config["in_features"], config["out_features"]) < 0:
            raise ValueError(f"in_features and out_features are {config['in_features']} and {config['out_features']}")
        check_options(config["quant_type"], config["blocksize"])
        if config["weight_dtype"] not in ("float32", "float16", "bfloat16"):
            raise ValueError(f"weight_dtype is {config['weight_dtype']!r}")

    @classmethod
    def tensor_errors(cls, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> list[str]:
        errors = bias_errors(state.get("bias"), config["out_features"])
        of_weight = {name: state[name] for name in cls.tensors if name in state}
        if of_weight:
            count = config["in_features"] * config["out_features"]
            errors += check_low_bit_state(of_weight, count, config["quant_type"], config["blocksize"], "weight")
        return errors

    @classmethod
    def read_from(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        return {"double_quant": "nested_absmax" in state or "offset" in state}

    @classmethod
    def recognizes(cls, stored: Mapping[str, torch.dtype]) -> bool:
        return stored.get("weight") is torch.uint8 or "absmax" in stored

    def _translate(self, state: dict[str, Tensor]) -> tuple[list[str], dict[str, Any]]:
        if not is_linear4bit(state):
            return [], {}
        try:
            header, tensors = read_linear4bit(state)
        except ValueError as error:
            return [str(error)], {}
        mine = (self.quant_type, self.blocksize, (self.out_features, self.in_features))
        if (found := (header.quant_type, header.blocksize, header.shape)) != mine:
            return [f"(quant_type, blocksize, shape) is {found} in the checkpoint, {mine} in the module"], {}
        state.clear()
        state.update(tensors)
        return [], {"weight_dtype": header.dtype}

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() and x.shape[-1] != self.in_features:
            raise RuntimeError(
                f"NF4Linear: x of shape {list(x.shape)} does not end with in_features {self.in_features}"
            )
        tensors = (self.codes, self.absmax, self.nested_absmax, self.offset)
        return nf4_matmul_flat(x, tensors, self.bias, self.out_features, self.quant_type, self.blocksize)

    def _described(self) -> dict[str, Any]:
        nested = {"double_quant": True} if self.double_quant else {}
        return {"quant_type": self.quant_type, "blocksize": self.blocksize, **nested}

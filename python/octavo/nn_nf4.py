"""`NF4Linear`: see :mod:`octavo.nn`, which exports it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ._frozen import FLOATS, FrozenBuffers, dtype_name
from ._linear4bit import is_linear4bit, read_linear4bit
from .autograd import nf4_matmul_flat
from .nf4 import NESTED_BLOCKSIZE, NF4Weight, check_low_bit_state, check_options, quantize_4bit
from .ops_nf4 import packed_bytes

TENSORS = ("weight", "absmax", "nested_absmax", "offset")


def check_nf4_state(
    state: Mapping[str, Tensor], in_features: int, out_features: int, quant_type: str, blocksize: int
) -> list[str]:
    """What is wrong with the tensors of an `NF4Linear`, one line each: missing, dtype, length, values.

    Nothing is wrong with a state without any tensor of the weight.
    """
    errors = []
    bias = state.get("bias")
    if bias is not None and (bias.dtype not in FLOATS or tuple(bias.shape) != (out_features,)):
        found = f"{dtype_name(bias)} {list(bias.shape)}"
        errors.append(f"bias must be float32, float16 or bfloat16 [{out_features}], got {found}")
    of_weight = {name: state[name] for name in TENSORS if name in state}
    if of_weight:
        errors += check_low_bit_state(of_weight, in_features * out_features, quant_type, blocksize, "weight")
    return errors


class NF4Linear(FrozenBuffers):
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
        weight: uint8 [ceil(n * k * bits / 8)]: the codes, as `octavo.nf4_quantize` packs them.
        absmax: fp32 [ceil(n * k / blocksize)]; uint8 with double quantization.
        nested_absmax, offset: fp32, or None without double quantization.
        weight_dtype: of the weight that was quantized, and of `dequantize` by default.
        bias: [out_features], parameter, or None.

    Raises:
        ValueError: an unknown quant_type or blocksize.
    """

    weight: nn.Parameter
    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None
    bias: nn.Parameter | None

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
        super().__init__()
        check_options(quant_type, blocksize)
        self.in_features, self.out_features = in_features, out_features
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
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    def _put(self, name: str, tensor: Tensor | None) -> None:
        """Make it the module's tensor of this name, as what its dtype asks for."""
        self._parameters.pop(name, None)
        self._buffers.pop(name, None)
        if tensor is not None and tensor.dtype is torch.uint8:
            self.register_parameter(name, nn.Parameter(tensor.detach(), requires_grad=False))
        else:
            self.register_buffer(name, None if tensor is None else tensor.detach())

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
        from .nn import check_weight

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
        state = {name: t for name, t in zip(TENSORS, weight.tensors(), strict=True) if t is not None}
        if bias is not None:
            state["bias"] = bias
        if errors := check_nf4_state(state, k, n, weight.quant_type, weight.blocksize):
            raise ValueError(f"NF4Linear.from_weight: {'; '.join(errors)}")
        for name in TENSORS:
            out._put(name, state.get(name))
        if bias is not None:
            out.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
        return out

    @property
    def double_quant(self) -> bool:
        """Whether absmax is quantized, too."""
        return self.nested_absmax is not None

    @property
    def packed_weight(self) -> NF4Weight:
        """The weight: the module's own tensors, not copies."""
        shape = torch.Size((self.out_features, self.in_features))
        tensors = (self.weight, self.absmax, self.nested_absmax, self.offset)
        return NF4Weight(*tensors, shape, self.weight_dtype, self.quant_type, self.blocksize)

    def dequantize(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """A `torch.nn.Linear` with the weight that this module stands for, rounded once to `dtype`.

        Args:
            dtype: of weight and bias; None for `weight_dtype`, the bias as it is.
        """
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.packed_weight.dequantize(dtype))
        if self.bias is not None:
            bias = self.bias.detach().to(dtype or self.bias.dtype, copy=True)
            linear.bias = nn.Parameter(bias, self.bias.requires_grad)
        return linear.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() and x.shape[-1] != self.in_features:
            raise RuntimeError(
                f"NF4Linear: x of shape {list(x.shape)} does not end with in_features {self.in_features}"
            )
        tensors = (self.weight, self.absmax, self.nested_absmax, self.offset)
        return nf4_matmul_flat(x, tensors, self.bias, self.out_features, self.quant_type, self.blocksize)

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        text += f", quant_type={self.quant_type}, blocksize={self.blocksize}"
        return f"{text}, double_quant=True" if self.double_quant else text

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        state = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        errors, dtype = [], self.weight_dtype
        if is_linear4bit(state):
            try:
                header, state = read_linear4bit(state)
                mine = (self.quant_type, self.blocksize, (self.out_features, self.in_features))
                if (found := (header.quant_type, header.blocksize, header.shape)) != mine:
                    errors = [f"(quant_type, blocksize, shape) is {found} in the checkpoint, {mine} in the module"]
                dtype = header.dtype
            except ValueError as error:
                errors = [str(error)]
        if not errors:
            options = (self.quant_type, self.blocksize)
            errors = check_nf4_state(state, self.in_features, self.out_features, *options)
        if errors:
            where = f"{type(self).__name__} {prefix[:-1]!r}" if prefix else type(self).__name__
            error_msgs.extend(f"{where}: {error}" for error in errors)
            return
        self.weight_dtype = dtype
        if "weight" in state:  # a new weight brings its double quantization, or that it has none
            for name in TENSORS:
                current, new = getattr(self, name), state.get(name)
                if new is None or current is None or current.dtype is not new.dtype:
                    self._put(name, None if new is None else torch.empty_like(new, device=self.weight.device))
        state = {prefix + name: value for name, value in state.items()}
        super()._load_from_state_dict(state, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

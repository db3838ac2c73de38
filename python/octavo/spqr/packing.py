"""Codes to words and back: the bit layout of csrc/spqr/README.md in torch operations, on any device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

_ROWS, _COLUMNS, _PAIRS = 16, 32, 16
WIDE = 65536  # with more columns, an id takes a word of its own


def _signed(words: Tensor) -> Tensor:
    """int64 words in [0, 2**32) as int32 of the same bits."""
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def _unsigned(words: Tensor) -> Tensor:
    return words.long() & 0xFFFFFFFF


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes [n, k], below 2**bits, as int32 [ceil(n / 16), ceil(k / 32), bits, 16]; padding has code 0."""
    n, k = codes.shape
    padded = pad(codes.long(), (0, -k % _COLUMNS, 0, -n % _ROWS))
    tiles = padded.view(-(-n // _ROWS), _ROWS, -(-k // _COLUMNS), _PAIRS, 2)
    pairs = tiles.permute(0, 2, 3, 1, 4)  # tile, chunk, pair, row, parity
    halves = torch.zeros((*pairs.shape[:2], bits, _ROWS, 2), dtype=torch.long, device=codes.device)
    per_word = 16 // bits
    for e in range(bits * per_word):
        halves[:, :, e // per_word] |= pairs[:, :, e] << (e % per_word * bits)
    if bits == 3:  # the last pair, a bit in the top of each plane
        for bit in range(3):
            halves[:, :, bit] |= (pairs[:, :, 15] >> bit & 1) << 15
    return _signed(halves[..., 0] | halves[..., 1] << 16).contiguous()


def unpack_codes(words: Tensor, n: int, k: int) -> Tensor:
    """The uint8 codes [n, k] of `pack_codes`."""
    tiles, chunks, bits, _ = words.shape
    unsigned = _unsigned(words)
    halves = torch.stack((unsigned & 0xFFFF, unsigned >> 16), -1)
    per_word, mask = 16 // bits, (1 << bits) - 1
    pairs = [halves[:, :, e // per_word] >> (e % per_word * bits) & mask for e in range(bits * per_word)]
    if bits == 3:
        top = halves >> 15
        pairs.append(top[:, :, 0] | top[:, :, 1] << 1 | top[:, :, 2] << 2)
    codes = torch.stack(pairs, 2).permute(0, 3, 1, 2, 4)  # tile, row, chunk, pair, parity
    return codes.reshape(tiles * _ROWS, chunks * _COLUMNS)[:n, :k].to(torch.uint8)


def pack_fields(scale_codes: Tensor, zero_codes: Tensor, scale_bits: int, zero_bits: int) -> Tensor:
    """Codes of statistics [n, groups] as uint8 [ceil(n / 16), groups, 2 * (scale_bits + zero_bits)]."""
    n, groups = scale_codes.shape
    width = scale_bits + zero_bits
    fields = scale_codes.long() | zero_codes.long() << scale_bits
    tiles = -(-n // _ROWS)
    fields = pad(fields, (0, 0, 0, -n % _ROWS)).view(tiles, _ROWS, groups).transpose(1, 2)
    places = torch.arange(width, device=fields.device)
    bits = (fields[..., None] >> places & 1).reshape(tiles, groups, 2 * width, 8)
    return (bits << torch.arange(8, device=fields.device)).sum(-1).to(torch.uint8)


def unpack_fields(records: Tensor, n: int, scale_bits: int, zero_bits: int) -> tuple[Tensor, Tensor]:
    """The scale and zero codes [n, groups] of `pack_fields`."""
    tiles, groups, size = records.shape
    bits = records.long()[..., None] >> torch.arange(8, device=records.device) & 1
    fields = bits.reshape(tiles, groups, _ROWS, size // 2)
    fields = (fields << torch.arange(size // 2, device=records.device)).sum(-1)
    fields = fields.transpose(1, 2).reshape(tiles * _ROWS, groups)[:n]
    return fields & ((1 << scale_bits) - 1), fields >> scale_bits


def pack_plain(scales: Tensor, zeros: Tensor) -> Tensor:
    """fp16 statistics [n, groups] as [ceil(n / 16), groups, 2, 16]."""
    n, groups = scales.shape
    both = torch.stack((scales, zeros)).half()
    return pad(both, (0, 0, 0, -n % _ROWS)).view(2, -(-n // _ROWS), _ROWS, groups).permute(1, 3, 0, 2).contiguous()


def unpack_plain(statistics: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The scales and zero points [n, groups] of `pack_plain`."""
    tiles, groups = statistics.shape[:2]
    both = statistics.permute(2, 0, 3, 1).reshape(2, tiles * _ROWS, groups)[:, :n]
    return both[0], both[1]


def pack_outliers(columns: Tensor, values: Tensor, k: int) -> Tensor:
    """Columns and fp16 values [count] as int32 [count, 1], or [count, 2] for k > 65536."""
    bits = values.half().view(torch.int16).long() & 0xFFFF
    if k > WIDE:
        return torch.stack((columns.int(), bits.int()), 1).contiguous()
    return _signed(bits << 16 | columns.long())[:, None].contiguous()


def unpack_outliers(outliers: Tensor) -> tuple[Tensor, Tensor]:
    """Columns (int64) and fp16 values of `pack_outliers`."""
    if outliers.shape[1] == 2:
        columns, bits = outliers[:, 0].long(), outliers[:, 1].long()
    else:
        words = _unsigned(outliers[:, 0])
        columns, bits = words & 0xFFFF, words >> 16
    return columns, torch.where(bits >= 1 << 15, bits - (1 << 16), bits).to(torch.int16).view(torch.float16)


def pack_perm(perm: Tensor) -> Tensor:
    """Column ids [k] as int32 [ceil(k / 2)] of two 16-bit ids, or as they are for k > 65536."""
    k = len(perm)
    if k > WIDE:
        return perm.int()
    pairs = pad(perm.long(), (0, k % 2)).view(-1, 2)
    return _signed(pairs[:, 0] | pairs[:, 1] << 16)


def unpack_perm(perm: Tensor, k: int) -> Tensor:
    """The column ids (int64) [k] of `pack_perm`."""
    if k > WIDE:
        return perm.long()
    words = _unsigned(perm)
    return torch.stack((words & 0xFFFF, words >> 16), 1).flatten()[:k]

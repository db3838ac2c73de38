"""The shapes, once: tests and benches read them here. Pure data, so that a test may import it without octavo built.

A shape is (m, n, k): activations [m, k], weight [n, k], result [m, n].
"""

from __future__ import annotations

Shape = tuple[int, int, int]

# For correctness: one element, ragged in every dimension, exact tiles, one past them, a small real model's layer.
GEMM_TEST_SHAPES: tuple[Shape, ...] = (
    (1, 1, 1),
    (1, 3, 64),
    (2, 17, 31),
    (5, 7, 3),
    (8, 16, 65),
    (16, 32, 256),
    (17, 15, 127),
    (33, 65, 130),
    (64, 64, 64),
    (129, 33, 257),
    (64, 576, 1536),
)

# Rows x columns for quantization, outlier search and extraction.
QUANTIZE_TEST_SHAPES: tuple[tuple[int, int], ...] = (
    (1, 1),
    (1, 17),
    (3, 5),
    (7, 64),
    (16, 31),
    (5, 1023),
    (33, 130),
    (64, 576),
    (2, 11008),
)

# What an empty or degenerate call must survive.
EMPTY_GEMM_SHAPES: tuple[Shape, ...] = ((0, 4, 8), (4, 0, 8), (4, 8, 0), (0, 0, 0))

# Sparse products: vectors of lanes and of rows of S, one less and one more; chunks of entries of a GPU.
CSR_TEST_SHAPES: tuple[Shape, ...] = (
    (1, 1, 1),
    (1, 33, 70),
    (2, 5, 300),
    (4, 16, 64),
    (7, 130, 17),
    (15, 17, 33),
    (16, 64, 129),
    (17, 40, 90),
    (33, 31, 257),
    (130, 47, 100),
)

# For speed: decode (1), a small batch (16), prefill (128 and up), on a square projection and a 7B model's MLP pair.
BENCH_ROWS = (1, 16, 128, 256, 512, 2048)
BENCH_LAYERS: dict[str, tuple[int, int]] = {  # name -> (n, k)
    "4096x4096": (4096, 4096),
    "11008x4096": (11008, 4096),
    "4096x11008": (4096, 11008),
}
# SmolLM2-135M's layers: hidden 576, MLP 1536, 3 key/value heads of 64. Small enough that call overhead shows.
SMALL_LAYERS: dict[str, tuple[int, int]] = {
    "576x576": (576, 576),
    "192x576": (192, 576),
    "1536x576": (1536, 576),
    "576x1536": (576, 1536),
}
SPARSE_ROWS = (1, 16, 512)
SPARSE_LAYERS: dict[str, tuple[int, int]] = {name: BENCH_LAYERS[name] for name in ("4096x4096", "11008x4096")}
SPARSE_DENSITIES = (0.002, 0.01, 0.05)  # of the entries: outliers of SpQR are at most about 1 %
QUICK_ROWS = (1, 16, 256)
QUICK_LAYERS: dict[str, tuple[int, int]] = {"4096x4096": (4096, 4096)}

# quantize_rowwise as (rows, columns, from memory): a decode row and a prefill block, which the layer before has just
# left in the cache, and a block that comes from memory. Its codes stay under 32 MiB, beyond which glibc would map and
# fault fresh pages for every call, and the system be what is timed.
QUANTIZE_BENCH_SHAPES: tuple[tuple[int, int, bool], ...] = ((1, 4096, False), (512, 4096, False), (4096, 4096, True))

# Elements of block-wise quantization: in cache and from memory. Results stay under 32 MiB, as above.
BLOCKWISE_BENCH_SIZES: tuple[tuple[int, bool], ...] = ((1 << 20, False), (1 << 22, True))
BLOCKWISE_QUICK_SIZES: tuple[tuple[int, bool], ...] = ((1 << 22, True),)

# A layer in training (n, k): a square one, and the first of a vision transformer's MLP (ViT-H); tokens of a batch.
SWITCHBACK_LAYERS: tuple[tuple[int, int], ...] = ((4096, 4096), (5120, 1280))
SWITCHBACK_ROWS, SWITCHBACK_QUICK_ROWS = (2048, 8192), (2048,)

# An optimizer's parameters: about 100 M as one tensor, and as a transformer's hundreds (hidden 576, MLP 1536, biases).
OPTIM_ONE = 100_000_000
OPTIM_QUICK_ONE = 20_000_000
OPTIM_LAYERS, OPTIM_QUICK_LAYERS = 20, 4


def transformer_parameters(layers: int) -> list[tuple[int, ...]]:
    """Shapes of a language model's parameters: 16 a layer, and an embedding."""
    linears = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
    layer: list[tuple[int, ...]] = [shape for n, k in linears for shape in ((n, k), (n,))] + [(576,), (576,)]
    return [(49152, 576), *(shape for _ in range(layers) for shape in layer), (576,)]


# Outlier columns of the "outliers" inputs: no more than 7 were seen in models up to 13B (arXiv 2208.07339).
OUTLIER_COLUMNS = 7


def gemm_shapes(rows: tuple[int, ...], layers: dict[str, tuple[int, int]]) -> list[Shape]:
    """Every m with every layer, layer by layer."""
    return [(m, n, k) for n, k in layers.values() for m in rows]

#include <algorithm>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "sparse/sparse_loops.h"

namespace octavo::cpu {
namespace {

const SparseLoops& sparse_loops() {
  switch (isa()) {
#if OCTAVO_MAX_ISA >= 2
    case Isa::amx:
    case Isa::avx512: return avx512::sparse_loops;
#endif
#if OCTAVO_MAX_ISA >= 1
    case Isa::avx2: return avx2::sparse_loops;
#endif
    default: return portable::sparse_loops;
  }
}

constexpr int kPanelLanes = 16;  // of the gradients' panels
constexpr int64_t kManyPanels = 8;
constexpr int64_t kPackColumns = 512;  // of a panel, packed by one task

// As many lanes as the rows fill, but a panel should not take more than 256 KiB: the entries, the output and the other
// core's want their place in the caches, too.
int matmul_lanes(const CsrMatmul& p) {
  if (p.m == 1) return 1;
  int lanes = 16;
  while (lanes < p.m && lanes < sparse_loops().most_lanes && 2 * lanes * p.s.k * 4 <= 256 << 10) lanes *= 2;
  return lanes;
}

int64_t panel_floats(int64_t cols, int lanes) {
  return ceil_div((cols + 1) * lanes, 16) * 16;
}

float* aligned(void* workspace) {
  return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(workspace) + 63) & ~uintptr_t{63});
}

int64_t bytes_of(int64_t floats) {
  return floats * 4 + 64;
}

// Panels [begin, end) of a matrix [m, cols], one after the other in `data`.
template <class At>
void pack_panels(const SparseLoops& loops, const void* matrix, DType dtype, int64_t cols, int64_t begin, int64_t end,
                 const At& at) {
  if (begin == end) return;
  const int64_t pieces = std::max<int64_t>(ceil_div(cols, kPackColumns), 1);
  const int64_t grain = std::max<int64_t>(kElementGrain / kPackColumns / at(begin).lanes, 1);
  parallel_for((end - begin) * pieces, grain, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      const Panel panel = at(begin + task / pieces);
      const int64_t from = task % pieces * kPackColumns, to = std::min(cols, from + kPackColumns);
      loops.pack(matrix, dtype, cols, panel, from, to);
    }
  });
}

// How a product is cut into tasks: many panels one by one, each packed and used up by one thread, so that it stays in
// that core's cache; few in groups, packed and then multiplied chunk by chunk. The sums are the same.
struct MatmulLayout {
  int lanes;
  int64_t panels, chunks, panel_floats, partial_floats;
  explicit MatmulLayout(const CsrMatmul& p)
      : lanes(matmul_lanes(p)),
        panels(ceil_div(p.m, lanes)),
        chunks(csr_chunks(p.s.nnz, kChunk)),
        panel_floats(octavo::cpu::panel_floats(p.s.k, lanes)),
        partial_floats(chunks * 2 * lanes) {}
  bool one_by_one() const { return panels >= kManyPanels; }
};

// Rows that more than one chunk has a piece of, from the pieces, in order.
void finish_open_rows(const CsrMatmul& p, const MatmulLayout& layout, const Panel& x, const float* partial) {
  float sum[64];
  for (int64_t chunk = 0; chunk + 1 < layout.chunks; ++chunk) {
    const CsrChunk c = csr_chunk(p.s, chunk, kChunk);
    if (!c.open) continue;
    const int64_t row = c.rows - 1, end = csr_offset(p.s, c.rows);
    const float* piece = partial + chunk * 2 * layout.lanes;
    std::copy_n(piece + layout.lanes, layout.lanes, sum);
    for (int64_t next = chunk + 1; next < layout.chunks && next * kChunk < end; ++next) {
      piece += 2 * layout.lanes;
      for (int lane = 0; lane < layout.lanes; ++lane) sum[lane] += piece[lane];
    }
    for (int64_t lane = 0; lane < x.rows; ++lane) csr_finish(p, x.first + lane, row, sum[lane]);
  }
}

}  // namespace

int64_t csr_matmul_workspace(const CsrMatmul& p) {
  const MatmulLayout layout(p);
  return bytes_of(layout.panels * (layout.panel_floats + layout.partial_floats));
}

void csr_matmul(const CsrMatmul& p, Stream) {
  const SparseLoops& loops = sparse_loops();
  const MatmulLayout layout(p);
  const int64_t panels = layout.panels, chunks = layout.chunks;
  float* const packed = aligned(p.workspace);
  float* const partial = packed + panels * layout.panel_floats;
  const auto panel = [&](int64_t i, int64_t slot) {
    const int64_t row = i * layout.lanes;
    return Panel{packed + slot * layout.panel_floats, row, std::min<int64_t>(p.m - row, layout.lanes), layout.lanes};
  };
  if (layout.one_by_one())
    return parallel_for(panels, 1, [&](int64_t begin, int64_t end) {
      float* const sums = partial + begin * layout.partial_floats;
      for (int64_t i = begin; i < end; ++i) {
        const Panel x = panel(i, begin);  // a range's panels follow each other in the memory of its first
        loops.pack(p.x, p.x_dtype, p.s.k, x, 0, p.s.k);
        for (int64_t chunk = 0; chunk < chunks; ++chunk) loops.matmul(p, x, chunk, sums + chunk * 2 * layout.lanes);
        finish_open_rows(p, layout, x, sums);
      }
    });
  pack_panels(loops, p.x, p.x_dtype, p.s.k, 0, panels, [&](int64_t i) { return panel(i, i); });
  // Some 20 microseconds of work: below, a second thread costs more than it brings.
  const int64_t grain = std::max<int64_t>(32 / (layout.lanes == 1 ? 4 : layout.lanes / 4), 1);
  parallel_for(panels * chunks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task)
      loops.matmul(p, panel(task / chunks, task / chunks), task % chunks, partial + task * 2 * layout.lanes);
  });
  for (int64_t i = 0; i < panels; ++i) finish_open_rows(p, layout, panel(i, i), partial + i * layout.partial_floats);
}

// One panel at a time on each thread: a column of S may lie in any row, and its entries are added in order.
int64_t csr_transposed_workspace(const CsrMatmulTransposed& p) {
  return bytes_of(ceil_div(p.m, kPanelLanes) * (panel_floats(p.s.n, kPanelLanes) + panel_floats(p.s.k, kPanelLanes)));
}

void csr_matmul_transposed(const CsrMatmulTransposed& p, Stream) {
  const SparseLoops& loops = sparse_loops();
  const int64_t g_floats = panel_floats(p.s.n, kPanelLanes), floats = g_floats + panel_floats(p.s.k, kPanelLanes);
  float* const data = aligned(p.workspace);
  parallel_for(ceil_div(p.m, kPanelLanes), 1, [&](int64_t begin, int64_t end) {
    float* const own = data + begin * floats;  // a range's panels follow each other in the memory of its first
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i * kPanelLanes;
      const Panel g{own, row, std::min<int64_t>(p.m - row, kPanelLanes), kPanelLanes};
      loops.pack(p.g, p.dtype, p.s.n, g, 0, p.s.n);
      loops.transposed(p, g, own + g_floats);
    }
  });
}

int64_t csr_grad_values_workspace(const CsrGradValues& p) {
  const int64_t panels = ceil_div(p.m, kPanelLanes);
  return bytes_of(panels * (panel_floats(p.s.n, kPanelLanes) + panel_floats(p.s.k, kPanelLanes))) +
         panels * 2 * static_cast<int64_t>(sizeof(Panel)) + 64;
}

void csr_grad_values(const CsrGradValues& p, Stream) {
  const SparseLoops& loops = sparse_loops();
  const int64_t panels = ceil_div(p.m, kPanelLanes);
  const int64_t g_floats = panel_floats(p.s.n, kPanelLanes), x_floats = panel_floats(p.s.k, kPanelLanes);
  float* const g_data = aligned(p.workspace);
  float* const x_data = g_data + panels * g_floats;
  Panel* const g_panels = reinterpret_cast<Panel*>(x_data + panels * x_floats);
  Panel* const x_panels = g_panels + panels;
  for (int64_t i = 0; i < panels; ++i) {
    const int64_t row = i * kPanelLanes, rows = std::min<int64_t>(p.m - row, kPanelLanes);
    g_panels[i] = {g_data + i * g_floats, row, rows, kPanelLanes};
    x_panels[i] = {x_data + i * x_floats, row, rows, kPanelLanes};
  }
  pack_panels(loops, p.g, p.dtype, p.s.n, 0, panels, [&](int64_t i) { return g_panels[i]; });
  pack_panels(loops, p.x, p.dtype, p.s.k, 0, panels, [&](int64_t i) { return x_panels[i]; });
  parallel_for(csr_chunks(p.s.nnz, kChunk), 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) loops.grad_values(p, g_panels, x_panels, panels, chunk);
  });
}

}  // namespace octavo::cpu

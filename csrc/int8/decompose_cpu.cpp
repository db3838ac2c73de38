#include "int8/decompose.h"
#include "int8/quantize.h"
#include "outlier/outlier.h"

namespace octavo::cpu {

// x is read twice, the second time from cache where it fits.
void decompose(const Decompose& p, Stream stream) {
  outlier_flags({p.x, p.dtype, p.flags, p.threshold, p.rows, p.cols}, stream);
  compact_columns({p.flags, p.columns, p.count, p.cols}, stream);
  quantize_rows({p.x, p.dtype, p.codes, p.scale, p.flags, 0.0f, p.rows, p.cols}, stream);
}

}  // namespace octavo::cpu

#pragma once
#include "common/dtype.h"

namespace octavo {

// One step of an optimizer over many tensors. The arithmetic of each optimizer: rules.h. States are either fp32, or
// 8-bit codes with one absmax per block (common/codebook.h): moments by the signed dynamic map, and of the second
// moment v its root sqrt(v), by the unsigned map, where what is above 0 gets at least code 1, so that no root that a
// moment is divided by rounds to 0. All are coded with dither: a step changes a state by (1 - beta) of what is new,
// which is less than half the distance of two codes for slow betas in the upper decades, and for any beta in the lower
// ones: the nearest code would be the old one for ever.

constexpr int kMaxStates = 3;
constexpr int64_t kOptimBlock = 256;  // elements of a block
constexpr int64_t kChunkBlocks = 32;  // blocks of a chunk, the unit of work of a thread block
constexpr int kOptimWords = 18;       // 8-byte words of an OptimTensor

// One parameter, contiguous. Blocks do not cross rows: row r has the elements [r * row, (r + 1) * row), of which its
// block b (of ceil(row / 256)) has up to 256 from b * 256 on. A flat state has one row of `count` elements.
struct OptimTensor {
  void* param;                // [count]
  const void* grad;           // [count]
  void* state[kMaxStates];    // [count] codes or fp32: the rule's moments, then the second moment (root, or v in fp32)
  float* absmax[kMaxStates];  // [rows * ceil(row / 256)], null for fp32 states
  void* compensation;         // [count] of the parameter's dtype: Kahan's compensation, or null
  const double* step;         // [1]: this step's number, from 1 on: exact up to 2^53, where fp32 stops at 2^24
  int64_t count, row;
  int64_t row_blocks;               // ceil(row / 256)
  int64_t first_block;              // of this tensor, counting over all tensors
  int64_t first_chunk;              // likewise
  int32_t param_dtype, grad_dtype;  // DType
  int32_t quantized;                // whether states are codes
  uint32_t id;                      // of the parameter, for random numbers
  int64_t position;                 // among the caller's tensors: row of its sums
};
static_assert(sizeof(OptimTensor) == 8 * kOptimWords);

enum class Rule : int32_t {
  sgd,
  momentum,
  adam,
  rmsprop,
  rmsprop_momentum,
  adagrad,
  lion,
  ademamix,
  lamb,
  lars,
  stable_adamw
};

// What a rule has to know of whole tensors before it can step: two sums over their elements each. Elements that the
// step will leave alone add nothing to them, but are counted. Both add up over the shards of a tensor.
enum class Sums : int32_t {
  none,
  norms,  // squares of the parameter, and of LAMB's direction or LARS's gradient
  ratio   // g^2 / max(v, eps^2) with the new second moment v, and 1
};

// As the ops name them, and how many moments and second moments each keeps.
struct RuleInfo {
  const char* name;
  Rule rule;
  int states;
  Sums sums;
};
constexpr RuleInfo kRules[] = {
    {"sgd", Rule::sgd, 0, Sums::none},
    {"momentum", Rule::momentum, 1, Sums::none},
    {"adam", Rule::adam, 2, Sums::none},
    {"rmsprop", Rule::rmsprop, 1, Sums::none},
    {"rmsprop_momentum", Rule::rmsprop_momentum, 2, Sums::none},
    {"adagrad", Rule::adagrad, 1, Sums::none},
    {"lion", Rule::lion, 1, Sums::none},
    {"ademamix", Rule::ademamix, 3, Sums::none},
    {"lamb", Rule::lamb, 2, Sums::norms},
    {"lars", Rule::lars, 1, Sums::norms},
    {"stable_adamw", Rule::stable_adamw, 2, Sums::ratio},
};

// What a rule is set to; it reads the fields that it names (rules.h). Doubles, as Python has them.
struct Hyper {
  double lr, weight_decay, eps;
  double beta1, beta2, beta3;  // momentum, alpha of RMSprop: beta1, beta2
  double dampening, alpha, alpha_steps, beta3_steps;
  double lr_decay, trust_coefficient;
  double decoupled, nesterov, bias_correction;  // 0 or 1
};

struct OptimStep {
  const OptimTensor* tensors;  // [tensor_count]
  const int32_t* chunks;       // [chunk_count]: the tensor of each chunk
  const uint64_t* mark;        // [1]: what the table says it was made of (mark_of in optim8.cpp); null: unchecked
  uint64_t wanted_mark;        // what it must say
  int64_t tensor_count, block_count, chunk_count;
  int64_t wide_chunks;  // tensors with fp32 parameters come first, with this many chunks; then those with 16 bits
  Rule rule;
  Hyper hyper;
  const float* lr;           // replaces hyper.lr where not null
  const float* grad_scale;   // gradients are divided by it, where not null
  const float* found_inf;    // where not null and not 0, nothing changes
  const float* grad_factor;  // gradients are multiplied by it, where not null
  double* chunk_sums;        // [chunk_count, 2] workspace of optim_sums
  double* new_sums;          // [tensor_count, 2] what optim_sums writes, by position; zeros where nothing changes
  const double* sums;        // [tensor_count, 2] what optim_step reads of it, if its rule has any
  int64_t* nonfinite;        // [1] += elements left alone: their gradient, new state or direction is NaN or Inf
  uint64_t seed;
  bool maximize;
  bool stochastic;  // round bf16 parameters up or down at random, the nearer the likelier
};

// The numbers that one step of one tensor uses, derived once in double. Each rule names those that it reads.
struct Factors {
  float grad;          // what gradients are multiplied by: scale, clipping, sign
  float shrink;        // 1 - lr * weight_decay, or 1
  float l2;            // weight_decay, or 0
  float size;          // of the step
  float beta1, rest1;  // rest: 1 - beta
  float beta2, rest2;
  float beta3, rest3;
  float root_scale;  // 1 / sqrt(1 - beta2^t), or 1
  float eps;
  float a, b;   // the rule's own
  float trust;  // LARS: of the layer
};

#define OCTAVO_OPTIM_KERNELS                 \
  void optim_sums(const OptimStep&, Stream); \
  void optim_step(const OptimStep&, Stream);
namespace cpu {
OCTAVO_OPTIM_KERNELS
}
namespace cuda {
OCTAVO_OPTIM_KERNELS
}
namespace simt {
OCTAVO_OPTIM_KERNELS
}
#undef OCTAVO_OPTIM_KERNELS

}  // namespace octavo

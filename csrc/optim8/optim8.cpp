#include "optim8/optim8.h"

#include <algorithm>
#include <cstring>

#include "common/op.h"

namespace octavo {
namespace {

using Tensors = std::vector<Tensor>;

// What the ops are given: per parameter its gradient and step, `states` states (states[i * states + s]) with an absmax
// each (no elements: an fp32 state), and a compensation (no elements: none; the list may be empty).
struct Lists {
  const Tensors &params, &grads, &steps, &states, &absmax, &compensation;
  int64_t states_each() const { return params.empty() ? 0 : static_cast<int64_t>(states.size() / params.size()); }
};

std::string where(const char* op, const char* list, size_t i) {
  return std::string(op) + ": " + list + "[" + std::to_string(i) + "]";
}

void check_as_param(const char* op, const char* list, size_t i, const Tensor& t, const Tensor& param) {
  STD_TORCH_CHECK(shape(t) == shape(param), where(op, list, i), " has shape ", shape_of(t), " but its parameter has ",
                  shape_of(param));
  STD_TORCH_CHECK(device_of(t) == device_of(param), where(op, list, i), " is on ", device_of(t),
                  " but its parameter on ", device_of(param));
  STD_TORCH_CHECK(t.is_contiguous(), where(op, list, i), " must be contiguous, got shape ", shape_of(t));
}

// Blocks of one row: flat states have one absmax list, those in rows a matrix of it.
int64_t check_absmax(const char* op, size_t i, const Tensor& absmax, const Tensor& param) {
  const int64_t count = param.numel();
  check_dtype(op, "absmax", absmax, ScalarType::Float);
  STD_TORCH_CHECK(absmax.is_contiguous() && device_of(absmax) == device_of(param), where(op, "absmax", i),
                  " must be contiguous and on ", device_of(param));
  if (count == 0 && absmax.numel() == 0) return 0;  // of a shard of no rows: [0, blocks of a row]
  if (absmax.dim() == 1 && absmax.size(0) == ceil_div(count, kOptimBlock)) return count;
  if (absmax.dim() == 2 && absmax.size(0) > 0 && count % absmax.size(0) == 0) {
    const int64_t row = count / absmax.size(0);
    if (absmax.size(1) == ceil_div(row, kOptimBlock)) return row;
  }
  STD_TORCH_CHECK(false, where(op, "absmax", i), " has shape ", shape_of(absmax),
                  ", which does not fit a parameter of ", count, " elements in blocks of ", kOptimBlock, ": [",
                  ceil_div(count, kOptimBlock), "], or [rows, blocks of a row]");
  return 0;
}

// The tensors in the order of the launches, fp32 parameters first. Every check of the lists is here.
struct Plan {
  std::vector<OptimTensor> tensors;
  std::vector<int32_t> chunks;
  int64_t block_count = 0, wide_chunks = 0;

  Plan(const char* op, const Lists& lists, const std::vector<int64_t>* ids) {
    const size_t count = lists.params.size();
    const auto check_size = [&](const char* list, size_t size, size_t wanted) {
      STD_TORCH_CHECK(size == wanted, op, ": ", count, " params need ", wanted, " ", list, ", got ", size);
    };
    check_size("grads", lists.grads.size(), count);
    check_size("steps", lists.steps.size(), count);
    check_size("absmax", lists.absmax.size(), lists.states.size());
    if (!lists.compensation.empty()) check_size("compensation", lists.compensation.size(), count);
    if (ids) check_size("ids", ids->size(), count);
    const int64_t each = lists.states_each();
    STD_TORCH_CHECK(each <= kMaxStates && lists.states.size() == static_cast<size_t>(each) * count, op, ": ", count,
                    " params cannot have ", lists.states.size(), " states");
    tensors.reserve(count);
    for (const bool wide : {true, false}) {
      for (size_t i = 0; i < count; ++i)
        if ((lists.params[i].scalar_type() == ScalarType::Float) == wide) add(op, lists, each, ids, i);
      if (wide) wide_chunks = static_cast<int64_t>(chunks.size());
    }
  }

 private:
  void add(const char* op, const Lists& lists, int64_t each, const std::vector<int64_t>* ids, size_t i) {
    const Tensor &param = lists.params[i], &grad = lists.grads[i], &step = lists.steps[i];
    OptimTensor t{};
    t.param_dtype = static_cast<int32_t>(float_dtype(op, "params", param));
    t.grad_dtype = static_cast<int32_t>(float_dtype(op, "grads", grad));
    STD_TORCH_CHECK(device_of(param) == device_of(lists.params[0]), where(op, "params", i), " is on ", device_of(param),
                    " but params[0] on ", device_of(lists.params[0]));
    STD_TORCH_CHECK(param.is_contiguous(), where(op, "params", i), " must be contiguous, got shape ", shape_of(param));
    check_as_param(op, "grads", i, grad, param);
    check_dtype(op, "steps", step, ScalarType::Double);
    STD_TORCH_CHECK(step.numel() == 1 && device_of(step) == device_of(param), where(op, "steps", i),
                    " must be one number on ", device_of(param));
    t.count = t.row = param.numel();
    t.param = param.mutable_data_ptr();
    t.grad = grad.const_data_ptr();
    t.step = step.const_data_ptr<double>();
    for (int64_t s = 0; s < each; ++s) {
      const size_t at = i * static_cast<size_t>(each) + static_cast<size_t>(s);
      const Tensor &state = lists.states[at], &absmax = lists.absmax[at];
      check_as_param(op, "states", at, state, param);
      const bool quantized = state.scalar_type() == ScalarType::Byte;
      STD_TORCH_CHECK(quantized || state.scalar_type() == ScalarType::Float, where(op, "states", at),
                      " must be uint8 or float32, got ", name_of(state.scalar_type()));
      STD_TORCH_CHECK(s == 0 || quantized == (t.quantized != 0), where(op, "states", at),
                      ": the states of a parameter are all uint8 or all float32");
      t.quantized = quantized;
      t.state[s] = state.mutable_data_ptr();
      if (!quantized) continue;
      const int64_t row = check_absmax(op, at, absmax, param);
      STD_TORCH_CHECK(s == 0 || row == t.row, where(op, "absmax", at),
                      ": the states of a parameter have the same rows");
      t.row = row;
      t.absmax[s] = absmax.mutable_data_ptr<float>();
    }
    if (!lists.compensation.empty() && lists.compensation[i].numel() > 0) {
      const Tensor& kept = lists.compensation[i];
      check_as_param(op, "compensation", i, kept, param);
      STD_TORCH_CHECK(kept.scalar_type() == param.scalar_type() && param.scalar_type() != ScalarType::Float,
                      where(op, "compensation", i), " must be of its parameter's 16-bit dtype, got ",
                      name_of(kept.scalar_type()), " for ", name_of(param.scalar_type()));
      t.compensation = kept.mutable_data_ptr();
    }
    t.row_blocks = ceil_div(t.row, kOptimBlock);
    t.id = ids ? static_cast<uint32_t>((*ids)[i]) : 0;
    t.position = static_cast<int64_t>(i);
    t.first_block = block_count;
    t.first_chunk = static_cast<int64_t>(chunks.size());
    const int64_t blocks = t.count ? t.count / t.row * t.row_blocks : 0;
    chunks.insert(chunks.end(), ceil_div(blocks, kChunkBlocks), static_cast<int32_t>(tensors.size()));
    block_count += blocks;
    tensors.push_back(t);
  }
};

// What a table was made of, in one word: everything but the ids, which only the table has.
uint64_t mark_of(const Plan& plan) {
  uint64_t mark = 0x6f637461766f3038;
  const auto add = [&](uint64_t word) {  // the finalizer of splitmix64, for each word
    mark = (mark ^ word) + 0x9e3779b97f4a7c15;
    mark = (mark ^ (mark >> 30)) * 0xbf58476d1ce4e5b9;
    mark = (mark ^ (mark >> 27)) * 0x94d049bb133111eb;
    mark ^= mark >> 31;
  };
  for (OptimTensor t : plan.tensors) {
    t.id = 0;
    uint64_t words[kOptimWords];
    std::memcpy(words, &t, sizeof(t));
    for (const uint64_t word : words) add(word);
  }
  for (const int32_t chunk : plan.chunks) add(static_cast<uint64_t>(chunk));
  return mark;
}

// Whether a table on the CPU is what `plan` makes, whatever the ids.
bool is_table_of(const char* bytes, const Plan& plan) {
  for (const OptimTensor& wanted : plan.tensors) {
    OptimTensor t;
    std::memcpy(&t, bytes, sizeof(t));
    t.id = wanted.id;
    if (std::memcmp(&t, &wanted, sizeof(t)) != 0) return false;
    bytes += sizeof(t);
  }
  return plan.chunks.empty() || std::memcmp(bytes, plan.chunks.data(), plan.chunks.size() * 4) == 0;
}

int64_t words_of(const Plan& plan) {
  return static_cast<int64_t>(plan.tensors.size()) * kOptimWords + (static_cast<int64_t>(plan.chunks.size()) + 1) / 2 +
         1;
}

// The table that kernels read: the tensors' words, then the chunks, then the mark, in int64. It holds addresses: of use
// only with the same tensors. Made on the CPU; the caller moves it to where the parameters are.
Tensor optim_table(const Tensors& params, const Tensors& grads, const Tensors& steps, const Tensors& states,
                   const Tensors& absmax, const Tensors& compensation, const std::vector<int64_t>& ids) {
  const Plan plan("optim_table", {params, grads, steps, states, absmax, compensation}, &ids);
  const size_t tensor_bytes = plan.tensors.size() * sizeof(OptimTensor), chunk_bytes = plan.chunks.size() * 4;
  const int64_t words = words_of(plan);
  const uint64_t mark = mark_of(plan);
  Tensor table = torch::stable::empty({words}, ScalarType::Long, std::nullopt,
                                      torch::stable::Device(torch::headeronly::DeviceType::CPU));
  char* bytes = static_cast<char*>(table.mutable_data_ptr());
  std::memset(bytes, 0, static_cast<size_t>(words) * 8);
  if (tensor_bytes) std::memcpy(bytes, plan.tensors.data(), tensor_bytes);
  if (chunk_bytes) std::memcpy(bytes + tensor_bytes, plan.chunks.data(), chunk_bytes);
  std::memcpy(bytes + (words - 1) * 8, &mark, 8);
  return table;
}

const float* scalar_on(const char* op, const char* name, const std::optional<Tensor>& t, const Tensor& param) {
  if (!t) return nullptr;
  check_dtype(op, name, *t, ScalarType::Float);
  check_same_device(op, name, *t, param);
  STD_TORCH_CHECK(t->numel() == 1, op, ": ", name, " must be one number, got shape ", shape_of(*t));
  return t->const_data_ptr<float>();
}

const RuleInfo& rule_named(const char* op, const std::string& name) {
  const RuleInfo* info =
      std::find_if(std::begin(kRules), std::end(kRules), [&](const auto& r) { return name == r.name; });
  STD_TORCH_CHECK(info != std::end(kRules), op, ": unknown rule '", name, "'");
  return *info;
}

// What both passes are given beside the lists.
struct Settings {
  const Tensor& table;
  const RuleInfo& rule;
  const std::vector<double>& hyper;
  const std::optional<Tensor>&grad_scale, &found_inf, &grad_factor;
  bool maximize;
};

// The call that both make of it; every check of these is here. The lists may not be empty.
OptimStep describe(const char* op, const Lists& lists, const Plan& plan, const Settings& given) {
  const Tensor &first = lists.params[0], &table = given.table;
  STD_TORCH_CHECK(given.hyper.size() * sizeof(double) == sizeof(Hyper), op, ": hyper must hold ",
                  sizeof(Hyper) / sizeof(double), " numbers, got ", given.hyper.size());
  STD_TORCH_CHECK(lists.states_each() == given.rule.states, op, ": rule '", given.rule.name, "' has ",
                  given.rule.states, " states per parameter, got ", lists.states_each());
  check_dtype(op, "table", table, ScalarType::Long);
  check_same_device(op, "table", table, first);
  const int64_t tensor_words = static_cast<int64_t>(plan.tensors.size()) * kOptimWords;
  const int64_t words = words_of(plan);
  STD_TORCH_CHECK(table.dim() == 1 && table.size(0) == words, op,
                  ": the table does not belong to these tensors: it has ", table.numel(), " words instead of ", words);
  STD_TORCH_CHECK(table.is_contiguous(), op, ": the table must be contiguous, got a stride of ", table.stride(0));
  const auto* bytes = static_cast<const char*>(table.const_data_ptr());
  STD_TORCH_CHECK(!table.is_cpu() || is_table_of(bytes, plan), op,
                  ": the table does not belong to these tensors: it has other addresses, sizes or dtypes");
  OptimStep s{};
  s.mark = reinterpret_cast<const uint64_t*>(bytes) + words - 1;
  s.wanted_mark = mark_of(plan);
  s.tensors = static_cast<const OptimTensor*>(table.const_data_ptr());
  s.chunks = reinterpret_cast<const int32_t*>(static_cast<const int64_t*>(table.const_data_ptr()) + tensor_words);
  s.tensor_count = static_cast<int64_t>(plan.tensors.size());
  s.block_count = plan.block_count;
  s.chunk_count = static_cast<int64_t>(plan.chunks.size());
  s.wide_chunks = plan.wide_chunks;
  s.rule = given.rule.rule;
  std::memcpy(&s.hyper, given.hyper.data(), sizeof(Hyper));
  s.grad_scale = scalar_on(op, "grad_scale", given.grad_scale, first);
  s.found_inf = scalar_on(op, "found_inf", given.found_inf, first);
  s.grad_factor = scalar_on(op, "grad_factor", given.grad_factor, first);
  s.maximize = given.maximize;
  return s;
}

// Makes the sums of the rule, in the order of the caller's tensors.
template <class B>
Tensor new_sums(OptimStep s, const Tensor& first, Stream stream) {
  const Tensor chunks = empty({s.chunk_count, 2}, ScalarType::Double, first);
  const Tensor sums = empty({s.tensor_count, 2}, ScalarType::Double, first);
  s.chunk_sums = chunks.mutable_data_ptr<double>();
  s.new_sums = sums.mutable_data_ptr<double>();
  B::optim_sums(s, stream);
  return sums;
}

template <class B>
Tensor optim_sums(const Tensors& params, const Tensors& grads, const Tensors& steps, const Tensors& states,
                  const Tensors& absmax, const Tensors& compensation, const Tensor& table, const std::string& rule,
                  const std::vector<double>& hyper, const std::optional<Tensor>& grad_scale,
                  const std::optional<Tensor>& found_inf, const std::optional<Tensor>& grad_factor, bool maximize) {
  constexpr const char* op = "optim_sums";
  const RuleInfo& info = rule_named(op, rule);
  STD_TORCH_CHECK(info.sums != Sums::none, op, ": rule '", rule, "' needs no sums over whole tensors");
  const Lists lists{params, grads, steps, states, absmax, compensation};
  const Plan plan(op, lists, nullptr);
  if (params.empty()) return empty({0, 2}, ScalarType::Double, table);
  const OptimStep s = describe(op, lists, plan, {table, info, hyper, grad_scale, found_inf, grad_factor, maximize});
  const OnDeviceOf device(params[0]);
  return new_sums<B>(s, params[0], device.stream());
}

template <class B>
void optim_step(const Tensors& params, const Tensors& grads, const Tensors& steps, const Tensors& states,
                const Tensors& absmax, const Tensors& compensation, const Tensor& nonfinite, const Tensor& table,
                const std::string& rule, const std::vector<double>& hyper, const std::optional<Tensor>& lr,
                const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf,
                const std::optional<Tensor>& grad_factor, bool maximize, bool stochastic, int64_t seed,
                const std::optional<Tensor>& sums) {
  constexpr const char* op = "optim_step";
  const RuleInfo& info = rule_named(op, rule);
  const Lists lists{params, grads, steps, states, absmax, compensation};
  const Plan plan(op, lists, nullptr);
  if (params.empty()) return;
  const Tensor& first = params[0];
  OptimStep s = describe(op, lists, plan, {table, info, hyper, grad_scale, found_inf, grad_factor, maximize});
  check_dtype(op, "nonfinite", nonfinite, ScalarType::Long);
  check_same_device(op, "nonfinite", nonfinite, first);
  STD_TORCH_CHECK(nonfinite.numel() == 1, op, ": nonfinite must be one number, got shape ", shape_of(nonfinite));
  s.lr = scalar_on(op, "lr", lr, first);
  s.nonfinite = nonfinite.mutable_data_ptr<int64_t>();
  s.seed = static_cast<uint64_t>(seed);
  s.stochastic = stochastic;
  if (sums) {
    STD_TORCH_CHECK(info.sums != Sums::none, op, ": rule '", rule, "' needs no sums over whole tensors");
    check_dtype(op, "sums", *sums, ScalarType::Double);
    check_same_device(op, "sums", *sums, first);
    STD_TORCH_CHECK(sums->dim() == 2 && sums->size(0) == s.tensor_count && sums->size(1) == 2 && sums->is_contiguous(),
                    op, ": sums must be contiguous [", s.tensor_count, ", 2], got shape ", shape_of(*sums));
  }
  if (s.block_count == 0) return;
  const OnDeviceOf device(first);
  Tensor made;
  if (info.sums != Sums::none) {
    if (!sums) made = new_sums<B>(s, first, device.stream());
    s.sums = (sums ? *sums : made).const_data_ptr<double>();
  }
  B::optim_step(s, device.stream());
}

template <class B>
void register_ops(Library& m) {
  m.impl("optim_table", TORCH_BOX(&optim_table));
  m.impl("optim_sums", TORCH_BOX(&optim_sums<B>));
  m.impl("optim_step", TORCH_BOX(&optim_step<B>));
}

#define OPTIM_BACKEND(Name, OF)                        \
  struct Name {                                        \
    static constexpr auto optim_sums = OF(optim_sums); \
    static constexpr auto optim_step = OF(optim_step); \
  };
OCTAVO_REGISTER(register_ops, OPTIM_BACKEND)

}  // namespace
}  // namespace octavo

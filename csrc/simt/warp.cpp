#include "simt/warp.h"

#include <algorithm>

namespace octavo::simt_machine {
namespace {

template <class Operand>
Operand& of(void* const operands[32], int lane) {
  return *static_cast<Operand*>(operands[lane]);
}

template <class F>
void for_each_lane(uint32_t lanes, const F& f) {
  for (int lane = 0; lane < 32; ++lane)
    if (lanes >> lane & 1) f(lane);
}

struct ShuffleOperand {
  uint64_t value, result;
  int operand, width;
};

int source_lane(Shuffle kind, int lane, int operand, int width) {
  const int first = lane & ~(width - 1), end = first + width;  // of the lane's segment
  int source = lane;
  switch (kind) {
    case Shuffle::index: return first + (operand & (width - 1));
    case Shuffle::up: source = lane - operand; return source < first ? lane : source;
    case Shuffle::down: source = lane + operand; return source >= end ? lane : source;
    case Shuffle::exclusive_or: source = lane ^ operand; return source >= end ? lane : source;
  }
  return source;
}

template <Shuffle kind>
void combine_shuffle(void* const operands[32], uint32_t lanes) {
  for_each_lane(lanes, [&](int lane) {
    auto& to = of<ShuffleOperand>(operands, lane);
    const int source = source_lane(kind, lane, to.operand, to.width);
    if (!(lanes >> source & 1)) fail("lane %d shuffles from lane %d, which takes no part", lane, source);
    to.result = of<ShuffleOperand>(operands, source).value;
  });
}

struct BallotOperand {
  bool vote;
  uint32_t result;
};

void combine_ballot(void* const operands[32], uint32_t lanes) {
  uint32_t votes = 0;
  for_each_lane(lanes, [&](int lane) { votes |= uint32_t{of<BallotOperand>(operands, lane).vote} << lane; });
  for_each_lane(lanes, [&](int lane) { of<BallotOperand>(operands, lane).result = votes; });
}

template <Reduce kind>
void combine_reduce(void* const operands[32], uint32_t lanes) {
  bool first = true;
  int64_t total = 0;
  for_each_lane(lanes, [&](int lane) {
    const auto value = of<int64_t>(operands, lane);
    if (first)
      total = value;
    else if (kind == Reduce::add)
      total += value;
    else if (kind == Reduce::min)
      total = std::min(total, value);
    else if (kind == Reduce::max)
      total = std::max(total, value);
    else if (kind == Reduce::bit_and)
      total &= value;
    else if (kind == Reduce::bit_or)
      total |= value;
    else
      total ^= value;
    first = false;
  });
  for_each_lane(lanes, [&](int lane) { of<int64_t>(operands, lane) = total; });
}

struct MatchOperand {
  uint64_t value;
  uint32_t result;
};

void combine_match(void* const operands[32], uint32_t lanes) {
  for_each_lane(lanes, [&](int lane) {
    auto& mine = of<MatchOperand>(operands, lane);
    mine.result = 0;
    for_each_lane(lanes, [&](int other) {
      mine.result |= uint32_t{of<MatchOperand>(operands, other).value == mine.value} << other;
    });
  });
}

}  // namespace

uint64_t shuffle_bits(const char* name, Shuffle kind, uint32_t mask, uint64_t value, int operand, int width,
                      Where where) {
  static constexpr Combine combine[] = {combine_shuffle<Shuffle::index>, combine_shuffle<Shuffle::up>,
                                        combine_shuffle<Shuffle::down>, combine_shuffle<Shuffle::exclusive_or>};
  if (width < 1 || width > 32 || (width & (width - 1))) fail("shuffle width %d", width);
  ShuffleOperand mine{value, 0, operand, width};
  collective(name, mask, &mine, combine[static_cast<int>(kind)], MemoryOrder::none, where);
  return mine.result;
}

uint32_t ballot(const char* name, uint32_t mask, bool vote, Where where) {
  BallotOperand mine{vote, 0};
  collective(name, mask, &mine, combine_ballot, MemoryOrder::none, where);
  return mine.result;
}

int64_t reduce(const char* name, Reduce kind, uint32_t mask, int64_t value, Where where) {
  static constexpr Combine combine[] = {combine_reduce<Reduce::add>,    combine_reduce<Reduce::min>,
                                        combine_reduce<Reduce::max>,    combine_reduce<Reduce::bit_and>,
                                        combine_reduce<Reduce::bit_or>, combine_reduce<Reduce::bit_xor>};
  collective(name, mask, &value, combine[static_cast<int>(kind)], MemoryOrder::none, where);
  return value;
}

uint32_t match_any(uint32_t mask, uint64_t value, Where where) {
  MatchOperand mine{value, 0};
  collective("__match_any_sync", mask, &mine, combine_match, MemoryOrder::none, where);
  return mine.result;
}

void sync_warp(uint32_t mask, Where where) {
  collective("__syncwarp", mask, nullptr, [](void* const*, uint32_t) {}, MemoryOrder::warp, where);
}

}  // namespace octavo::simt_machine

#pragma once
#include <string>

namespace octavo::simt {

// The order in which the host SIMT machine runs blocks, and the threads between two barriers: "forward", "reverse" or
// "random:SEED". A right kernel gives the same bits in all of them. The start value is the environment variable
// OCTAVO_SIMT_ORDER, else forward. Throws std::invalid_argument on anything else.
void set_order(const std::string& order);

}  // namespace octavo::simt

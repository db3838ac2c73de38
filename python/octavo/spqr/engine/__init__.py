"""SpQR's quantizer: from a weight and its inputs to codes, statistics and outliers."""

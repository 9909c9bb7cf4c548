// A matrix times a vector: weights are read once, as they are kept, at the pace of memory.

#pragma once

#include "vectors.h"

namespace streamllm {

constexpr int rows_at_once = 4;  // whose sums hide what an addition takes

// found[i] = weights[first + i] . vector, of `rows` rows of `columns` numbers.
template <Kept kept, int rows>
inline void products_of_rows(const char* weights, const float* vector, int64_t first, int64_t columns, float* found) {
  Floats sum[rows] = {};
  const auto add = [&](int64_t i, const Floats& numbers, auto loaded) {
    for (int row = 0; row < rows; row++) sum[row] += loaded((first + row) * columns + i) * numbers;
  };
  int64_t i = 0;
  for (; i + lanes <= columns; i += lanes) {
    if (i * bytes_of(kept) % 64 == 0)
      for (int row = 0; row < rows; row++) prefetch<kept>(weights, (first + rows + row) * columns + i, 1);
    add(i, at<Floats>(vector + i), [&](int64_t place) { return load<kept>(weights, place); });
  }
  if (i < columns) {
    const int64_t rest = columns - i;
    add(i, load_some<FLOAT32>(reinterpret_cast<const char*>(vector), i, rest),
        [&](int64_t place) { return load_some<kept>(weights, place, rest); });
  }
  for (int row = 0; row < rows; row++) {
    found[row] = 0;
    for (int j = 0; j < lanes; j++) found[row] += sum[row][j];
  }
}

// weights (rows, columns), vector (columns), scale (rows) or null -> output (rows)
template <Kept kept, typename InParallel>
void multiply(const char* weights, const float* vector, const float* scale, float* output, int64_t rows,
                   int64_t columns, const InParallel& in_parallel) {
  in_parallel((rows + rows_at_once - 1) / rows_at_once, [&](int64_t block) {
    const int64_t first = block * rows_at_once, count = std::min<int64_t>(rows_at_once, rows - first);
    float* found = output + first;
    if (count == rows_at_once)
      products_of_rows<kept, rows_at_once>(weights, vector, first, columns, found);
    else
      for (int64_t i = 0; i < count; i++) products_of_rows<kept, 1>(weights, vector, first + i, columns, found + i);
    for (int64_t i = 0; scale != nullptr && i < count; i++) found[i] *= scale[first + i];
  });
}

}  // namespace streamllm

// A matrix times a vector: weights are read once, as they are kept, at the pace of memory.

#pragma once

#include "vectors.h"

namespace streamllm {

// How rows are gone through together: so many that their sums hide what an addition takes.
template <Kept kept>
struct Rows {
  // Eight far apart, each of which the hardware follows by itself, are a tenth faster than neighbours. Bytes are slower
  // so: of them, four neighbours, the block to come being asked for.
  static constexpr bool far = bytes_of(kept) > 1;
  static constexpr int count = far ? 8 : 4;
};

// output[i apart] = weights[first + i apart] . vector, of `rows` rows of `columns` numbers, those to come being
// `ahead` numbers away.
template <Kept kept, int rows>
inline void products_of_rows(const char* weights, const float* vector, int64_t first, int64_t apart, int64_t columns,
                             int64_t ahead, float* output) {
  Floats sum[rows] = {};
  const auto add = [&](int64_t i, const Floats& numbers, auto loaded) {
    for (int row = 0; row < rows; row++) sum[row] += loaded((first + row * apart) * columns + i) * numbers;
  };
  int64_t i = 0;
  for (; i + lanes <= columns; i += lanes) {
    if (i * bytes_of(kept) % 64 == 0)
      for (int row = 0; row < rows; row++) prefetch<kept>(weights, (first + row * apart) * columns + i + ahead, 1);
    add(i, at<Floats>(vector + i), [&](int64_t place) { return load<kept>(weights, place); });
  }
  if (i < columns) {
    const int64_t rest = columns - i;
    add(i, load_some<FLOAT32>(reinterpret_cast<const char*>(vector), i, rest),
        [&](int64_t place) { return load_some<kept>(weights, place, rest); });
  }
  for (int row = 0; row < rows; row++) {
    float found = 0;
    for (int j = 0; j < lanes; j++) found += sum[row][j];
    output[row * apart] = found;
  }
}

// weights (rows, columns), vector (columns) -> output (rows)
template <Kept kept, typename InParallel>
void multiply(const char* weights, const float* vector, float* output, int64_t rows, int64_t columns,
              const InParallel& in_parallel) {
  constexpr int together = Rows<kept>::count;
  const int64_t blocks = rows / together, apart = Rows<kept>::far ? blocks : 1;
  const int64_t ahead = Rows<kept>::far ? 2048 / bytes_of(kept) : together * columns;
  in_parallel(blocks, [&](int64_t block) {
    const int64_t first = Rows<kept>::far ? block : block * together;
    products_of_rows<kept, together>(weights, vector, first, apart, columns, ahead, output + first);
  });
  for (int64_t row = blocks * together; row < rows; row++)
    products_of_rows<kept, 1>(weights, vector, row, 1, columns, 0, output + row);
}

}  // namespace streamllm

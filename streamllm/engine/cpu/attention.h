// One query's attention: every key and value is read once, as it is kept, for all query heads that share it.
//
// The softmax is taken along the way, tile after tile of keys (Milakov & Gimelshein 2018, FlashAttention's), all of it in
// float32. Threads share out heads and, where these do not come out even, cut the keys in parts (Flash-Decoding).

#pragma once

#include <numeric>
#include <type_traits>
#include <vector>

#include "vectors.h"

namespace streamllm {

constexpr int tile = 128;  // keys between two looks at the largest logit
constexpr int64_t ahead = 4096;  // bytes
constexpr int most_queries = 4;  // whose sums fit the registers together

inline int64_t padded(int64_t size) { return (size + lanes - 1) / lanes * lanes; }

struct Shape {
  int64_t heads, kv_heads, group, held, key_size, value_size;  // heads: of keys, times the batch; group: queries a key
};

// Of a softmax over some keys, for each query of a group: the largest logit, the sum of its weights, and the weighted
// sum of values, in rows of padded(value_size).
struct Part {
  std::vector<float> top, total, output;
};

// exp(x) for x <= 0, to 2e-7 of it; 0 below -87. Cephes' polynomial.
inline Floats exponential(const Floats& x) {
  const Floats magic = Floats{} + 12582912.0f;  // 1.5 2^23: adding it rounds to an integer
  const Floats clamped = x < -87.0f ? Floats{} - 87.0f : x;
  const Floats power = (clamped * 1.44269504088896341f + magic) - magic;
  const Floats rest = (clamped - power * 0.693359375f) + power * 2.12194440e-4f;
  Floats p = Floats{} + 1.9875691500e-4f;
  p = p * rest + 1.3981999507e-3f;
  p = p * rest + 8.3334519073e-3f;
  p = p * rest + 4.1665795894e-2f;
  p = p * rest + 1.6666665459e-1f;
  p = p * rest + 5.0000001201e-1f;
  p = p * rest * rest + rest + 1.0f;
  const Floats scale = bits_as<Floats>((__builtin_convertvector(power, Ints) + 127) << 23);
  return x < -87.0f ? Floats{} : p * scale;
}

// logits[q][k] of `queries` queries, scaled already and in rows of `width`, and keys first .. first + count - 1.
template <Kept kept, int queries>
inline void products(const float* query, int64_t width, const char* keys, int64_t size, int64_t first, int count,
                     float* logits) {
  constexpr int rows = queries == 3 ? 4 : queries, at_once = lanes / rows;
  for (int k = 0; k < count; k += at_once) {
    Floats partial[lanes] = {};
    prefetch<kept>(keys + ahead, (first + k) * size, at_once * size);
    const auto add = [&](int64_t i, auto loaded) {
      for (int j = 0; j < at_once; j++) {
        const Floats key = loaded((first + std::min(k + j, count - 1)) * size + i);
        for (int q = 0; q < queries; q++) partial[q * at_once + j] += at<Floats>(query + q * width + i) * key;
      }
    };
    int64_t i = 0;
    for (; i + lanes <= size; i += lanes) add(i, [&](int64_t place) { return load<kept>(keys, place); });
    if (i < size) add(i, [&](int64_t place) { return load_some<kept>(keys, place, size - i); });
    const Floats found = sums<lanes>(partial);
    for (int q = 0; q < queries; q++)
      for (int j = 0; j < at_once && k + j < count; j++) logits[q * tile + k + j] = found[q * at_once + j];
  }
}

// output[q] += sum over keys of weights[q][k] values[k], in `vectors` vectors of columns from one on; the last of them
// has `columns` columns, if these are less than its lanes.
template <Kept kept, int queries, int vectors>
inline void add_values(const char* values, int64_t size, int64_t column, int64_t first, int count, const float* weights,
                       float* output, int64_t width) {
  Floats sum[queries][vectors];
  for (int q = 0; q < queries; q++)
    for (int i = 0; i < vectors; i++) sum[q][i] = at<Floats>(output + q * width + column + i * lanes);
  const auto add = [&](auto loaded) {
    for (int k = 0; k < count; k++) {
      const int64_t row = (first + k) * size + column;
      prefetch<kept>(values + ahead, row, vectors * lanes);
      for (int i = 0; i < vectors; i++) {
        const Floats value = loaded(row + i * lanes);
        for (int q = 0; q < queries; q++) sum[q][i] += weights[q * tile + k] * value;
      }
    }
  };
  if (column + vectors * lanes <= size)
    add([&](int64_t place) { return load<kept>(values, place); });
  else
    add([&](int64_t place) { return load_some<kept>(values, place, size - column); });
  for (int q = 0; q < queries; q++)
    for (int i = 0; i < vectors; i++) store(output + q * width + column + i * lanes, sum[q][i]);
}

// Calls f(first, count) for `all` queries, counts being known to the compiler.
template <typename F>
inline void for_queries(int64_t all, const F& f) {
  int64_t first = 0;
  for (; first + most_queries <= all; first += most_queries) f(first, std::integral_constant<int, most_queries>());
  if (all - first == 3) f(first, std::integral_constant<int, 3>());
  if (all - first == 2) f(first, std::integral_constant<int, 2>());
  if (all - first == 1) f(first, std::integral_constant<int, 1>());
}

// Takes a query's logits (tile) to weights, and what was seen before to the same scale.
inline void weigh(float* logits, float& part_top, float& part_total, float* output, int64_t width) {
  float top = part_top;
  bool is_nan = false;
  for (int k = 0; k < tile; k++) {
    top = logits[k] > top ? logits[k] : top;
    is_nan |= logits[k] != logits[k];
  }
  if (is_nan) top = std::numeric_limits<float>::quiet_NaN();
  const float shift = top == -infinity ? 0.0f : top;  // where none is seen
  const float kept = std::exp(part_top - shift);
  Floats total{};
  for (int k = 0; k < tile; k += lanes) {
    const Floats weights = exponential(at<Floats>(logits + k) - shift);
    store(logits + k, weights);
    total += weights;
  }
  float sum = 0;
  for (int i = 0; i < lanes; i++) sum += total[i];
  part_top = top;
  part_total = part_total * kept + sum;
  for (int64_t i = 0; i < width; i++) output[i] *= kept;
}

// query: the group's, scaled already, in rows of padded(key_size); keys and values: of one head; begin .. end - 1 of
// them; seen (held), or null where all are; a logit x becomes cap tanh(x / cap), if cap > 0.
template <Kept kept>
void see(const Shape& shape, Part& part, const float* query, const char* keys, const char* values, const bool* seen,
         float cap, int64_t begin, int64_t end) {
  const int64_t width = padded(shape.key_size), out = padded(shape.value_size);
  std::vector<float> logits(shape.group * tile);
  for (int64_t first = begin; first < end; first += tile) {
    const int count = static_cast<int>(std::min<int64_t>(tile, end - first));
    for_queries(shape.group, [&](int64_t q, auto queries) {
      products<kept, queries>(query + q * width, width, keys, shape.key_size, first, count, logits.data() + q * tile);
    });
    for (int64_t q = 0; q < shape.group; q++) {
      float* of_query = logits.data() + q * tile;
      if (cap > 0)
        for (int k = 0; k < count; k++) of_query[k] = cap * std::tanh(of_query[k] / cap);
      if (seen != nullptr)
        for (int k = 0; k < count; k++) of_query[k] = seen[first + k] ? of_query[k] : -infinity;
      std::fill(of_query + count, of_query + tile, -infinity);
      weigh(of_query, part.top[q], part.total[q], part.output.data() + q * out, out);
    }
    for_queries(shape.group, [&](int64_t q, auto queries) {
      const float* weights = logits.data() + q * tile;
      float* output = part.output.data() + q * out;
      int64_t column = 0;
      for (; column + 4 * lanes <= shape.value_size; column += 4 * lanes)
        add_values<kept, queries, 4>(values, shape.value_size, column, first, count, weights, output, out);
      for (; column < shape.value_size; column += lanes)
        add_values<kept, queries, 1>(values, shape.value_size, column, first, count, weights, output, out);
    });
  }
}

// The softmax of one query over several parts of its keys.
inline void merge(const Shape& shape, const Part* parts, int64_t count, int64_t q, float* output) {
  float top = -infinity, total = 0;
  for (int64_t i = 0; i < count; i++) top = parts[i].top[q] > top ? parts[i].top[q] : top;
  std::fill(output, output + shape.value_size, 0.0f);
  for (int64_t i = 0; i < count; i++) {
    const float weight = parts[i].top[q] == -infinity ? 0.0f : std::exp(parts[i].top[q] - top);
    total += weight * parts[i].total[q];
    const float* of_part = parts[i].output.data() + q * padded(shape.value_size);
    for (int64_t j = 0; j < shape.value_size; j++) output[j] += weight * of_part[j];
  }
  for (int64_t j = 0; j < shape.value_size; j++) output[j] /= total;
}

// query (heads, group, key_size), keys (heads, held, key_size), values (heads, held, value_size); learned (kv_heads,
// group): one more logit for each query, without a value, or null -> output (heads, group, value_size)
template <Kept kept, typename InParallel>
void attention(const Shape& shape, const float* query, const char* keys, const char* values, const bool* seen,
               const float* learned, float* output, float scaling, float cap, int64_t threads,
               const InParallel& in_parallel) {
  const int64_t group = shape.group, width = padded(shape.key_size), out = padded(shape.value_size);
  const int64_t cuts = threads / std::gcd(threads, shape.heads);
  std::vector<Part> parts(shape.heads * cuts);
  in_parallel(shape.heads * cuts, [&](int64_t i) {
    const int64_t head = i / cuts, cut = i % cuts;
    std::vector<float> scaled(group * width);
    for (int64_t q = 0; q < group; q++)
      for (int64_t j = 0; j < shape.key_size; j++)
        scaled[q * width + j] = query[(head * group + q) * shape.key_size + j] * scaling;
    const bool learns = learned != nullptr && cut == 0;
    Part part{std::vector<float>(group, -infinity), std::vector<float>(group, learns ? 1.0f : 0.0f),
              std::vector<float>(group * out)};
    if (learns) std::copy_n(learned + head % shape.kv_heads * group, group, part.top.data());
    see<kept>(shape, part, scaled.data(), keys + head * shape.held * shape.key_size * bytes_of(kept),
              values + head * shape.held * shape.value_size * bytes_of(kept), seen, cap, shape.held * cut / cuts,
              shape.held * (cut + 1) / cuts);
    parts[i] = std::move(part);
  });
  for (int64_t head = 0; head < shape.heads; head++)
    for (int64_t q = 0; q < group; q++)
      merge(shape, parts.data() + head * cuts, cuts, q, output + (head * group + q) * shape.value_size);
}

}  // namespace streamllm

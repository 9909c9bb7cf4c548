// Numbers as weights and caches keep them, read as vectors of float32: vectors of GCC and Clang, for any processor.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace streamllm {

enum Kept { FLOAT32, FLOAT16, BFLOAT16, FLOAT8_E4M3, INT8 };

constexpr int64_t bytes_of(Kept kept) { return kept == FLOAT32 ? 4 : kept == FLOAT16 || kept == BFLOAT16 ? 2 : 1; }

#if defined(__AVX512F__)
constexpr int lanes = 16;
#elif defined(__AVX__)
constexpr int lanes = 8;
#else
constexpr int lanes = 4;
#endif
constexpr float infinity = std::numeric_limits<float>::infinity();

typedef float Floats __attribute__((vector_size(4 * lanes)));
typedef int32_t Ints __attribute__((vector_size(4 * lanes)));
typedef uint32_t Words __attribute__((vector_size(4 * lanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * lanes)));
typedef uint8_t Bytes __attribute__((vector_size(lanes)));
typedef int8_t SignedBytes __attribute__((vector_size(lanes)));

template <typename To, typename From>
inline To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <typename T>
inline T at(const void* place) {
  T found;
  std::memcpy(&found, place, sizeof found);
  return found;
}

template <int n>
inline Floats from_float16(const Halves& halves) {
  Floats found;
#if defined(__AVX512F__)
  if constexpr (n == 16) {
    const __m512 x = _mm512_cvtph_ps(at<__m256i>(&halves));
    std::memcpy(&found, &x, sizeof found);
    return found;
  }
#endif
#if defined(__F16C__)
  if constexpr (n <= 8) {
    __m128i bits = _mm_setzero_si128();
    std::memcpy(&bits, &halves, sizeof halves);
    const __m256 x = _mm256_cvtph_ps(bits);
    std::memcpy(&found, &x, sizeof found);
  }
#else
  for (int i = 0; i < n; i++) found[i] = static_cast<float>(bits_as<_Float16>(static_cast<uint16_t>(halves[i])));
#endif
  return found;
}

template <int n>
inline Words widened(const Halves& halves) {
#if defined(__AVX512F__)
  if constexpr (n == 16) {  // which GCC makes of two halves
    Words found;
    const __m512i x = _mm512_cvtepu16_epi32(at<__m256i>(&halves));
    std::memcpy(&found, &x, sizeof found);
    return found;
  }
#endif
  return __builtin_convertvector(halves, Words);
}

template <int n>
inline Floats from_int8(const SignedBytes& bytes) {
#if defined(__AVX512F__)
  if constexpr (n == 16) {
    Floats found;
    const __m512 x = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(at<__m128i>(&bytes)));
    std::memcpy(&found, &x, sizeof found);
    return found;
  }
#elif defined(__AVX2__)
  if constexpr (n == 8) {
    Floats found;
    const __m256 x = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(&bytes))));
    std::memcpy(&found, &x, sizeof found);
    return found;
  }
#endif
  return __builtin_convertvector(__builtin_convertvector(bytes, Ints), Floats);
}

// `lanes` numbers, from the one with that index on.
template <Kept kept>
inline Floats load(const char* numbers, int64_t index) {
  const char* place = numbers + index * bytes_of(kept);
  if constexpr (kept == FLOAT32) return at<Floats>(place);
  if constexpr (kept == FLOAT16) return from_float16<lanes>(at<Halves>(place));
  if constexpr (kept == BFLOAT16) return bits_as<Floats>(widened<lanes>(at<Halves>(place)) << 16);
  if constexpr (kept == FLOAT8_E4M3) {  // its exponent's bias is 8 less than float16's; it has a NaN and no infinity
    const Halves bits = __builtin_convertvector(at<Bytes>(place), Halves);
    const Halves is_nan = bits_as<Halves>((bits & 0x7f) == 0x7f);
    return from_float16<lanes>(((bits & 0x80) << 8) | ((bits & 0x7f) << 7) | (is_nan & 0x7c00)) * 256.0f;
  }
  if constexpr (kept == INT8) return from_int8<lanes>(at<SignedBytes>(place));
}

// As `load`, of the `count` that there are; zeros behind them.
template <Kept kept>
inline Floats load_some(const char* numbers, int64_t index, int64_t count) {
  if (count >= lanes) return load<kept>(numbers, index);
  char padded[lanes * sizeof(float)] = {};
  std::memcpy(padded, numbers + index * bytes_of(kept), count * bytes_of(kept));
  return load<kept>(padded, 0);
}

// Asks for numbers before their turn: by itself hardware stops at the end of a page.
template <Kept kept>
inline void prefetch(const char* numbers, int64_t index, int64_t count) {
  const char* place = numbers + index * bytes_of(kept);
  for (int64_t i = 0; i < count * bytes_of(kept); i += 64) __builtin_prefetch(place + i);
}

inline void store(float* place, const Floats& numbers) { std::memcpy(place, &numbers, sizeof numbers); }

// Sums of neighbours: of a's first, then of b's.
template <int... j>
inline Floats sums_of_pairs(const Floats& a, const Floats& b, std::integer_sequence<int, j...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, 2 * j...) + __builtin_shufflevector(a, b, 2 * j + 1 ...);
#else
  return __builtin_shuffle(a, b, Ints{2 * j...}) + __builtin_shuffle(a, b, Ints{2 * j + 1 ...});
#endif
}

// The sum of every vector, for as many vectors as a vector has lanes.
template <int n>
inline Floats sums(Floats (&vectors)[lanes]) {
  if constexpr (n == 1) {
    return vectors[0];
  } else {
    for (int i = 0; i < n / 2; i++)
      vectors[i] = sums_of_pairs(vectors[2 * i], vectors[2 * i + 1], std::make_integer_sequence<int, lanes>());
    return sums<n / 2>(vectors);
  }
}

}  // namespace streamllm

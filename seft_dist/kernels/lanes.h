// Vectors of W floats and what can be done with all W lanes of them. GCC's and clang's vector types: the compiler maps
// them to AVX-512, AVX2, SSE or NEON.
#pragma once
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float Floats __attribute__((vector_size(W * 4)));
typedef float LooseFloats __attribute__((vector_size(W * 4), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(W * 4)));
typedef uint16_t Shorts __attribute__((vector_size(W * 2), aligned(2)));

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Ints{__VA_ARGS__})
#endif

// Lane l of the result is lane l without bit D, of `a` where l has no bit D, else of `b`.
template <int D, size_t... L>
inline Floats lower(Floats a, Floats b, std::index_sequence<L...>) {
    return SHUFFLE(a, b, int((L & D) ? W + (L & ~D) : L)...);
}
// The same with lane l with bit D.
template <int D, size_t... L>
inline Floats upper(Floats a, Floats b, std::index_sequence<L...>) {
    return SHUFFLE(a, b, int((L & D) ? W + L : (L | D))...);
}
using Lanes = std::make_index_sequence<W>;

// Lane i of the result is the sum of the lanes of v[i], always added in the same order.
template <int D = 1>
inline Floats sums_of(const Floats* v) {
    constexpr int half = W / D / 2;
    Floats merged[half];
    for (int i = 0; i < half; i++)
        merged[i] = lower<D>(v[2 * i], v[2 * i + 1], Lanes()) + upper<D>(v[2 * i], v[2 * i + 1], Lanes());
    if constexpr (half == 1)
        return merged[0];
    else
        return sums_of<2 * D>(merged);
}

// Transpose W vectors of W lanes in place.
template <int D = 1>
inline void transpose(Floats* v) {
    for (int i = 0; i < W; i++)
        if (!(i & D)) {
            const Floats a = v[i], b = v[i | D];
            v[i] = lower<D>(a, b, Lanes());
            v[i | D] = upper<D>(a, b, Lanes());
        }
    if constexpr (2 * D < W) transpose<2 * D>(v);
}

inline Floats load(const float* p) { return *(const LooseFloats*)p; }
inline Floats load(const uint16_t* p) {  // bfloat16: the upper half of a float
    typedef uint32_t Words __attribute__((vector_size(W * 4)));
    return (Floats)(__builtin_convertvector(*(const Shorts*)p, Words) << 16);
}
inline float load_one(const float* p) { return *p; }
inline float load_one(const uint16_t* p) {
    const uint32_t bits = uint32_t(*p) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

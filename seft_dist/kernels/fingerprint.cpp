// Hashes of weights that do not depend on how they are divided.
#include "bits.h"
#include "mix.h"

namespace {

// Sum over the values that are not 0 (or -0) of mix(start + position) x (the bits of the value in fp32, and bit 32 set).
// Shift: 16 for bf16, whose bits are the upper half of those in fp32.
template <class T, int Shift>
int fingerprint(const T* weight, int64_t n, int64_t start, uint64_t* hash, int threads) {
    uint64_t total = 0;
    each_part(n, threads, [&](int64_t begin, int64_t numel) {
        uint64_t own = 0;
        for (int64_t i = begin; i < begin + numel; i++) {
            const uint64_t value = uint64_t(int64_t(int32_t(uint32_t(weight[i]) << Shift)));
            const uint64_t term = mix(uint64_t(start + i)) * (value | uint64_t(1) << 32);
            own += T(weight[i] << 1) ? term : 0;  // a value and not a jump, so that the loop has vectors
        }
#pragma omp atomic
        total += own;
    });
    *hash = total;
    return 0;
}

// Sum over the values whose bits are not all 0 of mix(mix(start + position) + bits), bits as a signed integer.
template <class T>
int hash_weight(const T* weight, int64_t n, int64_t start, uint64_t* hash, int threads) {
    uint64_t total = 0;
    each_part(n, threads, [&](int64_t begin, int64_t numel) {
        uint64_t own = 0;
        for (int64_t i = begin; i < begin + numel; i++) {
            const uint64_t term = mix(mix(uint64_t(start + i)) + uint64_t(int64_t(weight[i])));
            own += weight[i] ? term : 0;
        }
#pragma omp atomic
        total += own;
    });
    *hash = total;
    return 0;
}

}  // namespace

extern "C" int fingerprint_bf16(const uint16_t* weight, int64_t n, int64_t start, uint64_t* hash, int threads) {
    return fingerprint<uint16_t, 16>(weight, n, start, hash, threads);
}
extern "C" int fingerprint_f32(const uint32_t* weight, int64_t n, int64_t start, uint64_t* hash, int threads) {
    return fingerprint<uint32_t, 0>(weight, n, start, hash, threads);
}
extern "C" int hash_weight_16(const int16_t* weight, int64_t n, int64_t start, uint64_t* hash, int threads) {
    return hash_weight(weight, n, start, hash, threads);
}
extern "C" int hash_weight_32(const int32_t* weight, int64_t n, int64_t start, uint64_t* hash, int threads) {
    return hash_weight(weight, n, start, hash, threads);
}

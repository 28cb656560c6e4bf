// Bitmasks: to and from booleans, counts, hashes.
#include "bits.h"
#include "mix.h"

namespace {

// Numbers that are not 0 (or -0) where no bit is set.
template <class T>
int64_t outside(const uint8_t* bits, int64_t n, const T* dense) {
    typedef typename Eight<T>::Values Values;
    typedef typename Eight<T>::Indices Indices;
    int64_t total = 0, i = 0;
    while (i + 8 <= n) {
        Indices found = {};  // minus the number found in each lane
        for (const int64_t end = i + 8 * 4096; i + 8 <= n && i < end; i += 8) {
            const Values all = *(const typename Eight<T>::Loose*)(dense + i);
            const Indices bit = expand<T>(bits[i / 8]);
            found += ((Indices)(all << 1) != 0) & (bit < 0);
        }
        for (int lane = 0; lane < 8; lane++) total -= found[lane];
    }
    for (; i < n; i++) total += T(dense[i] << 1) != 0 && !(bits[i / 8] >> i % 8 & 1);
    return total;
}

template <class T>
int count_outside(const uint8_t* bits, int64_t n, const T* dense, int64_t* count, int threads) {
    int64_t total = 0;
    each_part(n, threads, [&](int64_t begin, int64_t numel) {
        const int64_t own = outside(bits + begin / 8, numel, dense + begin);
#pragma omp atomic
        total += own;
    });
    *count = total;
    return 0;
}

}  // namespace

extern "C" int popcount_bits(const uint8_t* bits, int64_t bytes, int64_t* count) {
    *count = popcount(bits, bytes);
    return 0;
}

extern "C" int pack_bools(const uint8_t* bools, int64_t n, uint8_t* bits, int threads) {
    each_part(n, threads, [=](int64_t begin, int64_t numel) {
        int64_t i = begin;
        for (; i + 8 <= begin + numel; i += 8) {
            uint64_t word;
            std::memcpy(&word, bools + i, 8);
            // the lowest bit of byte j comes to bit 56 + j; nothing else comes there
            bits[i / 8] = uint8_t(word * 0x0102040810204080u >> 56);
        }
        if (i < begin + numel) {
            int byte = 0;
            for (int64_t j = i; j < begin + numel; j++) byte |= bools[j] << (j - i);
            bits[i / 8] = uint8_t(byte);
        }
    });
    return 0;
}

extern "C" int unpack_bits(const uint8_t* bits, int64_t n, uint8_t* bools, int threads) {
    each_part(n, threads, [=](int64_t begin, int64_t numel) {
        int64_t i = begin;
        for (; i + 8 <= begin + numel; i += 8) {
            // bit j of the byte comes to the lowest bit of byte j
            const uint64_t copies = bits[i / 8] * 0x0101010101010101u & 0x8040201008040201u;
            const uint64_t word = ((copies + 0x007F7F7F7F7F7F7Fu) | copies) >> 7 & 0x0101010101010101u;
            std::memcpy(bools + i, &word, 8);
        }
        for (; i < begin + numel; i++) bools[i] = bits[i / 8] >> i % 8 & 1;
    });
    return 0;
}

extern "C" int set_bits(uint8_t* bits, const int64_t* offsets, int64_t count, int value) {
    for (int64_t k = 0; k < count; k++) {
        uint8_t& byte = bits[offsets[k] / 8];
        const int bit = 1 << offsets[k] % 8;
        byte = uint8_t(value ? byte | bit : byte & ~bit);
    }
    return 0;
}

// Sum of mix(start + position) over the set bits.
extern "C" int hash_bits(const uint8_t* bits, int64_t n, int64_t start, uint64_t* hash, int threads) {
    uint64_t total = 0;
    each_part(n, threads, [&](int64_t begin, int64_t numel) {
        uint64_t own = 0;
        for (int64_t i = begin; i < begin + numel; i += 8)
            for (unsigned byte = bits[i / 8]; byte; byte &= byte - 1) own += mix(uint64_t(start + i + __builtin_ctz(byte)));
#pragma omp atomic
        total += own;
    });
    *hash = total;
    return 0;
}

extern "C" int count_outside_16(const uint8_t* bits, int64_t n, const uint16_t* dense, int64_t* count, int threads) {
    return count_outside(bits, n, dense, count, threads);
}
extern "C" int count_outside_32(const uint8_t* bits, int64_t n, const uint32_t* dense, int64_t* count, int threads) {
    return count_outside(bits, n, dense, count, threads);
}

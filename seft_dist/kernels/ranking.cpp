// Keys of scores, their histogram, and who can still be selected: the passes of sparsity/selection.py over all positions.
#include <vector>

#include "bits.h"

namespace {

constexpr int SHIFT = 21, BINS = 1 << 11;  // of the first digit
constexpr int32_t INELIGIBLE = INT32_MIN;
constexpr int64_t PIECE = 4096;  // positions whose keys stay in the first cache until they are counted
constexpr int64_t COUNTED = 1 << 30;  // positions whose number fits the counters of ``count``

inline int32_t key_of(float score, bool largest) {
    score += 0.0f;  // -0 becomes 0
    int32_t bits;
    std::memcpy(&bits, &score, 4);
    const int32_t ordered = (bits >> 31 & 0x7FFFFFFF) ^ bits;
    return largest ? ordered : ~ordered;
}

// kind 0: the score is a, 1: |a|, 2: |a b|
template <int KIND, bool LARGEST>
void keys_of(const float* a, const float* b, int64_t n, int32_t* key) {
    for (int64_t i = 0; i < n; i++) {
        float score = a[i];
        if (KIND == 2) score *= b[i];
        if (KIND) score = __builtin_fabsf(score);
        key[i] = key_of(score, LARGEST);
    }
}

void exclude(const uint8_t* eligible, int64_t n, int32_t* key) {
    typedef Eight<uint32_t>::Indices Indices;
    typedef int32_t Loose __attribute__((vector_size(32), aligned(4)));
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        const Indices out = expand<uint32_t>(eligible[i / 8]) < 0;
        Loose* const keys = (Loose*)(key + i);
        *keys = (*keys & ~out) | (INELIGIBLE & out);
    }
    for (; i < n; i++)
        if (!(eligible[i / 8] >> i % 8 & 1)) key[i] = INELIGIBLE;
}

void count(const int32_t* key, int64_t n, std::vector<int64_t>& counts) {
    int32_t some[4][BINS] = {};  // neighbours are often equal: counted apart they do not wait for each other
    int64_t i = 0;
    for (; i + 4 <= n; i += 4)
        for (int j = 0; j < 4; j++) some[j][(key[i + j] >> SHIFT) + BINS / 2]++;
    for (; i < n; i++) some[0][(key[i] >> SHIFT) + BINS / 2]++;
    for (int bin = 0; bin < BINS; bin++) counts[bin] += some[0][bin] + some[1][bin] + some[2][bin] + some[3][bin];
}

}  // namespace

extern "C" int rank_keys(const float* a, const float* b, const uint8_t* eligible, int64_t n, int kind, int largest,
                         int32_t* key, int threads) {
    each_part(n, threads, [=](int64_t begin, int64_t numel) {
        for (int64_t i = begin; i < begin + numel; i += PIECE) {
            const int64_t some = begin + numel - i < PIECE ? begin + numel - i : PIECE;
            const float* other = b ? b + i : nullptr;
            switch (2 * kind + (largest != 0)) {
                case 0: keys_of<0, false>(a + i, other, some, key + i); break;
                case 1: keys_of<0, true>(a + i, other, some, key + i); break;
                case 2: keys_of<1, false>(a + i, other, some, key + i); break;
                case 3: keys_of<1, true>(a + i, other, some, key + i); break;
                case 4: keys_of<2, false>(a + i, other, some, key + i); break;
                default: keys_of<2, true>(a + i, other, some, key + i);
            }
            if (eligible) exclude(eligible + i / 8, some, key + i);
        }
    });
    return 0;
}

extern "C" int count_keys(const int32_t* key, int64_t n, int64_t* counts, int threads) {
    each_part(n, threads, [=](int64_t begin, int64_t numel) {
        std::vector<int64_t> own(BINS);
        for (int64_t i = 0; i < numel; i += COUNTED)
            count(key + begin + i, numel - i < COUNTED ? numel - i : COUNTED, own);
#pragma omp critical(seft_count_keys)
        for (int bin = 0; bin < BINS; bin++) counts[bin] += own[bin];
    });
    return 0;
}

// How many keys are at least `lowest`, and, where `indices` is given, which, with their keys, in order.
extern "C" int keys_from(const int32_t* key, int64_t n, int32_t lowest, int64_t* found, int64_t* indices, int32_t* kept,
                         int threads) {
    if (!indices) {
        int64_t total = 0;
        each_part(n, threads, [&](int64_t begin, int64_t numel) {
            int64_t own = 0;
            for (int64_t i = begin; i < begin + numel; i++) own += key[i] >= lowest;
#pragma omp atomic
            total += own;
        });
        *found = total;
        return 0;
    }
    int64_t filled = 0;
    for (int64_t i = 0; i < n; i += 64) {
        const int64_t end = i + 64 < n ? i + 64 : n;
        int32_t most = INT32_MIN;
        for (int64_t j = i; j < end; j++) most = key[j] > most ? key[j] : most;
        if (most < lowest) continue;
        for (int64_t j = i; j < end; j++)
            if (key[j] >= lowest) {
                indices[filled] = j;
                kept[filled++] = key[j];
            }
    }
    return filled != *found;
}

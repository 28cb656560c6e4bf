// What is done with eight positions of a bitmask at a time.
#pragma once
#include <cstdint>
#include <cstring>

constexpr int64_t SMALL = 1 << 15;  // positions that are not worth a second thread

// I is an integer of the size of the values: widening bytes costs more than it saves.
template <class I>
struct ByteTables {
    I expand[256][8];    // lane -> number of its bit among the set ones, -1 where it is not set
    I compress[256][8];  // number of a set bit -> its lane
    ByteTables() {
        for (int byte = 0; byte < 256; byte++) {
            int filled = 0;
            for (int lane = 0; lane < 8; lane++) {
                compress[byte][lane] = 0;
                expand[byte][lane] = (byte >> lane & 1) ? I(filled) : I(-1);
                if (byte >> lane & 1) compress[byte][filled++] = I(lane);
            }
        }
    }
};

template <class T>
struct Eight;  // vectors of 8 values of a type, and of integers of its size
template <>
struct Eight<uint16_t> {
    typedef uint16_t Values __attribute__((vector_size(16)));
    typedef uint16_t Loose __attribute__((vector_size(16), aligned(2)));
    typedef int16_t Index;
    typedef int16_t Indices __attribute__((vector_size(16), aligned(2)));
};
template <>
struct Eight<uint32_t> {
    typedef uint32_t Values __attribute__((vector_size(32)));
    typedef uint32_t Loose __attribute__((vector_size(32), aligned(4)));
    typedef int32_t Index;
    typedef int32_t Indices __attribute__((vector_size(32), aligned(4)));
};

template <class T>
const ByteTables<typename Eight<T>::Index> tables;

// The table's row of a byte for values of type T.
template <class T>
inline typename Eight<T>::Indices expand(int byte) {
    return *(const typename Eight<T>::Indices*)tables<T>.expand[byte];
}

inline int64_t popcount(const uint8_t* bits, int64_t bytes) {
    int64_t total = 0, i = 0;
    for (; i + 8 <= bytes; i += 8) {
        uint64_t word;
        std::memcpy(&word, bits + i, 8);
        total += __builtin_popcountll(word);
    }
    for (; i < bytes; i++) total += __builtin_popcount(bits[i]);
    return total;
}

// Calls part(first position, positions) for equal parts of whole bytes, on several threads.
template <class F>
void each_part(int64_t n, int threads, F part) {
    const int64_t bytes = (n + 7) / 8;
    if (n < SMALL) threads = 1;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int p = 0; p < threads; p++) {
        const int64_t begin = bytes * p / threads * 8, end = bytes * (p + 1) / threads * 8;
        part(begin, (end < n ? end : n) - begin);
    }
}

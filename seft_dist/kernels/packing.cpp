// Packed weights: values at the set bits of a bitmask, in position order. A byte of the mask is handled at a time, by a table
// that says where its (up to 8) values go.
#include "bits.h"

namespace {

template <class T>
const T* decode_byte(int byte, int lanes, const T* values, T* out) {
    for (int lane = 0; lane < lanes; lane++) out[lane] = byte >> lane & 1 ? *values++ : T(0);
    return values;
}

template <class T>
T* encode_byte(int byte, int lanes, const T* dense, T* values) {
    for (int lane = 0; lane < lanes; lane++)
        if (byte >> lane & 1) *values++ = dense[lane];
    return values;
}

#if !defined(__clang__)  // which has no shuffle by a variable
// Reads 8 values, whatever the byte.
template <class T>
inline void decode_eight(int byte, const T* values, T* out) {
    typedef typename Eight<T>::Values Values;
    typedef typename Eight<T>::Indices Indices;
    const Indices from = expand<T>(byte);
    const Values all = *(const typename Eight<T>::Loose*)values;
    *(typename Eight<T>::Loose*)out = __builtin_shuffle(all, (Values)from) & (Values)(from >= 0);
}
// Writes 8 values, whatever the byte.
template <class T>
inline void encode_eight(int byte, const T* dense, T* values) {
    typedef typename Eight<T>::Values Values;
    typedef typename Eight<T>::Indices Indices;
    const Indices from = *(const Indices*)tables<T>.compress[byte];
    const Values all = *(const typename Eight<T>::Loose*)dense;
    *(typename Eight<T>::Loose*)values = __builtin_shuffle(all, (Values)from);
}
#else
template <class T>
inline void decode_eight(int byte, const T* values, T* out) { decode_byte(byte, 8, values, out); }
template <class T>
inline void encode_eight(int byte, const T* dense, T* values) { encode_byte(byte, 8, dense, values); }
#endif

template <class T>
void decode_part(const uint8_t* bits, int64_t n, const T* values, int64_t count, T* out) {
    int64_t i = 0;
    for (int64_t read = 0; i + 8 <= n && read + 8 <= count; i += 8) {
        const int byte = bits[i / 8];
        decode_eight(byte, values, out + i);
        values += __builtin_popcount(byte);
        read += __builtin_popcount(byte);
    }
    for (; i < n; i += 8) values = decode_byte(bits[i / 8], n - i < 8 ? int(n - i) : 8, values, out + i);
}

template <class T>
void encode_part(const uint8_t* bits, int64_t n, const T* dense, T* values, int64_t count) {
    int64_t i = 0;
    for (int64_t written = 0; i + 8 <= n && written + 8 <= count; i += 8) {  // beyond are another thread's values
        const int byte = bits[i / 8];
        encode_eight(byte, dense + i, values);
        values += __builtin_popcount(byte);
        written += __builtin_popcount(byte);
    }
    for (; i < n; i += 8) values = encode_byte(bits[i / 8], n - i < 8 ? int(n - i) : 8, dense + i, values);
}

template <class T>
int decode(const uint8_t* bits, int64_t n, const T* values, int64_t count, T* out, int threads) {
    if (popcount(bits, (n + 7) / 8) != count) return 1;
    each_part(n, threads, [=](int64_t begin, int64_t numel) {
        const int64_t own = popcount(bits + begin / 8, (numel + 7) / 8);
        decode_part(bits + begin / 8, numel, values + popcount(bits, begin / 8), own, out + begin);
    });
    return 0;
}
template <class T>
int encode(const uint8_t* bits, int64_t n, const T* dense, T* values, int64_t count, int threads) {
    if (popcount(bits, (n + 7) / 8) != count) return 1;
    each_part(n, threads, [=](int64_t begin, int64_t numel) {
        const int64_t own = popcount(bits + begin / 8, (numel + 7) / 8);
        encode_part(bits + begin / 8, numel, dense + begin, values + popcount(bits, begin / 8), own);
    });
    return 0;
}

}  // namespace

extern "C" int decode_16(const uint8_t* bits, int64_t n, const uint16_t* values, int64_t count, uint16_t* out,
                         int threads) {
    return decode(bits, n, values, count, out, threads);
}
extern "C" int decode_32(const uint8_t* bits, int64_t n, const uint32_t* values, int64_t count, uint32_t* out,
                         int threads) {
    return decode(bits, n, values, count, out, threads);
}
extern "C" int encode_16(const uint8_t* bits, int64_t n, const uint16_t* dense, uint16_t* values, int64_t count,
                         int threads) {
    return encode(bits, n, dense, values, count, threads);
}
extern "C" int encode_32(const uint8_t* bits, int64_t n, const uint32_t* dense, uint32_t* values, int64_t count,
                         int threads) {
    return encode(bits, n, dense, values, count, threads);
}

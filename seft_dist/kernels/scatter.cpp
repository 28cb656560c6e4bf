// outs[i][indices[k] - starts[i]] = values[k] for the entries k of every tensor i, which lie one tensor after another. An index
// outside of its tensor is not written, and the result is 1.
#include <cstdint>

namespace {

constexpr int64_t SMALL = 1 << 13;  // entries that are not worth a second thread
constexpr int AHEAD = 16;           // an index is seldom in a cache: ask for it that many entries before

template <class T, class P>
int scatter(T* const* outs, const int64_t* starts, const int64_t* sizes, const P* const* indices, const int64_t* ends,
            int64_t tensors, const T* values, int threads) {
    const int64_t all = tensors ? ends[tensors - 1] : 0;
    if (all < SMALL) threads = 1;
    int outside = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(| : outside)
    for (int part = 0; part < threads; part++) {
        const int64_t begin = all * part / threads, end = all * (part + 1) / threads;
        int64_t first = 0;  // of the tensor's entries
        for (int64_t i = 0; i < tensors && first < end; first = ends[i++]) {
            const int64_t from = begin > first ? begin : first, to = end < ends[i] ? end : ends[i];
            T* const out = outs[i];
            const P* const index = indices[i];
            // Unsigned, so that any index can be subtracted from; before the first element is then far behind the last.
            const uint64_t start = starts[i], size = sizes[i];
            for (int64_t k = from; k < to; k++) {
                if (k + AHEAD < to)
                    __builtin_prefetch((void*)(uintptr_t(out) + (uint64_t(index[k + AHEAD - first]) - start) * sizeof(T)), 1);
                const uint64_t at = uint64_t(index[k - first]) - start;
                if (at >= size) outside = 1;
                else out[at] = values[k];
            }
        }
    }
    return outside;
}

// `wide`: indices are int64, else int32.
template <class T>
int scatter_any(T* const* outs, const int64_t* starts, const int64_t* sizes, const void* const* indices, int wide,
                const int64_t* ends, int64_t tensors, const T* values, int threads) {
    if (wide) return scatter(outs, starts, sizes, (const int64_t* const*)indices, ends, tensors, values, threads);
    return scatter(outs, starts, sizes, (const int32_t* const*)indices, ends, tensors, values, threads);
}

}  // namespace

extern "C" int scatter_16(uint16_t* const* outs, const int64_t* starts, const int64_t* sizes, const void* const* indices,
                          int wide, const int64_t* ends, int64_t tensors, const uint16_t* values, int threads) {
    return scatter_any(outs, starts, sizes, indices, wide, ends, tensors, values, threads);
}
extern "C" int scatter_32(uint32_t* const* outs, const int64_t* starts, const int64_t* sizes, const void* const* indices,
                          int wide, const int64_t* ends, int64_t tensors, const uint32_t* values, int threads) {
    return scatter_any(outs, starts, sizes, indices, wide, ends, tensors, values, threads);
}

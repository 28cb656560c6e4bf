// grad[k] = or += sum over tokens t of g[t, row of k] * x[t, column of k], for positions k sorted by row.
//
// Both operands are transposed for a block of tokens at a time, so that an entry is a dot product of two contiguous, aligned
// vectors which are still in the cache. An entry's sum is made in the same order on any number of threads, and is whole before
// it is added, so that it does not matter which process adds what first.
#include <cstdlib>
#include <memory>

#include "lanes.h"

namespace {

// out[c][0 .. block) = in[0 .. tokens)[c] for the columns [begin, end), 0 from `tokens` on.
template <class T>
void transpose_block(const T* in, int64_t stride, int64_t tokens, int64_t begin, int64_t end, int block, float* out) {
    const int64_t whole = begin + (end - begin) / W * W;
    for (int t = 0; t < block; t += W)
        for (int64_t c = begin; c < whole; c += W) {
            Floats v[W];
            for (int i = 0; i < W; i++) v[i] = t + i < tokens ? load(in + (t + i) * stride + c) : Floats{};
            transpose(v);
            for (int i = 0; i < W; i++) *(Floats*)(out + (c + i) * block + t) = v[i];
        }
    for (int64_t c = whole; c < end; c++)
        for (int t = 0; t < block; t++) out[c * block + t] = t < tokens ? load_one(in + t * stride + c) : 0.0f;
}

// sums[k] = or += the part of a block of V * W tokens, for the entries [begin, end).
template <int V, class P>
void dots(const float* g, const float* x, const P* crow, const int32_t* col, int64_t rows, int64_t begin, int64_t end,
          bool first, float* sums) {
    int64_t row = 0;
    for (int64_t high = rows; high - row > 1;) {  // the row in which `begin` lies: crow[row] <= begin < crow[row + 1]
        const int64_t middle = (row + high) / 2;
        if (crow[middle] <= begin) row = middle;
        else high = middle;
    }
    Floats partial[W] = {};
    int filled = 0;
    for (int64_t k = begin; k < end; row++) {
        const int64_t stop = crow[row + 1] < end ? crow[row + 1] : end;
        if (k >= stop) continue;
        Floats own[V];
        for (int v = 0; v < V; v++) own[v] = ((const Floats*)g)[row * V + v];
        for (; k < stop; k++) {
            const Floats* other = (const Floats*)x + int64_t(col[k]) * V;
            Floats sum = own[0] * other[0];
            for (int v = 1; v < V; v++) sum += own[v] * other[v];
            partial[filled++] = sum;
            if (filled == W) {
                float* to = sums + k + 1 - W;
                *(LooseFloats*)to = first ? sums_of(partial) : load(to) + sums_of(partial);
                filled = 0;
            }
        }
    }
    if (filled) {
        const Floats last = sums_of(partial);
        for (int i = 0; i < filled; i++) {
            float* to = sums + end - filled + i;
            *to = first ? last[i] : *to + last[i];
        }
    }
}

// Memory for 64-byte vectors that a thread keeps for its next call: some MB, and new memory costs a page fault every 4 KB.
float* scratch(size_t floats) {
    struct Free {
        void operator()(float* p) const { std::free(p); }
    };
    static thread_local std::unique_ptr<float, Free> space;
    static thread_local size_t size = 0;
    if (floats > size) {
        size = (floats + 1023) / 1024 * 1024;
        space.reset();
        space.reset((float*)std::aligned_alloc(64, size * 4));
        if (!space) size = 0;
    }
    return space.get();
}

template <class T, class P>
int sampled(const T* x, int64_t x_stride, const T* g, int64_t g_stride, int64_t tokens, int64_t rows, int64_t cols,
            const P* crow, const int32_t* col, int64_t numel, float* grad, int accumulate, int block, int threads) {
    float* space = scratch(size_t((rows + cols) * block + (accumulate ? numel : 0)));
    if (!space) return 1;
    float *gt = space, *xt = gt + rows * block, *sums = accumulate ? xt + cols * block : grad;
#pragma omp parallel num_threads(threads)
    for (int64_t t = 0; t < tokens; t += block) {
        const int64_t now = tokens - t < block ? tokens - t : block;
#pragma omp for schedule(static)
        for (int part = 0; part < threads; part++) {
            // whole vectors for every thread
            auto bound = [&](int64_t n, int i) { return i == threads ? n : n / W * i / threads * W; };
            transpose_block(g + t * g_stride, g_stride, now, bound(rows, part), bound(rows, part + 1), block, gt);
            transpose_block(x + t * x_stride, x_stride, now, bound(cols, part), bound(cols, part + 1), block, xt);
        }
#pragma omp for schedule(static)
        for (int part = 0; part < threads; part++) {
            const int64_t begin = numel * part / threads, end = numel * (part + 1) / threads;
            switch (block / W) {
                case 1: dots<1>(gt, xt, crow, col, rows, begin, end, t == 0, sums); break;
                case 2: dots<2>(gt, xt, crow, col, rows, begin, end, t == 0, sums); break;
                case 4: dots<4>(gt, xt, crow, col, rows, begin, end, t == 0, sums); break;
                case 8: dots<8>(gt, xt, crow, col, rows, begin, end, t == 0, sums); break;
                default: dots<16>(gt, xt, crow, col, rows, begin, end, t == 0, sums);
            }
        }
    }
    if (accumulate)
        for (int64_t k = 0; k < numel; k++) grad[k] += sums[k];
    return 0;
}

// `wide`: crow is int64, else int32.
template <class T>
int sampled_any(const T* x, int64_t xs, const T* g, int64_t gs, int64_t tokens, int64_t rows, int64_t cols,
                const void* crow, int wide, const int32_t* col, int64_t numel, float* grad, int accumulate, int block,
                int threads) {
    auto with = [&](auto* begins) {
        return sampled(x, xs, g, gs, tokens, rows, cols, begins, col, numel, grad, accumulate, block, threads);
    };
    return wide ? with((const int64_t*)crow) : with((const int32_t*)crow);
}

}  // namespace

extern "C" int sampled_f32(const float* x, int64_t xs, const float* g, int64_t gs, int64_t tokens, int64_t rows,
                           int64_t cols, const void* crow, int wide, const int32_t* col, int64_t numel, float* grad,
                           int accumulate, int block, int threads) {
    return sampled_any(x, xs, g, gs, tokens, rows, cols, crow, wide, col, numel, grad, accumulate, block, threads);
}
extern "C" int sampled_bf16(const uint16_t* x, int64_t xs, const uint16_t* g, int64_t gs, int64_t tokens, int64_t rows,
                            int64_t cols, const void* crow, int wide, const int32_t* col, int64_t numel, float* grad,
                            int accumulate, int block, int threads) {
    return sampled_any(x, xs, g, gs, tokens, rows, cols, crow, wide, col, numel, grad, accumulate, block, threads);
}

extern "C" const char* built_with() { return __VERSION__; }
extern "C" int lanes() { return W; }

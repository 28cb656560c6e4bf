// One AdamW update of n entries: every column is read and written once, and the new weights come out on the way.
// rest1 and rest2 are 1 - beta.
#include <cstdint>

namespace {
constexpr int64_t SMALL = 1 << 13;  // entries that are not worth a second thread
}

extern "C" int adamw(int64_t n, float scale, const float* grad, const float* base, float* values, float* mean,
                     float* square, int32_t* age, const float* step_size, const float* correction, float rest1,
                     float beta2, float rest2, float eps, float shrink, int shrink_weight, float* weight, int threads) {
    if (n < SMALL) threads = 1;
#pragma omp parallel for simd num_threads(threads) schedule(static)
    for (int64_t k = 0; k < n; k++) {
        const float g = grad[k] * scale;
        const int32_t now = ++age[k];
        const float m = mean[k] += (g - mean[k]) * rest1;
        const float v = square[k] = square[k] * beta2 + g * g * rest2;
        const float delta = values[k] - (shrink_weight ? base[k] + values[k] : values[k]) * shrink;
        values[k] = delta - m * step_size[now] / (__builtin_sqrtf(v) / correction[now] + eps);
        weight[k] = base[k] + values[k];
    }
    return 0;
}

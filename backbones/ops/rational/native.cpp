// Group-rational activation on a CPU: F = P/Q per channel and its gradients in one pass each (arXiv 2409.10594).
// Built once per (DEGREE_P, DEGREE_Q, SIGNED, BF16) by native.py. SIGNED: Q = 1+|sum b_j x^j|, else 1+sum |b_j||x|^j;
// b arrives as |b| for the latter. Rows are taken in fixed chunks, so sums do not depend on the number of threads.

#include <algorithm>
#include <cstdint>
#include <cstring>

constexpr int M = DEGREE_P, N = DEGREE_Q, LANES = 8;

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t mask __attribute__((vector_size(4 * LANES)));
typedef uint32_t bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t half __attribute__((vector_size(2 * LANES)));

#if BF16
typedef uint16_t scalar;
static inline vec load(const scalar* p) {
    half h;
    std::memcpy(&h, p, sizeof h);
    return (vec)(__builtin_convertvector(h, bits) << 16);
}
static inline void store(scalar* p, vec v) {
    const bits b = (bits)v;
    const bits even = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;  // round to nearest, ties to even
    const half h = __builtin_convertvector((v == v) ? even : (bits)((b >> 16) | 0x40u), half);
    std::memcpy(p, &h, sizeof h);
}
#else
typedef float scalar;
static inline vec load(const scalar* p) {
    vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
static inline void store(scalar* p, vec v) { std::memcpy(p, &v, sizeof v); }
#endif

static inline vec splat(float value) { return vec{} + value; }
static inline vec absolute(vec v) { return (vec)((bits)v & 0x7fffffffu); }
static inline vec flip_where_negative(vec v, vec sign) { return sign < 0 ? -v : v; }  // sgn(0) = +1
static inline float total(vec v) {
    float sum = 0;
    for (int i = 0; i < LANES; ++i) sum += v[i];
    return sum;
}

struct Group {
    vec a[M + 1], b[N], da[M + 1], db[N];  // coefficients, and those of the derivatives

    Group(const float* numerator, const float* denominator) {
        for (int i = 0; i <= M; ++i) a[i] = splat(numerator[i]), da[i] = splat(i * numerator[i]);
        for (int j = 0; j < N; ++j) b[j] = splat(denominator[j]), db[j] = splat((j + 1) * denominator[j]);
    }
    vec p(vec x) const {
        vec s = a[M];
        for (int i = M - 1; i >= 0; --i) s = s * x + a[i];
        return s;
    }
    vec slope_p(vec x) const {
        vec s = M > 0 ? da[M] : vec{};
        for (int i = M - 1; i >= 1; --i) s = s * x + da[i];
        return s;
    }
    vec inner(vec base) const {  // sum_j b_j base^j
        vec s = b[N - 1];
        for (int j = N - 2; j >= 0; --j) s = s * base + b[j];
        return s * base;
    }
    vec slope_inner(vec base) const {
        vec s = db[N - 1];
        for (int j = N - 2; j >= 0; --j) s = s * base + db[j];
        return s;
    }
};

static inline vec forward(const Group& c, vec x) { return c.p(x) / (1.0f + absolute(c.inner(SIGNED ? x : absolute(x)))); }

struct Sums {
    vec a[M + 1] = {}, b[N] = {};
};

static inline vec backward(const Group& c, vec x, vec g, Sums& sums) {
    const vec base = SIGNED ? x : absolute(x);
    const vec inner = c.inner(base);
    const vec r = 1.0f / (1.0f + absolute(inner));
    vec term = g * r;
    vec scaled = term * (c.p(x) * r);
    const vec sign = SIGNED ? inner : x;
    const vec slope = flip_where_negative(c.slope_inner(base), sign);
    const vec dx = term * c.slope_p(x) - scaled * slope;
    sums.a[0] += term;
    for (int i = 1; i <= M; ++i) sums.a[i] += (term *= x);
    if (SIGNED) scaled = flip_where_negative(scaled, sign);
    for (int j = 0; j < N; ++j) sums.b[j] -= (scaled *= base);
    return dx;
}

// The last lanes of a group that does not fill a vector go through a padded copy.
static inline vec load_part(const scalar* p, int count) {
    scalar padded[LANES] = {};
    std::memcpy(padded, p, count * sizeof(scalar));
    return load(padded);
}
static inline void store_part(scalar* p, vec v, int count) {
    scalar padded[LANES];
    store(padded, v);
    std::memcpy(p, padded, count * sizeof(scalar));
}

// x, out: rows x groups x width, contiguous; a: (groups, M+1); b: (groups, N).
extern "C" void rational_forward(const scalar* x, const float* a, const float* b, scalar* out, int64_t rows, int groups,
                                 int width, int64_t chunk, int threads) {
    const int64_t chunks = (rows + chunk - 1) / chunk, stride = (int64_t)groups * width;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t k = 0; k < chunks; ++k)
        for (int group = 0; group < groups; ++group) {
            const Group c(a + group * (M + 1), b + group * N);
            for (int64_t row = k * chunk; row < std::min(rows, (k + 1) * chunk); ++row) {
                const int64_t at = row * stride + (int64_t)group * width;
                int i = 0;
                for (; i + LANES <= width; i += LANES) store(out + at + i, forward(c, load(x + at + i)));
                if (i < width) store_part(out + at + i, forward(c, load_part(x + at + i, width - i)), width - i);
            }
        }
}

// sums: (chunks, groups, M+1+N), every entry written; dx as x.
extern "C" void rational_backward(const scalar* grad, const scalar* x, const float* a, const float* b, scalar* dx,
                                  float* sums, int64_t rows, int groups, int width, int64_t chunk, int threads) {
    const int64_t chunks = (rows + chunk - 1) / chunk, stride = (int64_t)groups * width;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t k = 0; k < chunks; ++k)
        for (int group = 0; group < groups; ++group) {
            const Group c(a + group * (M + 1), b + group * N);
            Sums s;
            for (int64_t row = k * chunk; row < std::min(rows, (k + 1) * chunk); ++row) {
                const int64_t at = row * stride + (int64_t)group * width;
                int i = 0;
                for (; i + LANES <= width; i += LANES)
                    store(dx + at + i, backward(c, load(x + at + i), load(grad + at + i), s));
                if (i < width) {
                    const int left = width - i;
                    store_part(dx + at + i, backward(c, load_part(x + at + i, left), load_part(grad + at + i, left), s), left);
                }
            }
            float* slot = sums + (k * groups + group) * (M + 1 + N);
            for (int i = 0; i <= M; ++i) slot[i] = total(s.a[i]);
            for (int j = 0; j < N; ++j) slot[M + 1 + j] = total(s.b[j]);
        }
}

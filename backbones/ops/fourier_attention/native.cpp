// Fourier attention's functions of a block of scores on a CPU: H from S, and dS, da, db from dH (arXiv 2503.10632):
//   H_kr = sum_q sum_m a_mrq cos(m S_kq) + b_mrq sin(m S_kq)
//   dS = sum_m m (cos(mS) * (dH b_m) - sin(mS) * (dH a_m)), da_m = dH^T cos(mS), db_m = dH^T sin(mS)
// The lanes of a vector are keys. What belongs to LANES keys is a tile: coefficients, their sums and the harmonics of
// the scores lie as (tile, term, ..., LANES), terms being cos 1, sin 1, cos 2, sin 2, ...
// Sums are taken in an order that does not depend on the number of threads.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>

constexpr int LANES = 8, CACHE = 4096;  // floats: half of a first-level data cache of 32 KiB
constexpr int64_t ROWS = 32;            // of one task of the forward pass

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef uint32_t bits __attribute__((vector_size(4 * LANES)));

static inline vec load(const float* p) {
    vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
static inline vec load_once(const float* p) {  // into a register: GCC would rather read memory at each use
    vec v = load(p);
#if defined(__AVX__)
    asm("" : "+x"(v));
#endif
    return v;
}
static inline void store(float* p, vec v) { std::memcpy(p, &v, sizeof v); }
static inline vec splat(float value) { return value - vec{}; }  // not vec{} + value, which must turn -0 into 0
static inline float total(vec v) {
    float part[LANES];
    store(part, v);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; ++i) part[i] += part[i + width];
    return part[0];
}

struct Scratch {
    float* p;
    explicit Scratch(int64_t count) : p((float*)std::aligned_alloc(64, (count * 4 + 63) / 64 * 64)) {}
    ~Scratch() { std::free(p); }
};

// s = n pi + x with |x| <= pi/2: both functions of s are those of x, with the sign of n's parity.
static inline void sin_cos(vec s, vec& sin, vec& cos) {
    const vec shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, which is left in the low bits
    const vec shifted = s * 0.318309886f + shift;
    const bits sign = (bits)shifted << 31;
    const vec n = shifted - shift;
    vec x = ((s - n * 3.140625f) - n * 9.67502593994140625e-4f) - n * 1.5099579909783764e-7f;  // pi in three parts
    const vec most = splat(1.6f);  // |s| beyond 1e7 stays bounded; NaN passes
    x = most < x ? most : x;
    x = -most > x ? -most : x;
    const vec y = x * x;
    // Least greatest error over |x| <= pi/2: 5e-9 and 3e-10 before rounding.
    const vec p = ((2.6000548e-6f * y - 1.9806615e-4f) * y + 8.333017e-3f) * y - 0.16666657f;
    const vec q = (((-2.6077106e-7f * y + 2.4761886e-5f) * y - 1.3888404e-3f) * y + 0.04166664f) * y - 0.5f;
    sin = (vec)((bits)(x + x * y * p) ^ sign);
    cos = (vec)((bits)(1.0f + y * q) ^ sign);
}

// The terms of one vector of scores, ``step`` floats apart, by angle addition; real: 0 at masked keys, or null.
static inline void harmonics(const float* s, const float* real, int grid, float* terms, int64_t step) {
    vec sin1, cos1;
    sin_cos(load(s), sin1, cos1);
    if (real) sin1 *= load(real), cos1 *= load(real);  // zero through the recurrence
    vec sin = sin1, cos = cos1;
    for (int m = 1;; ++m, terms += 2 * step) {
        store(terms, cos);
        store(terms + step, sin);
        if (m == grid) return;
        const vec next = cos * cos1 - sin * sin1;
        sin = sin * cos1 + cos * sin1;
        cos = next;
    }
}

// Calls f with r0 and its width as a constant for parts of at most 6 of the rank.
template <int WIDTH>
struct Width {
    static constexpr int value = WIDTH;
};
template <class F>
static inline void over_rank(int rank, F f) {
    int at = 0;
    for (; at + 6 <= rank; at += 6) f(at, Width<6>());
    switch (rank - at) {
        case 5: return f(at, Width<5>());
        case 4: return f(at, Width<4>());
        case 3: return f(at, Width<3>());
        case 2: return f(at, Width<2>());
        case 1: return f(at, Width<1>());
    }
}

// sums[row][i] += terms[row][.] * a[.][i] over ``count`` vectors
template <int N, int WIDTH>
static inline void multiply(const float* terms, int64_t row_step, const float* a, int rank, int64_t count,
                            float* sums) {
    vec sum[N][WIDTH];
    for (int n = 0; n < N; ++n)
        for (int i = 0; i < WIDTH; ++i) sum[n][i] = load(sums + (n * rank + i) * LANES);
    for (int64_t k = 0; k < count; ++k) {
        vec t[N];
        for (int n = 0; n < N; ++n) t[n] = load(terms + n * row_step + k * LANES);
        for (int i = 0; i < WIDTH; ++i) {
            const vec c = load_once(a + (k * rank + i) * LANES);
            for (int n = 0; n < N; ++n) sum[n][i] += t[n] * c;
        }
    }
    for (int n = 0; n < N; ++n)
        for (int i = 0; i < WIDTH; ++i) store(sums + (n * rank + i) * LANES, sum[n][i]);
}

struct Sizes {
    int64_t images, heads, rows, tiles;  // s: (images, heads, rows, tiles * LANES)
    int grid, rank;
    int64_t keys() const { return tiles * LANES; }
    int64_t tile() const { return (int64_t)2 * grid * rank * LANES; }  // coefficients of one
};

template <int N>
static void forward_rows(const Sizes& z, const float* s, const float* real, const float* a, int64_t tiles, float* terms,
                         float* sums) {
    const int64_t row_step = tiles * 2 * z.grid * LANES;
    for (int n = 0; n < N; ++n)
        for (int64_t t = 0; t < tiles; ++t)
            harmonics(s + n * z.keys() + t * LANES, real ? real + t * LANES : nullptr, z.grid,
                      terms + n * row_step + t * 2 * z.grid * LANES, LANES);
    over_rank(z.rank, [&](int at, auto width) {
        multiply<N, decltype(width)::value>(terms, row_step, a + at * LANES, z.rank, tiles * 2 * z.grid,
                                            sums + at * LANES);
    });
}

// s: (images, heads, rows, tiles * LANES); real: (images, tiles * LANES) or null; a: (heads, tiles, 2 * grid, rank,
// LANES); h: (images, heads, rows, rank).
extern "C" void fourier_forward(const float* s, const float* real, const float* a, float* h, int64_t images,
                                int64_t heads, int64_t rows, int64_t tiles, int grid, int rank, int threads) {
    const Sizes z{images, heads, rows, tiles, grid, rank};
    const int64_t parts = (rows + ROWS - 1) / ROWS;
    const int64_t most = std::clamp<int64_t>(CACHE / std::max<int64_t>(z.tile(), 4 * grid * LANES), 1, tiles);
#pragma omp parallel num_threads(threads)
    {
        const Scratch terms(2 * most * 2 * grid * LANES), sums(ROWS * rank * LANES);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < images * heads * parts; ++task) {
            const int64_t pair = task / parts, first = task % parts * ROWS, count = std::min(rows - first, ROWS);
            const float* scores = s + (pair * rows + first) * z.keys();
            std::fill(sums.p, sums.p + count * rank * LANES, 0.0f);
            for (int64_t tile = 0; tile < tiles; tile += most) {
                const int64_t some = std::min(most, tiles - tile), key = tile * LANES;
                const float* mask = real ? real + pair / heads * z.keys() + key : nullptr;
                const float* coefficients = a + (pair % heads * tiles + tile) * z.tile();
                for (int64_t row = 0; row < count; row += 2)
                    (row + 2 <= count ? forward_rows<2> : forward_rows<1>)(z, scores + row * z.keys() + key, mask,
                                                                          coefficients, some, terms.p,
                                                                          sums.p + row * rank * LANES);
            }
            for (int64_t i = 0; i < count * rank; ++i)
                h[(pair * rows + first) * rank + i] = total(load(sums.p + i * LANES));
        }
    }
}

// dS of N rows and V tiles over the place of S. terms: (2 * grid, rows, V, LANES), ``step`` floats per term.
template <int N, int V>
static inline void slopes(const Sizes& z, const float* dh, const float* a, const float* terms, int64_t step, float* s) {
    vec ds[N][V] = {};
    for (int m = 1; m <= z.grid; ++m, terms += 2 * step, a += 2 * z.rank * LANES) {
        vec of_cos[N][V] = {}, of_sin[N][V] = {};  // dH a_m and dH b_m
        for (int i = 0; i < z.rank; ++i) {
            vec g[N];
            for (int n = 0; n < N; ++n) g[n] = splat(dh[n * z.rank + i]);
            for (int v = 0; v < V; ++v) {
                const vec am = load_once(a + v * z.tile() + i * LANES);
                for (int n = 0; n < N; ++n) of_cos[n][v] += g[n] * am;
                const vec bm = load_once(a + v * z.tile() + (z.rank + i) * LANES);
                for (int n = 0; n < N; ++n) of_sin[n][v] += g[n] * bm;
            }
        }
        for (int n = 0; n < N; ++n)
            for (int v = 0; v < V; ++v) {
                const float* cos = terms + (n * V + v) * LANES;
                ds[n][v] += (float)m * (load(cos) * of_sin[n][v] - load(cos + step) * of_cos[n][v]);
            }
    }
    for (int n = 0; n < N; ++n)
        for (int v = 0; v < V; ++v) store(s + n * z.keys() + v * LANES, ds[n][v]);
}

// da[v][i] += sum over rows of dh[row][i] * term[row][v]
template <int V, int WIDTH>
static inline void gather(const Sizes& z, const float* dh, const float* term, int64_t rows, float* da) {
    vec sum[WIDTH][V];
    for (int i = 0; i < WIDTH; ++i)
        for (int v = 0; v < V; ++v) sum[i][v] = load(da + v * z.tile() + i * LANES);
    for (int64_t row = 0; row < rows; ++row) {
        vec t[V];
        for (int v = 0; v < V; ++v) t[v] = load(term + (row * V + v) * LANES);
        for (int i = 0; i < WIDTH; ++i) {
            const vec g = splat(dh[row * z.rank + i]);
            for (int v = 0; v < V; ++v) sum[i][v] += g * t[v];
        }
    }
    for (int i = 0; i < WIDTH; ++i)
        for (int v = 0; v < V; ++v) store(da + v * z.tile() + i * LANES, sum[i][v]);
}

// All images and rows of V tiles from ``tile`` on, for one head.
template <int V>
static void backward_tiles(const Sizes& z, int64_t head, int64_t tile, float* s, const float* real, const float* dh,
                           const float* a, float* da, int64_t most, float* terms, float* sums) {
    a += (head * z.tiles + tile) * z.tile(), da += (head * z.tiles + tile) * z.tile();
    std::fill(sums, sums + V * z.tile(), 0.0f);
    for (int64_t image = 0; image < z.images; ++image) {
        const float* mask = real ? real + image * z.keys() + tile * LANES : nullptr;
        for (int64_t first = 0; first < z.rows; first += most) {
            const int64_t rows = std::min(most, z.rows - first), step = rows * V * LANES;
            const int64_t at = (image * z.heads + head) * z.rows + first;
            float* block = s + at * z.keys() + tile * LANES;
            const float* grad = dh + at * z.rank;
            for (int64_t row = 0; row < rows; ++row)
                for (int v = 0; v < V; ++v)
                    harmonics(block + row * z.keys() + v * LANES, mask ? mask + v * LANES : nullptr, z.grid,
                              terms + (row * V + v) * LANES, step);
            int64_t row = 0;
            for (; row + 3 <= rows; row += 3)
                slopes<3, V>(z, grad + row * z.rank, a, terms + row * V * LANES, step, block + row * z.keys());
            for (; row < rows; ++row)
                slopes<1, V>(z, grad + row * z.rank, a, terms + row * V * LANES, step, block + row * z.keys());
            for (int term = 0; term < 2 * z.grid; ++term)
                over_rank(z.rank, [&](int part, auto width) {
                    gather<V, decltype(width)::value>(z, grad + part, terms + term * step, rows,
                                                      sums + (term * z.rank + part) * LANES);
                });
        }
    }
    for (int64_t i = 0; i < V * z.tile(); ++i) da[i] += sums[i];
}

// As the forward pass; s becomes dS, da is added to. Each task owns its tiles: nothing is shared between threads.
extern "C" void fourier_backward(float* s, const float* real, const float* dh, const float* a, float* da,
                                 int64_t images, int64_t heads, int64_t rows, int64_t tiles, int grid, int rank,
                                 int threads) {
    const Sizes z{images, heads, rows, tiles, grid, rank};
    const int64_t parts = (tiles + 1) / 2, most = std::clamp(CACHE / (4 * grid * LANES) / 3 * 3, 3, 96);
#pragma omp parallel num_threads(threads)
    {
        const Scratch terms(most * 4 * grid * LANES), sums(2 * z.tile());
#pragma omp for schedule(static)
        for (int64_t task = 0; task < heads * parts; ++task) {
            const int64_t head = task / parts, tile = task % parts * 2;
            (tile + 2 <= tiles ? backward_tiles<2> : backward_tiles<1>)(z, head, tile, s, real, dh, a, da, most,
                                                                       terms.p, sums.p);
        }
    }
}

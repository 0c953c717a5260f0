// Arithmetic, memory layouts and matrix products on columns of words.
//
// A sentence has 16 words. A column holds one number of each word, in V vectors of LANES floats. LANES is the register width of
// the instruction set. The compiler defines C, the word width.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

// LANES: floats per vector. SUMS: how many vectors of sums a product keeps in registers, besides its operands
#if defined(__AVX512F__)
constexpr int LANES = 16, SUMS = 12;  // 32 registers; 8 sums hide the latency of 2 multiply-adds per cycle
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int LANES = 8, SUMS = 12;  // 16 registers
#elif defined(__aarch64__)
constexpr int LANES = 4, SUMS = 24;  // NEON: 32 registers; 4 multiply-adds per cycle on wide cores
#else
#error "the native backend needs AVX-512, AVX2 with FMA, or NEON"
#endif

#define INLINE __attribute__((always_inline)) inline
#define INLINED __attribute__((always_inline))  // for lambdas

constexpr int M = 16;  // words per sentence
constexpr int V = M / LANES;  // vectors per column
constexpr int CP = (C + LANES - 1) / LANES * LANES;  // floats of a word in a row: C, padded to whole vectors

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));

struct Column { Vector part[V]; };

// ------------------------------------------------------------ arithmetic

static INLINE Vector all(float x) { return x - Vector{}; }

template <class Operation>
static INLINE Column each(Operation operation) {
    Column out;
#pragma GCC unroll 4
    for (int p = 0; p < V; p++) out.part[p] = operation(p);
    return out;
}

static INLINE Column operator+(const Column &a, const Column &b) {
    return each([&](int p) { return a.part[p] + b.part[p]; });
}
static INLINE Column operator-(const Column &a, const Column &b) {
    return each([&](int p) { return a.part[p] - b.part[p]; });
}
static INLINE Column operator*(const Column &a, const Column &b) {
    return each([&](int p) { return a.part[p] * b.part[p]; });
}
static INLINE Column operator+(const Column &a, float b) {
    return each([&](int p) { return a.part[p] + b; });
}
static INLINE Column operator*(const Column &a, float b) {
    return each([&](int p) { return a.part[p] * b; });
}
static INLINE void operator+=(Column &a, const Column &b) { a = a + b; }
static INLINE void operator*=(Column &a, const Column &b) { a = a * b; }
static INLINE void operator*=(Column &a, float b) { a = a * b; }

static INLINE Column maximum(const Column &a, const Column &b) {
    return each([&](int p) { return b.part[p] > a.part[p] ? b.part[p] : a.part[p]; });
}

static INLINE Column inverse(const Column &x) {
    return each([&](int p) { return 1.0f / x.part[p]; });
}

static INLINE Column inverse_root(const Column &x) {
    return each([&](int p) {
        Vector root;
        for (int i = 0; i < LANES; i++) root[i] = std::sqrt(x.part[p][i]);
        return 1.0f / root;
    });
}

// The error is at most 2 units in the last place
static INLINE Vector exponential(Vector x) {
    x = x < -87.0f ? all(-87.0f) : x > 88.0f ? all(88.0f) : x;
    Vector n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // rounds to an integer
    Vector r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Vector p = r * 1.98756912e-4f + 1.39819994e-3f;
    p = p * r + 8.33345205e-3f;
    p = p * r + 4.16657962e-2f;
    p = p * r + 1.66666657e-1f;
    p = p * r + 0.5f;
    p = p * r * r + r + 1.0f;
    Integers power = (__builtin_convertvector(n, Integers) + 127) << 23;
    return p * (Vector)power;
}

static INLINE Column exponential(const Column &x) {
    return each([&](int p) { return exponential(x.part[p]); });
}

// The normal distribution function, 0.5 + 0.5 erf(x / sqrt(2)). GELU is x * normal_cdf(x). P(x^2) / Q(x^2) approximates
// erf(x / sqrt(2)) / x with an error of 8e-8. It was fitted by least squares over [-5.7, 5.7]; beyond, float32 has only 0 and 1.
static INLINE Vector normal_cdf(Vector x) {
    x = x < -5.7f ? all(-5.7f) : x > 5.7f ? all(5.7f) : x;
    Vector t = x * x;
    Vector p = t * 2.07435712e-10f - 4.27478878e-08f;
    p = p * t + 6.59983321e-06f;
    p = p * t + 3.62779714e-04f;
    p = p * t + 9.17569932e-03f;
    p = p * t + 7.42433434e-02f;
    p = p * t + 7.97884508e-01f;
    Vector q = t * 6.53989585e-05f + 1.89983533e-03f;
    q = q * t + 2.97888605e-02f;
    q = q * t + 2.59715816e-01f;
    q = q * t + 1.0f;
    return 0.5f + 0.5f * x * p / q;
}

static INLINE Column normal_cdf(const Column &x) {
    return each([&](int p) { return normal_cdf(x.part[p]); });
}

// ------------------------------------------------------------ memory layouts

// Call work(size, first) for each block of SIZE, and for the rest. `size` is a compile-time constant
template <int TOTAL, int SIZE, class Work>
static INLINE void blocks(Work work) {
    for (int first = 0; first + SIZE <= TOTAL; first += SIZE) work(std::integral_constant<int, SIZE>{}, first);
    if constexpr (TOTAL % SIZE != 0) work(std::integral_constant<int, TOTAL % SIZE>{}, TOTAL / SIZE * SIZE);
}

// The block size that splits `total` into the most equal blocks of at most `most`
constexpr int even(int total, int most) {
    const int count = (total + most - 1) / most;
    return (total + count - 1) / count;
}

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else  // GCC before version 12 has no __builtin_shufflevector
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Integers{__VA_ARGS__})
#endif

// One round of a transposition: swap blocks of STEP x STEP across the diagonal
template <int STEP, int... LANE>
static INLINE void exchange(Vector *x, std::integer_sequence<int, LANE...>) {
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++)
        if (!(i & STEP)) {
            Vector a = x[i], b = x[i + STEP];
            x[i] = SHUFFLE(a, b, (LANE & STEP ? LANES + LANE - STEP : LANE)...);
            x[i + STEP] = SHUFFLE(a, b, (LANE & STEP ? LANES + LANE : LANE + STEP)...);
        }
}

template <int STEP = LANES / 2>
static INLINE void transpose(Vector *x) {  // a LANES x LANES matrix
    exchange<STEP>(x, std::make_integer_sequence<int, LANES>{});
    if constexpr (STEP > 1) transpose<STEP / 2>(x);
}

static INLINE void load(const float *words, Column *x) {  // (16, C) -> C columns
    blocks<C, LANES>([&](auto size, int first) INLINED {
        for (int p = 0; p < V; p++) {
            Vector block[LANES] = {};
            for (int i = 0; i < LANES; i++)
                std::memcpy(&block[i], words + (p * LANES + i) * C + first, size * sizeof(float));
            transpose(block);
            for (int i = 0; i < size; i++) x[first + i].part[p] = block[i];
        }
    });
}

// C columns -> (16, WIDTH): WIDTH is C, or CP with zeros in the padding
template <int WIDTH>
static INLINE void store(const Column *x, float *words) {
    blocks<C, LANES>([&](auto size, int first) INLINED {
        constexpr int COUNT = WIDTH == C ? decltype(size)::value : LANES;
        for (int p = 0; p < V; p++) {
            Vector block[LANES] = {};
            for (int i = 0; i < size; i++) block[i] = x[first + i].part[p];
            transpose(block);
            for (int i = 0; i < LANES; i++)
                std::memcpy(words + (p * LANES + i) * WIDTH + first, &block[i], COUNT * sizeof(float));
        }
    });
}

static INLINE void transpose_words(const Column *x, Column *out) {  // 16 columns as a 16 x 16 matrix
    for (int p = 0; p < V; p++)
        for (int q = 0; q < V; q++) {
            Vector block[LANES];
            for (int i = 0; i < LANES; i++) block[i] = x[q * LANES + i].part[p];
            transpose(block);
            for (int i = 0; i < LANES; i++) out[p * LANES + i].part[q] = block[i];
        }
}

// ------------------------------------------------------------ matrix products

// y[o] (+)= bias[o] + sum over i of weight[o, i] x[i], or of weight[i, o] x[i] where TRANSPOSED
template <int OUT, int IN, bool TRANSPOSED = false, bool ADD = false>
static INLINE void linear(const float *weight, const float *bias, const Column *x, Column *y) {
    blocks<OUT, even(OUT, SUMS / V)>([&](auto size, int first) INLINED {
        constexpr int SIZE = decltype(size)::value;
        Vector sums[SIZE][V];
#pragma GCC unroll 12
        for (int j = 0; j < SIZE; j++)
#pragma GCC unroll 4
            for (int p = 0; p < V; p++) sums[j][p] = bias ? all(bias[first + j]) : Vector{};
        for (int i = 0; i < IN; i++) {
            Vector column[V];
#pragma GCC unroll 4
            for (int p = 0; p < V; p++) column[p] = x[i].part[p];
#pragma GCC unroll 12
            for (int j = 0; j < SIZE; j++) {
                const float factor = TRANSPOSED ? weight[i * OUT + first + j] : weight[(first + j) * IN + i];
#pragma GCC unroll 4
                for (int p = 0; p < V; p++) sums[j][p] += factor * column[p];
            }
        }
#pragma GCC unroll 12
        for (int j = 0; j < SIZE; j++)
#pragma GCC unroll 4
            for (int p = 0; p < V; p++) y[first + j].part[p] = ADD ? y[first + j].part[p] + sums[j][p] : sums[j][p];
    });
}

// Add the gradients of a linear: d_weight[o, i] += sum over words of d_y[o] x[i], and d_bias[o] += d_y[o]. x holds words as rows
template <int OUT>
static INLINE void linear_gradient(const Column *d_y, const float (*x)[CP], float (*d_weight)[CP], Column *d_bias) {
    const float(*grads)[M] = (const float(*)[M])d_y;
    constexpr int COLUMNS = even(CP / LANES, 3);
    if (d_bias)
        for (int o = 0; o < OUT; o++) d_bias[o] += d_y[o];
    blocks<OUT, even(OUT, SUMS / COLUMNS)>([&](auto height, int first) INLINED {
        blocks<CP / LANES, COLUMNS>([&](auto width, int column) INLINED {
            constexpr int HEIGHT = decltype(height)::value, WIDTH = decltype(width)::value;
            Vector sums[HEIGHT][WIDTH];
#pragma GCC unroll 12
            for (int j = 0; j < HEIGHT; j++)
#pragma GCC unroll 3
                for (int k = 0; k < WIDTH; k++)
                    sums[j][k] = *(const Vector *)&d_weight[first + j][(column + k) * LANES];
            for (int m = 0; m < M; m++) {
                Vector row[WIDTH];
#pragma GCC unroll 3
                for (int k = 0; k < WIDTH; k++) row[k] = *(const Vector *)&x[m][(column + k) * LANES];
#pragma GCC unroll 12
                for (int j = 0; j < HEIGHT; j++)
#pragma GCC unroll 3
                    for (int k = 0; k < WIDTH; k++) sums[j][k] += grads[first + j][m] * row[k];
            }
#pragma GCC unroll 12
            for (int j = 0; j < HEIGHT; j++)
#pragma GCC unroll 3
                for (int k = 0; k < WIDTH; k++)
                    *(Vector *)&d_weight[first + j][(column + k) * LANES] = sums[j][k];
        });
    });
}

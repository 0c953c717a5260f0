// The inner transformer on CPU: load a sentence, run the whole layer in registers and the first-level cache, store the result.
//
// A sentence has 16 words. A column is one number of each word, held in V vectors of LANES floats, the register width of
// the instruction set. Every step of the layer is arithmetic on whole vectors.
//
// ops/native.py compiles this file for one set of sizes: C, the word width; H, heads; F, the MLP width. The specification
// is ops/reference.py. Backward recomputes a sentence from its words.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

// Floats of a vector, and how many vectors of sums a product keeps in registers beside its operands
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
#define INLINED __attribute__((always_inline))  // of a lambda

constexpr int M = 16;  // words of a sentence
constexpr int D = C / H;
constexpr int V = M / LANES;  // vectors per column
constexpr int CP = (C + LANES - 1) / LANES * LANES;  // a word as a row, padded to whole vectors

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));

struct Column {  // one number of each word
    Vector part[V];
};

struct Layer {  // in the reference's order; biases of q, k and v may be null
    const float *norm1, *norm1_bias, *qk, *qk_bias, *v, *v_bias, *proj, *proj_bias;
    const float *norm2, *norm2_bias, *fc1, *fc1_bias, *fc2, *fc2_bias;
};

// Sums of the parameters' gradients. Those of vectors are columns, whose 16 numbers are still to be added; those of
// matrices are rows of CP numbers; fc2 is transposed.
struct Gradients {
    Column norm1[C], norm1_bias[C], norm2[C], norm2_bias[C];
    Column q_bias[C], k_bias[C], v_bias[C], proj_bias[C], fc1_bias[F], fc2_bias[C];
    float q[C][CP], k[C][CP], v[C][CP], proj[C][CP], fc1[F][CP], fc2[F][CP];
};

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

static INLINE Vector exponential(Vector x) {  // to 2 units in the last place
    x = x < -87.0f ? all(-87.0f) : x > 88.0f ? all(88.0f) : x;
    Vector n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // rounds to a whole number
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

// The normal distribution function, with which nn.GELU is x * below(x): 0.5 + 0.5 erf(x / sqrt(2)), whose quotient by x is
// P(x^2) / Q(x^2) to 8e-8, fitted by least squares over [-5.7, 5.7]; beyond, float32 has only 0 and 1.
static INLINE Vector below(Vector x) {
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

static INLINE Column below(const Column &x) {
    return each([&](int p) { return below(x.part[p]); });
}

// ------------------------------------------------------------ loops and layouts

// Calls work(size, first) for blocks of SIZE and the rest; size is a constant
template <int TOTAL, int SIZE, class Work>
static INLINE void blocks(Work work) {
    for (int first = 0; first + SIZE <= TOTAL; first += SIZE) work(std::integral_constant<int, SIZE>{}, first);
    if constexpr (TOTAL % SIZE != 0) work(std::integral_constant<int, TOTAL % SIZE>{}, TOTAL / SIZE * SIZE);
}

constexpr int even(int total, int most) {  // the size of blocks, at most `most`, that are as equal as can be
    const int count = (total + most - 1) / most;
    return (total + count - 1) / count;
}

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else  // GCC before 12 has only this one
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Integers{__VA_ARGS__})
#endif

// One round of a transposition: blocks of STEP x STEP change places across the diagonal
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
static INLINE void transpose(Vector *x) {  // LANES x LANES
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

static INLINE void store(const Column *x, float *words) {  // C columns -> (16, C)
    blocks<C, LANES>([&](auto size, int first) INLINED {
        for (int p = 0; p < V; p++) {
            Vector block[LANES] = {};
            for (int i = 0; i < size; i++) block[i] = x[first + i].part[p];
            transpose(block);
            for (int i = 0; i < LANES; i++)
                std::memcpy(words + (p * LANES + i) * C + first, &block[i], size * sizeof(float));
        }
    });
}

static INLINE void rows(const Column *x, float (*out)[CP]) {  // C columns -> (16, CP), with zeros behind the columns
    blocks<C, LANES>([&](auto size, int first) INLINED {
        for (int p = 0; p < V; p++) {
            Vector block[LANES] = {};
            for (int i = 0; i < size; i++) block[i] = x[first + i].part[p];
            transpose(block);
            for (int i = 0; i < LANES; i++) std::memcpy(&out[p * LANES + i][first], &block[i], sizeof(Vector));
        }
    });
}

static INLINE void transpose_words(const Column *x, Column *out) {  // 16 columns, as a 16 x 16 matrix
    for (int p = 0; p < V; p++)
        for (int q = 0; q < V; q++) {
            Vector block[LANES];
            for (int i = 0; i < LANES; i++) block[i] = x[q * LANES + i].part[p];
            transpose(block);
            for (int i = 0; i < LANES; i++) out[p * LANES + i].part[q] = block[i];
        }
}

// ------------------------------------------------------------ products

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

// Adds a linear's gradients: d_weight[o, i] += sum over words of d_y[o] x[i], with x as rows of words; d_bias[o] += d_y[o]
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

// ------------------------------------------------------------ LayerNorm

// x -> normalized; returns 1 / deviation. Weight and bias follow in scale_and_shift
static INLINE Column normalize(const Column *x, float eps, Column *normalized) {
    Column mean{}, variance{};
    for (int c = 0; c < C; c++) mean += x[c];
    mean *= 1.0f / C;
    for (int c = 0; c < C; c++) {
        normalized[c] = x[c] - mean;
        variance += normalized[c] * normalized[c];
    }
    Column rstd = inverse_root(variance * (1.0f / C) + eps);
    for (int c = 0; c < C; c++) normalized[c] *= rstd;
    return rstd;
}

static INLINE void scale_and_shift(const Column *normalized, const float *weight, const float *bias, Column *y) {
    for (int c = 0; c < C; c++) y[c] = normalized[c] * weight[c] + bias[c];
}

// Adds the gradient of a LayerNorm's input to `grad`
static INLINE void normalize_backward(
    const Column *d_y, const Column *normalized, const Column &rstd, const float *weight, Column *d_weight, Column *d_bias,
    Column *grad
) {
    Column mean{}, along{};
    for (int c = 0; c < C; c++) {
        d_weight[c] += d_y[c] * normalized[c];
        d_bias[c] += d_y[c];
        mean += d_y[c] * weight[c];
        along += d_y[c] * weight[c] * normalized[c];
    }
    mean *= 1.0f / C;
    along *= 1.0f / C;
    for (int c = 0; c < C; c++) grad[c] += (d_y[c] * weight[c] - mean - normalized[c] * along) * rstd;
}

// ------------------------------------------------------------ a sentence

struct Sentence {  // what forward finds, for backward
    Column normalized1[C], x1[C], q[C], k[C], v[C], p[H][M], attended[C];
    Column normalized2[C], x2[C], hidden[F], share[F], active[F];
    Column rstd1, rstd2;
};

// p[j] = probability, for the 16 words, of attending to word j
static INLINE void attend(const Column *q, const Column *k, Column *p) {
    Column scaled[D];
    for (int d = 0; d < D; d++) scaled[d] = q[d] * (1.0f / std::sqrt((float)D));
    linear<M, D, true>((const float *)k, nullptr, scaled, p);
    Column largest = p[0], total{};
    for (int j = 1; j < M; j++) largest = maximum(largest, p[j]);
    for (int j = 0; j < M; j++) total += p[j] = exponential(p[j] - largest);
    total = inverse(total);
    for (int j = 0; j < M; j++) p[j] *= total;
}

// x, the words, becomes the layer's output; s receives all that lies between
static INLINE void forward(const Layer &w, float eps, float attn_scale, float mlp_scale, Column *x, Sentence &s) {
    Column branch[C];
    s.rstd1 = normalize(x, eps, s.normalized1);
    scale_and_shift(s.normalized1, w.norm1, w.norm1_bias, s.x1);
    linear<C, C>(w.qk, w.qk_bias, s.x1, s.q);
    linear<C, C>(w.qk + C * C, w.qk_bias ? w.qk_bias + C : nullptr, s.x1, s.k);
    linear<C, C>(w.v, w.v_bias, s.x1, s.v);
    for (int h = 0; h < H; h++) {
        attend(s.q + h * D, s.k + h * D, s.p[h]);
        linear<D, M>((const float *)(s.v + h * D), nullptr, s.p[h], s.attended + h * D);
    }
    linear<C, C>(w.proj, w.proj_bias, s.attended, branch);
    for (int c = 0; c < C; c++) x[c] += branch[c] * attn_scale;

    s.rstd2 = normalize(x, eps, s.normalized2);
    scale_and_shift(s.normalized2, w.norm2, w.norm2_bias, s.x2);
    linear<F, C>(w.fc1, w.fc1_bias, s.x2, s.hidden);
    for (int f = 0; f < F; f++) {
        s.share[f] = below(s.hidden[f]);
        s.active[f] = s.hidden[f] * s.share[f];
    }
    linear<C, F>(w.fc2, w.fc2_bias, s.active, branch);
    for (int c = 0; c < C; c++) x[c] += branch[c] * mlp_scale;
}

// grad, of the layer's output, becomes that of the words; the parameters' gradients are added to `d`
static INLINE void backward(
    const Layer &w, float attn_scale, float mlp_scale, const Sentence &s, Column *grad, Gradients &d
) {
    Column d_branch[C], d_hidden[F], d_x[C];
    alignas(64) float row[M][CP];
    // the MLP half
    for (int c = 0; c < C; c++) d_branch[c] = grad[c] * mlp_scale;
    for (int c = 0; c < C; c++) d.fc2_bias[c] += d_branch[c];
    rows(d_branch, row);
    linear_gradient<F>(s.active, row, d.fc2, nullptr);
    linear<F, C, true>(w.fc2, nullptr, d_branch, d_hidden);
    for (int f = 0; f < F; f++) {  // GELU's slope: below(h) + h * the normal density
        Column h = s.hidden[f];
        d_hidden[f] *= s.share[f] + h * exponential(h * h * -0.5f) * 0.39894228f;
    }
    rows(s.x2, row);
    linear_gradient<F>(d_hidden, row, d.fc1, d.fc1_bias);
    linear<C, F, true>(w.fc1, nullptr, d_hidden, d_x);
    normalize_backward(d_x, s.normalized2, s.rstd2, w.norm2, d.norm2, d.norm2_bias, grad);

    // the attention half
    Column d_attended[C], d_q[C], d_k[C], d_v[C];
    for (int c = 0; c < C; c++) d_branch[c] = grad[c] * attn_scale;
    rows(s.attended, row);
    linear_gradient<C>(d_branch, row, d.proj, d.proj_bias);
    linear<C, C, true>(w.proj, nullptr, d_branch, d_attended);
    for (int h = 0; h < H; h++) {
        const int first = h * D;
        const Column *p = s.p[h];
        Column d_scores[M], along{}, by_query[M];
        linear<M, D, true>((const float *)(s.v + first), nullptr, d_attended + first, d_scores);
        for (int j = 0; j < M; j++) along += d_scores[j] * p[j];
        for (int j = 0; j < M; j++) d_scores[j] = p[j] * (d_scores[j] - along) * (1.0f / std::sqrt((float)D));
        linear<D, M>((const float *)(s.k + first), nullptr, d_scores, d_q + first);
        // of keys and values: lanes are the words that are attended to
        transpose_words(d_scores, by_query);
        linear<D, M>((const float *)(s.q + first), nullptr, by_query, d_k + first);
        transpose_words(p, by_query);
        linear<D, M>((const float *)(d_attended + first), nullptr, by_query, d_v + first);
    }
    rows(s.x1, row);
    linear_gradient<C>(d_q, row, d.q, d.q_bias);
    linear_gradient<C>(d_k, row, d.k, d.k_bias);
    linear_gradient<C>(d_v, row, d.v, d.v_bias);
    linear<C, C, true>(w.qk, nullptr, d_q, d_x);
    linear<C, C, true, true>(w.qk + C * C, nullptr, d_k, d_x);
    linear<C, C, true, true>(w.v, nullptr, d_v, d_x);
    normalize_backward(d_x, s.normalized1, s.rstd1, w.norm1, d.norm1, d.norm1_bias, grad);
}

// ------------------------------------------------------------ all sentences

extern "C" {

void inner_forward(
    const float *words, float *out, const Layer *layer, const float *attn_scale, const float *mlp_scale, int64_t sentences,
    float eps, int threads
) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < sentences; i++) {
        Sentence s;
        Column x[C];
        load(words + i * M * C, x);
        forward(*layer, eps, attn_scale ? attn_scale[i] : 1.0f, mlp_scale ? mlp_scale[i] : 1.0f, x, s);
        store(x, out + i * M * C);
    }
}

int64_t gradients_size() { return sizeof(Gradients) / sizeof(float); }

int64_t padded_width() { return CP; }

int64_t lanes() { return LANES; }

// `parts` shares of the sentences, whose parameter gradients (parts, gradients_size()), zeros at first, the caller adds up:
// the same for any number of threads
void inner_backward(
    const float *grad_out, const float *words, float *grad_words, Gradients *gradients, const Layer *layer,
    const float *attn_scale, const float *mlp_scale, int64_t sentences, int64_t parts, float eps, int threads
) {
#pragma omp parallel for num_threads(threads)
    for (int64_t part = 0; part < parts; part++)
        for (int64_t i = part * sentences / parts; i < (part + 1) * sentences / parts; i++) {
            float scale1 = attn_scale ? attn_scale[i] : 1.0f, scale2 = mlp_scale ? mlp_scale[i] : 1.0f;
            Sentence s;
            Column x[C], grad[C];
            load(words + i * M * C, x);
            forward(*layer, eps, scale1, scale2, x, s);
            load(grad_out + i * M * C, grad);
            backward(*layer, scale1, scale2, s, grad, gradients[part]);
            store(grad, grad_words + i * M * C);
        }
}
}

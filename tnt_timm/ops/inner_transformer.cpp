// The inner transformer for CPUs: a sentence's 16 words are the 16 lanes of a vector, so that every operation of the layer
// is one on whole vectors in registers or the first cache; nothing of a sentence is written but its result.
//
// Compiled by ops/native.py for one set of sizes: C, the word width; H, heads; F, the MLP's width. ops/reference.py is the
// specification; backward computes a sentence again from its words.

#include <cmath>
#include <cstdint>
#include <cstring>

constexpr int M = 16;  // words of a sentence
constexpr int D = C / H;
constexpr int CP = (C + 16) / 16 * 16;  // a word as a row: its columns, a one, and zeros up to whole vectors

typedef float Vector __attribute__((vector_size(64)));  // one number of each word, or 16 columns of a word
typedef int32_t Integers __attribute__((vector_size(64)));

struct Layer {  // in the reference's order; biases of q, k and v may be null
    const float *norm1, *norm1_bias, *qk, *qk_bias, *v, *v_bias, *proj, *proj_bias;
    const float *norm2, *norm2_bias, *fc1, *fc1_bias, *fc2, *fc2_bias;
};

// Gradients of the parameters, to be added up: vectors over their 16 lanes. Matrices are rows of CP columns, and as the
// words have a one behind their columns, column C holds the gradient of the bias; fc2 is transposed, and has none.
struct Gradients {
    Vector norm1[C], norm1_bias[C], norm2[C], norm2_bias[C], fc2_bias[C];
    float q[C][CP], k[C][CP], v[C][CP], proj[C][CP], fc1[F][CP], fc2[F][CP];
};

// ------------------------------------------------------------ functions of a vector

static inline Vector all(float x) { return x - Vector{}; }

// One round of a 16 x 16 transposition: blocks of `step` x `step` change places across the diagonal
static inline void exchange(Vector *x, int step, Integers low, Integers high) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++)
        if (!(i & step)) {
            Vector a = x[i], b = x[i + step];
            x[i] = __builtin_shuffle(a, b, low);
            x[i + step] = __builtin_shuffle(a, b, high);
        }
}

static inline void transpose(Vector *x) {
    exchange(
        x, 8, Integers{0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23},
        Integers{8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31}
    );
    exchange(
        x, 4, Integers{0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27},
        Integers{4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31}
    );
    exchange(
        x, 2, Integers{0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29},
        Integers{2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31}
    );
    exchange(
        x, 1, Integers{0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30},
        Integers{1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31}
    );
}

static inline Vector exponential(Vector x) {  // to 2 units in the last place
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

// The normal distribution function, with which nn.GELU is x * below(x): 0.5 + 0.5 erf(x / sqrt(2)), whose quotient by x is
// P(x^2) / Q(x^2) to 8e-8, fitted by least squares over [-5.7, 5.7]; beyond, float32 has only 0 and 1.
static inline Vector below(Vector x) {
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

static inline Vector inverse_root(Vector x) {
    Vector root;
    for (int i = 0; i < 16; i++) root[i] = std::sqrt(x[i]);
    return 1.0f / root;
}

// ------------------------------------------------------------ pieces of the layer

static inline void load(const float *words, Vector *x) {  // (16, C) -> C vectors
    for (int first = 0; first < C; first += 16) {
        const int columns = C - first < 16 ? C - first : 16;
        Vector block[M] = {};
        for (int m = 0; m < M; m++) std::memcpy(&block[m], words + m * C + first, columns * sizeof(float));
        transpose(block);
        std::memcpy(x + first, block, columns * sizeof(Vector));
    }
}

static inline void store(const Vector *x, float *words) {  // C vectors -> (16, C)
    for (int first = 0; first < C; first += 16) {
        const int columns = C - first < 16 ? C - first : 16;
        Vector block[M] = {};
        std::memcpy(block, x + first, columns * sizeof(Vector));
        transpose(block);
        for (int m = 0; m < M; m++) std::memcpy(words + m * C + first, &block[m], columns * sizeof(float));
    }
}

static inline void rows(const Vector *x, float (*out)[CP]) {  // C vectors -> (16, CP), a one behind the columns
    for (int first = 0; first < CP; first += 16) {
        Vector block[M] = {};
        for (int c = first; c < first + 16 && c <= C; c++) block[c - first] = c < C ? x[c] : all(1.0f);
        transpose(block);
        for (int m = 0; m < M; m++) std::memcpy(&out[m][first], &block[m], sizeof(Vector));
    }
}

// y[o] (+)= bias[o] + sum over i of weight[o, i] x[i], or of weight[i, o] x[i] where transposed
template <int OUT, int IN, bool TRANSPOSED, bool ADD>
static inline void linear(const float *weight, const float *bias, const Vector *x, Vector *y) {
    constexpr int STEP = 8;  // sums at a time, in registers
    for (int first = 0; first < OUT; first += STEP) {
        Vector sums[STEP];
        constexpr int last = OUT % STEP;
        if (last == 0 || first + STEP <= OUT) {
            for (int j = 0; j < STEP; j++) sums[j] = bias ? all(bias[first + j]) : Vector{};
            for (int i = 0; i < IN; i++)
#pragma GCC unroll 8
                for (int j = 0; j < STEP; j++)
                    sums[j] += (TRANSPOSED ? weight[i * OUT + first + j] : weight[(first + j) * IN + i]) * x[i];
            for (int j = 0; j < STEP; j++) y[first + j] = ADD ? y[first + j] + sums[j] : sums[j];
        } else {
            for (int j = 0; j < last; j++) sums[j] = bias ? all(bias[first + j]) : Vector{};
            for (int i = 0; i < IN; i++)
                for (int j = 0; j < last; j++)
                    sums[j] += (TRANSPOSED ? weight[i * OUT + first + j] : weight[(first + j) * IN + i]) * x[i];
            for (int j = 0; j < last; j++) y[first + j] = ADD ? y[first + j] + sums[j] : sums[j];
        }
    }
}

// LayerNorm in two steps: x -> normalized, 1 / deviation; then weight and bias
static inline Vector normalize(const Vector *x, float eps, Vector *normalized) {
    Vector mean{}, variance{};
    for (int c = 0; c < C; c++) mean += x[c];
    mean *= 1.0f / C;
    for (int c = 0; c < C; c++) {
        normalized[c] = x[c] - mean;
        variance += normalized[c] * normalized[c];
    }
    Vector rstd = inverse_root(variance * (1.0f / C) + eps);
    for (int c = 0; c < C; c++) normalized[c] *= rstd;
    return rstd;
}

static inline void scale_and_shift(const Vector *normalized, const float *weight, const float *bias, Vector *y) {
    for (int c = 0; c < C; c++) y[c] = normalized[c] * weight[c] + bias[c];
}

// Adds the gradient of a LayerNorm's input to `grad`
static inline void normalize_backward(
    const Vector *d_y, const Vector *normalized, Vector rstd, const float *weight, Vector *d_weight, Vector *d_bias, Vector *grad
) {
    Vector mean{}, along{};
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

// Adds a linear's weight gradient, d_weight[o, i] = sum over words of d_y[o] x[i]; x as rows of words
template <int OUT>
static inline void weight_gradient(const Vector *d_y, const float (*x)[CP], float (*d_weight)[CP]) {
    const float(*grads)[M] = (const float(*)[M])d_y;
    constexpr int STEP = 4;
    static_assert(OUT % STEP == 0);
    for (int first = 0; first < OUT; first += STEP)
        for (int column = 0; column < CP; column += 16) {
            Vector sums[STEP];
#pragma GCC unroll 4
            for (int j = 0; j < STEP; j++) sums[j] = *(Vector *)&d_weight[first + j][column];
            for (int m = 0; m < M; m++) {
                Vector row = *(const Vector *)&x[m][column];
#pragma GCC unroll 4
                for (int j = 0; j < STEP; j++) sums[j] += grads[first + j][m] * row;
            }
#pragma GCC unroll 4
            for (int j = 0; j < STEP; j++) *(Vector *)&d_weight[first + j][column] = sums[j];
        }
}

// ------------------------------------------------------------ a sentence

struct Sentence {  // what forward finds, for backward
    Vector normalized1[C], x1[C], q[C], k[C], v[C], p[H][M], attended[C];
    Vector normalized2[C], x2[C], hidden[F], share[F], active[F];
    Vector rstd1, rstd2;
};

// p[j] = probability, for the 16 words, of attending to word j
static inline void attend(const Vector *q, const Vector *k, Vector *p) {
    const float(*keys)[M] = (const float(*)[M])k;
    const float scale = 1.0f / std::sqrt((float)D);
    Vector scaled[D], largest, total{};
    for (int d = 0; d < D; d++) scaled[d] = q[d] * scale;
    for (int j = 0; j < M; j++) {
        Vector score{};
        for (int d = 0; d < D; d++) score += scaled[d] * keys[d][j];
        largest = j == 0 || score > largest ? score : largest;
        p[j] = score;
    }
    for (int j = 0; j < M; j++) total += p[j] = exponential(p[j] - largest);
    total = 1.0f / total;
    for (int j = 0; j < M; j++) p[j] *= total;
}

// x, the words, becomes the layer's output; s receives all that lies between
static void forward(const Layer &w, float eps, float attn_scale, float mlp_scale, Vector *x, Sentence &s) {
    Vector branch[C];
    s.rstd1 = normalize(x, eps, s.normalized1);
    scale_and_shift(s.normalized1, w.norm1, w.norm1_bias, s.x1);
    linear<C, C, false, false>(w.qk, w.qk_bias, s.x1, s.q);
    linear<C, C, false, false>(w.qk + C * C, w.qk_bias ? w.qk_bias + C : nullptr, s.x1, s.k);
    linear<C, C, false, false>(w.v, w.v_bias, s.x1, s.v);
    for (int h = 0; h < H; h++) {
        attend(s.q + h * D, s.k + h * D, s.p[h]);
        const float(*values)[M] = (const float(*)[M])(s.v + h * D);
        Vector attended[D] = {};
        for (int j = 0; j < M; j++)
#pragma GCC unroll 16
            for (int d = 0; d < D; d++) attended[d] += s.p[h][j] * values[d][j];
        std::memcpy(s.attended + h * D, attended, sizeof attended);
    }
    linear<C, C, false, false>(w.proj, w.proj_bias, s.attended, branch);
    for (int c = 0; c < C; c++) x[c] += branch[c] * attn_scale;

    s.rstd2 = normalize(x, eps, s.normalized2);
    scale_and_shift(s.normalized2, w.norm2, w.norm2_bias, s.x2);
    linear<F, C, false, false>(w.fc1, w.fc1_bias, s.x2, s.hidden);
    for (int f = 0; f < F; f++) {
        s.share[f] = below(s.hidden[f]);
        s.active[f] = s.hidden[f] * s.share[f];
    }
    linear<C, F, false, false>(w.fc2, w.fc2_bias, s.active, branch);
    for (int c = 0; c < C; c++) x[c] += branch[c] * mlp_scale;
}

// grad, of the layer's output, becomes that of the words; the parameters' gradients are added to `d`
static void backward(const Layer &w, float attn_scale, float mlp_scale, const Sentence &s, Vector *grad, Gradients &d) {
    Vector d_branch[C], d_hidden[F], d_x[C];
    alignas(64) float row[M][CP];
    // the MLP half
    for (int c = 0; c < C; c++) d_branch[c] = grad[c] * mlp_scale;
    for (int c = 0; c < C; c++) d.fc2_bias[c] += d_branch[c];
    rows(d_branch, row);
    weight_gradient<F>(s.active, row, d.fc2);
    linear<F, C, true, false>(w.fc2, nullptr, d_branch, d_hidden);
    for (int f = 0; f < F; f++) {  // GELU's slope: below(h) + h * the normal density
        Vector h = s.hidden[f];
        d_hidden[f] *= s.share[f] + h * exponential(-0.5f * h * h) * 0.39894228f;
    }
    rows(s.x2, row);
    weight_gradient<F>(d_hidden, row, d.fc1);
    linear<C, F, true, false>(w.fc1, nullptr, d_hidden, d_x);
    normalize_backward(d_x, s.normalized2, s.rstd2, w.norm2, d.norm2, d.norm2_bias, grad);

    // the attention half
    Vector d_attended[C], d_q[C], d_k[C], d_v[C];
    for (int c = 0; c < C; c++) d_branch[c] = grad[c] * attn_scale;
    rows(s.attended, row);
    weight_gradient<C>(d_branch, row, d.proj);
    linear<C, C, true, false>(w.proj, nullptr, d_branch, d_attended);
    const float scale = 1.0f / std::sqrt((float)D);
    for (int h = 0; h < H; h++) {
        const Vector *q = s.q + h * D, *p = s.p[h], *d_out = d_attended + h * D;
        const float(*keys)[M] = (const float(*)[M])(s.k + h * D), (*values)[M] = (const float(*)[M])(s.v + h * D);
        Vector d_scores[M], along{};
        for (int j = 0; j < M; j++) {
            Vector d_p{};
            for (int c = 0; c < D; c++) d_p += d_out[c] * values[c][j];
            d_scores[j] = d_p;
            along += d_p * p[j];
        }
        for (int j = 0; j < M; j++) d_scores[j] = p[j] * (d_scores[j] - along) * scale;
        Vector of_query[D] = {}, of_key[D] = {}, of_value[D] = {};
        for (int j = 0; j < M; j++)
#pragma GCC unroll 16
            for (int c = 0; c < D; c++) of_query[c] += d_scores[j] * keys[c][j];
        // of keys and values: lanes are the words that are attended to
        Vector by_query[M];
        std::memcpy(by_query, p, sizeof by_query);
        transpose(by_query);
        transpose(d_scores);
        const float(*queries)[M] = (const float(*)[M])q, (*d_outs)[M] = (const float(*)[M])d_out;
        for (int i = 0; i < M; i++)
#pragma GCC unroll 16
            for (int c = 0; c < D; c++) {
                of_key[c] += d_scores[i] * queries[c][i];
                of_value[c] += by_query[i] * d_outs[c][i];
            }
        std::memcpy(d_q + h * D, of_query, sizeof of_query);
        std::memcpy(d_k + h * D, of_key, sizeof of_key);
        std::memcpy(d_v + h * D, of_value, sizeof of_value);
    }
    rows(s.x1, row);
    weight_gradient<C>(d_q, row, d.q);
    weight_gradient<C>(d_k, row, d.k);
    weight_gradient<C>(d_v, row, d.v);
    linear<C, C, true, false>(w.qk, nullptr, d_q, d_x);
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
        Vector x[C];
        load(words + i * M * C, x);
        forward(*layer, eps, attn_scale ? attn_scale[i] : 1.0f, mlp_scale ? mlp_scale[i] : 1.0f, x, s);
        store(x, out + i * M * C);
    }
}

int64_t gradients_size() { return sizeof(Gradients) / sizeof(float); }

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
            Vector x[C], grad[C];
            load(words + i * M * C, x);
            forward(*layer, eps, scale1, scale2, x, s);
            load(grad_out + i * M * C, grad);
            backward(*layer, scale1, scale2, s, grad, gradients[part]);
            store(grad, grad_words + i * M * C);
        }
}
}

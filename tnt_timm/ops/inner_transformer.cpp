// The inner transformer on CPU: load a sentence, run the whole layer in registers and the first-level cache, store the result.
//
// ops/native_backend.py compiles this file for one set of sizes: C, the word width; H, the number of heads; F, the MLP width.
// With SENTENCE_NORM, LayerNorm is over all words of a sentence. The specification is ops/reference.py. Backward recomputes a
// sentence from its words.

#include "columns.h"

constexpr int D = C / H;

struct Layer {  // parameters in the reference's order; the biases of qk and v may be null
    const float *norm1, *norm1_bias, *qk, *qk_bias, *v, *v_bias, *proj, *proj_bias;
    const float *norm2, *norm2_bias, *fc1, *fc1_bias, *fc2, *fc2_bias;
};

// Sums of the parameters' gradients. Each element of a vector has a column, whose 16 numbers the caller adds up, except those of
// LayerNorms over all words, which have a parameter per number. Matrices have rows of CP numbers. fc2 is transposed.
struct Gradients {
    Column norm1[C], norm1_bias[C], norm2[C], norm2_bias[C];
    Column q_bias[C], k_bias[C], v_bias[C], proj_bias[C], fc1_bias[F], fc2_bias[C];
    float q[C][CP], k[C][CP], v[C][CP], proj[C][CP], fc1[F][CP], fc2[F][CP];
};

// ------------------------------------------------------------ LayerNorm

#if defined(SENTENCE_NORM)
struct Norm { Column weight[C], bias[C]; };  // in memory (16, C)

static Norm read_norm(const float *weight, const float *bias) {
    Norm norm;
    load(weight, norm.weight);
    load(bias, norm.bias);
    return norm;
}

// The mean over all words of the sentence, given the sum over the numbers of each word
static INLINE Column mean_of(const Column &sum) {
    float total = 0;
    for (int p = 0; p < V; p++)
        for (int i = 0; i < LANES; i++) total += sum.part[p][i];
    return Column{} + total * (1.0f / (M * C));
}
#else
struct Norm { const float *weight, *bias; };

static Norm read_norm(const float *weight, const float *bias) { return {weight, bias}; }

// The mean over each word, given the sum over its numbers
static INLINE Column mean_of(const Column &sum) { return sum * (1.0f / C); }
#endif

struct Norms { Norm norm1, norm2; };

static Norms read_norms(const Layer &w) {
    return {read_norm(w.norm1, w.norm1_bias), read_norm(w.norm2, w.norm2_bias)};
}

// y = weight * normalized + bias. Return 1 / standard deviation
static INLINE Column layer_norm(const Column *x, const Norm &norm, float eps, Column *normalized, Column *y) {
    Column sum{}, squares{};
    for (int c = 0; c < C; c++) sum += x[c];
    const Column mean = mean_of(sum);
    for (int c = 0; c < C; c++) {
        normalized[c] = x[c] - mean;
        squares += normalized[c] * normalized[c];
    }
    Column rstd = inverse_root(mean_of(squares) + eps);
    for (int c = 0; c < C; c++) {
        normalized[c] *= rstd;
        y[c] = normalized[c] * norm.weight[c] + norm.bias[c];
    }
    return rstd;
}

// Add the gradient of a LayerNorm's input to `grad`
static INLINE void layer_norm_backward(
    const Column *d_y, const Column *normalized, const Column &rstd, const Norm &norm, Column *d_weight, Column *d_bias,
    Column *grad
) {
    Column mean{}, along{};
    for (int c = 0; c < C; c++) {
        d_weight[c] += d_y[c] * normalized[c];
        d_bias[c] += d_y[c];
        mean += d_y[c] * norm.weight[c];
        along += d_y[c] * norm.weight[c] * normalized[c];
    }
    mean = mean_of(mean);
    along = mean_of(along);
    for (int c = 0; c < C; c++) grad[c] += (d_y[c] * norm.weight[c] - mean - normalized[c] * along) * rstd;
}

// ------------------------------------------------------------ one sentence

struct Sentence {  // intermediate results that backward needs
    Column normalized1[C], x1[C], q[C], k[C], v[C], p[H][M], attended[C];
    Column normalized2[C], x2[C], hidden[F], cdf[F], active[F], rstd1, rstd2;
};

// p[j] = probability of each of the 16 words to attend to word j
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

// Replace the words in x by the layer's output, and store the intermediate results in s
static INLINE void forward(
    const Layer &w, const Norms &norms, float eps, float attn_scale, float mlp_scale, Column *x, Sentence &s
) {
    Column branch[C];
    s.rstd1 = layer_norm(x, norms.norm1, eps, s.normalized1, s.x1);
    linear<C, C>(w.qk, w.qk_bias, s.x1, s.q);
    linear<C, C>(w.qk + C * C, w.qk_bias ? w.qk_bias + C : nullptr, s.x1, s.k);
    linear<C, C>(w.v, w.v_bias, s.x1, s.v);
    for (int h = 0; h < H; h++) {
        attend(s.q + h * D, s.k + h * D, s.p[h]);
        linear<D, M>((const float *)(s.v + h * D), nullptr, s.p[h], s.attended + h * D);
    }
    linear<C, C>(w.proj, w.proj_bias, s.attended, branch);
    for (int c = 0; c < C; c++) x[c] += branch[c] * attn_scale;

    s.rstd2 = layer_norm(x, norms.norm2, eps, s.normalized2, s.x2);
    linear<F, C>(w.fc1, w.fc1_bias, s.x2, s.hidden);
    for (int f = 0; f < F; f++) {
        s.cdf[f] = normal_cdf(s.hidden[f]);
        s.active[f] = s.hidden[f] * s.cdf[f];
    }
    linear<C, F>(w.fc2, w.fc2_bias, s.active, branch);
    for (int c = 0; c < C; c++) x[c] += branch[c] * mlp_scale;
}

// Replace the gradient of the output in `grad` by that of the words, and add the parameters' gradients to `d`
static INLINE void backward(
    const Layer &w, const Norms &norms, float attn_scale, float mlp_scale, const Sentence &s, Column *grad, Gradients &d
) {
    Column d_branch[C], d_hidden[F], d_x[C];
    alignas(64) float rows[M][CP];
    // MLP half
    for (int c = 0; c < C; c++) d_branch[c] = grad[c] * mlp_scale;
    for (int c = 0; c < C; c++) d.fc2_bias[c] += d_branch[c];
    store<CP>(d_branch, rows[0]);
    linear_gradient<F>(s.active, rows, d.fc2, nullptr);
    linear<F, C, true>(w.fc2, nullptr, d_branch, d_hidden);
    for (int f = 0; f < F; f++) {  // derivative of GELU: normal_cdf(h) + h * normal density of h
        Column h = s.hidden[f];
        d_hidden[f] *= s.cdf[f] + h * exponential(h * h * -0.5f) * 0.39894228f;
    }
    store<CP>(s.x2, rows[0]);
    linear_gradient<F>(d_hidden, rows, d.fc1, d.fc1_bias);
    linear<C, F, true>(w.fc1, nullptr, d_hidden, d_x);
    layer_norm_backward(d_x, s.normalized2, s.rstd2, norms.norm2, d.norm2, d.norm2_bias, grad);

    // attention half
    Column d_attended[C], d_q[C], d_k[C], d_v[C];
    for (int c = 0; c < C; c++) d_branch[c] = grad[c] * attn_scale;
    store<CP>(s.attended, rows[0]);
    linear_gradient<C>(d_branch, rows, d.proj, d.proj_bias);
    linear<C, C, true>(w.proj, nullptr, d_branch, d_attended);
    for (int h = 0; h < H; h++) {
        const int first = h * D;
        const Column *p = s.p[h];
        Column d_scores[M], along{}, by_query[M];
        linear<M, D, true>((const float *)(s.v + first), nullptr, d_attended + first, d_scores);
        for (int j = 0; j < M; j++) along += d_scores[j] * p[j];
        for (int j = 0; j < M; j++) d_scores[j] = p[j] * (d_scores[j] - along) * (1.0f / std::sqrt((float)D));
        linear<D, M>((const float *)(s.k + first), nullptr, d_scores, d_q + first);
        // for keys and values, lanes are the attended words
        transpose_words(d_scores, by_query);
        linear<D, M>((const float *)(s.q + first), nullptr, by_query, d_k + first);
        transpose_words(p, by_query);
        linear<D, M>((const float *)(d_attended + first), nullptr, by_query, d_v + first);
    }
    store<CP>(s.x1, rows[0]);
    linear_gradient<C>(d_q, rows, d.q, d.q_bias);
    linear_gradient<C>(d_k, rows, d.k, d.k_bias);
    linear_gradient<C>(d_v, rows, d.v, d.v_bias);
    linear<C, C, true>(w.qk, nullptr, d_q, d_x);
    linear<C, C, true, true>(w.qk + C * C, nullptr, d_k, d_x);
    linear<C, C, true, true>(w.v, nullptr, d_v, d_x);
    layer_norm_backward(d_x, s.normalized1, s.rstd1, norms.norm1, d.norm1, d.norm1_bias, grad);
}

// ------------------------------------------------------------ interface of native_backend.py

extern "C" {

int gradients_size() { return sizeof(Gradients) / sizeof(float); }

int lanes() { return LANES; }

void inner_forward(
    const float *words, float *out, const Layer *layer, const float *attn_scale, const float *mlp_scale, int64_t sentences,
    float eps, int threads
) {
    const Norms norms = read_norms(*layer);
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < sentences; i++) {
        Sentence s;
        Column x[C];
        load(words + i * M * C, x);
        forward(*layer, norms, eps, attn_scale ? attn_scale[i] : 1.0f, mlp_scale ? mlp_scale[i] : 1.0f, x, s);
        store<C>(x, out + i * M * C);
    }
}

// Split the sentences into `parts`, and add each part's gradients of the parameters to its row of `gradients`, which has the shape
// (parts, gradients_size()). The caller adds up the rows, so that the result does not depend on the number of threads
void inner_backward(
    const float *grad_out, const float *words, float *grad_words, Gradients *gradients, const Layer *layer,
    const float *attn_scale, const float *mlp_scale, int64_t sentences, int64_t parts, float eps, int threads
) {
    const Norms norms = read_norms(*layer);
#pragma omp parallel for num_threads(threads)
    for (int64_t part = 0; part < parts; part++)
        for (int64_t i = part * sentences / parts; i < (part + 1) * sentences / parts; i++) {
            float scale1 = attn_scale ? attn_scale[i] : 1.0f, scale2 = mlp_scale ? mlp_scale[i] : 1.0f;
            Sentence s;
            Column x[C], grad[C];
            load(words + i * M * C, x);
            forward(*layer, norms, eps, scale1, scale2, x, s);
            load(grad_out + i * M * C, grad);
            backward(*layer, norms, scale1, scale2, s, grad, gradients[part]);
            store<C>(grad, grad_words + i * M * C);
        }
}
}

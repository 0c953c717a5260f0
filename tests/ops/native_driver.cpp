// Run the native backend without Python, so that an emulator can execute it for another CPU.
//
// stdin: number of sentences (int64), presence of the fourteen parameters and two scales (16 bytes of 0 or 1), then float32 values:
// words, gradient of the output, the parameters and scales that are present. stdout: float32 values of the output, of the
// gradient of the words, and of the sums of the parameters' gradients.

#include <cstdio>
#include <vector>

#include "../../tnt_timm/ops/inner_transformer.cpp"

static std::vector<float> values(size_t count) {
    std::vector<float> found(count);
    if (std::fread(found.data(), sizeof(float), count, stdin) != count) throw "short input";
    return found;
}

int main() {
    int64_t sentences;
    unsigned char present[16];
    if (std::fread(&sentences, 8, 1, stdin) != 1 || std::fread(present, 1, 16, stdin) != 16) return 1;
    const size_t size = sentences * M * C;
#if defined(SENTENCE_NORM)
    const size_t N = M * C;
#else
    const size_t N = C;
#endif
    const size_t sizes[16] = {N, N, 2 * C * C, 2 * C, C * C, C, C * C, C, N, N, F * C, F, C * F, C, (size_t)sentences, (size_t)sentences};
    std::vector<float> words = values(size), grad = values(size), arrays[16];
    const float *pointers[16];
    for (int i = 0; i < 16; i++) {
        arrays[i] = values(present[i] ? sizes[i] : 0);
        pointers[i] = present[i] ? arrays[i].data() : nullptr;
    }
    Layer layer;
    static_assert(sizeof layer == 14 * sizeof(float *));
    std::memcpy(&layer, pointers, sizeof layer);

    std::vector<float> out(size), grad_words(size);
    static Gradients sums;
    inner_forward(words.data(), out.data(), &layer, pointers[14], pointers[15], sentences, 1e-5f, 1);
    inner_backward(
        grad.data(), words.data(), grad_words.data(), &sums, &layer, pointers[14], pointers[15], sentences, 1, 1e-5f, 1
    );
    std::fwrite(out.data(), sizeof(float), size, stdout);
    std::fwrite(grad_words.data(), sizeof(float), size, stdout);
    std::fwrite(&sums, sizeof sums, 1, stdout);
}

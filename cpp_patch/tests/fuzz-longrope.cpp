// Feeds the loader files whose longrope metadata was damaged by a seeded generator: each must be loaded,
// and then decode some tokens, or be refused. Anything else ends the process.
//
//   fuzz-longrope [SECONDS [SEED]]
//
// 5 seconds and seed 1 if not given; the cases have the seeds SEED, SEED + 1, ... and a crash names its
// own: fuzz-longrope 0 SEED repeats that one case.

#include "longrope-tiny.h"

#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>

static std::vector<uint8_t> file_of(gguf_context * ctx) {
    std::vector<uint8_t> data(gguf_get_meta_size(ctx));
    gguf_get_meta_data(ctx, data.data());
    return data;
}

// the bytes of the file from the first longrope key to the end of the last
static std::pair<size_t, size_t> longrope_region(const std::vector<uint8_t> & file) {
    const std::string text(file.begin(), file.end());
    const std::string key   = "llama.rope.scaling.longrope.";
    const size_t      first = text.find(key);
    return { first - sizeof(uint64_t), file.size() };  // the length of the first key stands before it
}

class fuzzer {
  public:
    explicit fuzzer(uint64_t seed) : rng(seed) {}

    std::vector<uint8_t> make_file() {
        tiny::config c = tiny::ladder();
        c.layers       = { 0, 1 };
        c.log_base     = 8;
        c.log_exempt   = { 0 };
        const auto ctx = tiny::metadata(&c);
        for (int i = pick(3); i > 0; --i) {
            change_key(ctx.get());
        }
        auto file               = file_of(ctx.get());
        const auto [begin, end] = longrope_region(file);
        for (int i = pick(3); i > 0 && begin < end; --i) {
            change_bytes(file, begin, end);
        }
        if (pick(16) == 0) {
            file.resize(begin + rng() % (end - begin));
        }
        return file;
    }

    int pick(int n) { return rng() % n; }

  private:
    // another value, count or type of one key
    void change_key(gguf_context * ctx) {
        static const char * names[] = {
            "version",      "switch", "tier_length",   "tier_start_tokens",     "tier_attn_factor",
            "tier_factors", "layers", "attn_log_base", "attn_log_exempt_layers"
        };
        const std::string key = std::string("llama.rope.scaling.longrope.") + names[pick(9)];

        static const size_t   counts[] = { 0, 1, 2, 3, 4, 32, 64, 95, 96, 97, 128, 65535, 65536, 1000000 };
        std::vector<uint32_t> values(counts[pick(pick(4) == 0 ? 14 : 10)]);
        const bool            rise = pick(2);
        for (size_t i = 0; i < values.size(); ++i) {
            values[i] = rise ? i + 1 : number();
        }
        switch (pick(6)) {
            case 0:
                gguf_remove_key(ctx, key.c_str());
                break;
            case 1:
                gguf_set_val_u32(ctx, key.c_str(), number());
                break;
            case 2:
                gguf_set_val_str(ctx, key.c_str(), pick(2) ? "sequence" : "");
                break;
            case 3:
                {
                    std::vector<float> floats(values.size());
                    for (float & x : floats) {
                        const uint32_t bits = pick(2) ? number() : 0x3F800000u + pick(1 << 24);
                        memcpy(&x, &bits, sizeof(x));
                    }
                    gguf_set_arr_data(ctx, key.c_str(), GGUF_TYPE_FLOAT32, floats.data(), floats.size());
                    break;
                }
            default:
                gguf_set_arr_data(ctx, key.c_str(), GGUF_TYPE_UINT32, values.data(), values.size());
        }
    }

    void change_bytes(std::vector<uint8_t> & file, size_t begin, size_t end) {
        const size_t at = begin + rng() % (end - begin);
        switch (pick(3)) {
            case 0:
                file[at] ^= 1u << pick(8);
                break;
            case 1:
                file[at] = rng();
                break;
            default:
                {
                    const uint32_t value = number();
                    memcpy(&file[at], &value, std::min(sizeof(value), end - at));
                }
        }
    }

    // borders of types, bit patterns of special floats, or anything
    uint32_t number() {
        static const uint32_t special[] = { 0,          1,          2,          0x7FFFFFFF, 0x80000000, 0xFFFFFFFF,
                                            0x7F800000, 0xFF800000, 0x7FC00000, 0x00000001, 0x3F800000, 0x7F7FFFFF,
                                            0x00800000, 0xBF800000, 65535,      65536 };
        return pick(4) ? special[pick(16)] : (uint32_t) rng();
    }

    std::mt19937_64 rng;
};

// weights do not matter here
static void fill_tensor(ggml_tensor * tensor, void *) {
    const std::vector<float> data(ggml_nelements(tensor), 0.01f);
    ggml_backend_tensor_set(tensor, data.data(), 0, ggml_nbytes(tensor));
}

// true if the file was loaded
static bool run(const std::vector<uint8_t> & file) {
    const gguf_context_ptr ctx(gguf_init_from_buffer(file.data(), file.size(), { true, nullptr }));
    if (!ctx) {
        return false;
    }
    const llama_model_ptr model(
        llama_model_init_from_user(ctx.get(), fill_tensor, nullptr, llama_model_default_params()));
    if (!model) {
        return false;
    }
    llama_context_params params = llama_context_default_params();
    params.n_ctx                = 256;
    params.n_threads = params.n_threads_batch = 1;
    const llama_context_ptr lctx(llama_init_from_model(model.get(), params));
    if (!lctx) {
        return false;
    }
    for (int i = 0; i < 3; ++i) {
        std::vector<llama_token> tokens(7, i);
        if (llama_decode(lctx.get(), llama_batch_get_one(tokens.data(), tokens.size())) != 0) {
            fprintf(stderr, "fuzz-longrope: a loaded file does not decode\n");
            abort();
        }
    }
    return true;
}

static char label[80];

static void name_case(int) {
    if (write(STDERR_FILENO, label, strlen(label)) < 0) {
        _exit(2);
    }
    _exit(1);
}

int main(int argc, char ** argv) {
    const double   seconds = argc > 1 ? atof(argv[1]) : 5.0;
    const uint64_t seed    = argc > 2 ? strtoull(argv[2], nullptr, 10) : 1;

    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    llama_backend_init();
    for (const int number : { SIGABRT, SIGSEGV, SIGFPE, SIGBUS }) {
        signal(number, name_case);
    }

    const int64_t t0       = ggml_time_ms();
    int           n_loaded = 0, n_refused = 0;
    do {
        const uint64_t case_seed = seed + n_loaded + n_refused;
        snprintf(label, sizeof(label), "fuzz-longrope: crash in the case of seed %llu\n",
                 (unsigned long long) case_seed);
        (run(fuzzer(case_seed).make_file()) ? n_loaded : n_refused)++;
    } while (ggml_time_ms() - t0 < seconds * 1000);

    llama_backend_free();
    printf("seeds %llu to %llu: %d files loaded, %d refused\n", (unsigned long long) seed,
           (unsigned long long) (seed + n_loaded + n_refused - 1), n_loaded, n_refused);
    // a fuzzer that only ever sees one of the two tests nothing
    return seconds > 0 && (n_loaded == 0 || n_refused == 0);
}

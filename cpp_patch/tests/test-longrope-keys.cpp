// Every malformed longrope key fails when the model is loaded, with a message that names the key.

#include "longrope-tiny.h"

#include <cstdio>
#include <functional>
#include <limits>

static std::string log_text;
static int         n_run = 0, n_failed = 0;

using change = std::function<void(gguf_context * ctx)>;

static std::string key(const std::string & name, const std::string & arch = "llama") {
    return arch + ".rope.scaling.longrope." + name;
}

template <typename T> static change array(const std::string & name, gguf_type type, const std::vector<T> & data) {
    return [=](gguf_context * ctx) {
        gguf_set_arr_data(ctx, key(name).c_str(), type, data.data(), data.size());
    };
}

static change u32(const std::string & name, uint32_t value) {
    return [=](gguf_context * ctx) {
        gguf_set_val_u32(ctx, key(name).c_str(), value);
    };
}

static change str(const std::string & name, const char * value) {
    return [=](gguf_context * ctx) {
        gguf_set_val_str(ctx, key(name).c_str(), value);
    };
}

static change remove(const std::string & name) {
    return [=](gguf_context * ctx) {
        gguf_remove_key(ctx, key(name).c_str());
    };
}

static void report(const std::string & what, bool ok, const std::string & reason) {
    n_run++;
    if (!ok) {
        n_failed++;
        printf("FAILED: %s: %s\n%s", what.c_str(), reason.c_str(), log_text.c_str());
    }
}

// expected: text of the message; empty: the model is loaded
static void test(const std::string & what,
                 const change &      apply,
                 const std::string & expected,
                 const std::string & arch = "llama") {
    const tiny::config c   = tiny::ladder();
    const auto         ctx = tiny::metadata(&c, arch);
    apply(ctx.get());
    log_text.clear();
    const auto model = tiny::load_metadata(ctx.get());
    if (expected.empty()) {
        report(what, model != nullptr, "must be loaded");
    } else {
        report(what, model == nullptr && log_text.find(expected) != std::string::npos,
               std::string(model ? "was loaded" : "the message does not have the words") + ", expected: " + expected);
    }
}

static void test_keys() {
    const float nan = std::numeric_limits<float>::quiet_NaN(), inf = std::numeric_limits<float>::infinity();
    const auto  U = GGUF_TYPE_UINT32;
    const auto  F = GGUF_TYPE_FLOAT32;

    const std::vector<std::string> required = { "version",           "switch",           "tier_length",
                                                "tier_start_tokens", "tier_attn_factor", "tier_factors" };

    test("as it is", [](gguf_context *) {}, "");
    for (const auto & name : required) {
        test("missing " + name, remove(name), key(name) + " is missing");
        // of a wrong type
        test("string " + name, name == "switch" ? u32(name, 1) : str(name, "1"), key(name) + " must be");
        test("doubles " + name, array<double>(name, GGUF_TYPE_FLOAT64, { 1.0, 2.0, 3.0 }), key(name) + " must be");
        test(
            "strings " + name,
            [&](gguf_context * ctx) {
                const char * values[] = { "1", "2", "3" };
                gguf_set_arr_str(ctx, key(name).c_str(), values, 3);
            },
            key(name) + " must be");
    }
    test("float lengths", array<float>("tier_length", F, { 12, 24, 48 }), key("tier_length") + " must be");
    test("signed lengths", array<int32_t>("tier_length", GGUF_TYPE_INT32, { 12, 24, 48 }), key("tier_length"));
    test("integer factors", array<uint32_t>("tier_factors", U, std::vector<uint32_t>(96, 1)), key("tier_factors"));

    for (const uint32_t version : { 0u, 2u, 0xFFFFFFFFu }) {
        test("version " + std::to_string(version), u32("version", version), key("version") + " is");
    }
    for (const char * rule : { "", "Causal", "dynamic", "causal " }) {
        test(std::string("switch ") + rule, str("switch", rule), key("switch") + " must be causal or sequence");
    }
    test("long switch", str("switch", std::string(100000, 'x').c_str()), key("switch"));
    test("switch sequence", str("switch", "sequence"), "");

    // counts
    test("no tiers", array<uint32_t>("tier_length", U, {}), key("tier_length") + " has 0 values");
    test("two lengths", array<uint32_t>("tier_length", U, { 12, 24 }), "has 3 values, expected 2");
    test("four lengths", array<uint32_t>("tier_length", U, { 1, 2, 3, 4 }), "has 3 values, expected 4");
    test("two start windows", array<uint32_t>("tier_start_tokens", U, { 0, 0 }), key("tier_start_tokens") + " has 2");
    test("four attention factors", array<float>("tier_attn_factor", F, { 1, 1, 1, 1 }),
         key("tier_attn_factor") + " has 4");
    test("no factors", array<float>("tier_factors", F, {}), key("tier_factors") + " has 0 values, expected 96");
    test("95 factors", array<float>("tier_factors", F, std::vector<float>(95, 1)), key("tier_factors") + " has 95");
    test("32 factors", array<float>("tier_factors", F, std::vector<float>(32, 1)), key("tier_factors") + " has 32");
    test("huge count", array<uint32_t>("tier_length", U, std::vector<uint32_t>(10000000, 7)),
         key("tier_length") + " has 10000000 values");

    // values
    for (const auto & lengths : std::vector<std::vector<uint32_t>>{
             { 0,  24, 48          },
             { 12, 12, 48          },
             { 24, 12, 48          },
             { 12, 24, 0x80000000u },
             { 12, 24, 0xFFFFFFFFu }
    }) {
        test("lengths", array<uint32_t>("tier_length", U, lengths), key("tier_length") + " must rise");
    }
    test("start window", array<uint32_t>("tier_start_tokens", U, { 0, 0x80000000u, 0 }), key("tier_start_tokens"));
    test("long start window", array<uint32_t>("tier_start_tokens", U, { 0x7FFFFFFFu, 0, 0 }), "");
    for (const float bad : { nan, inf, -inf, 0.0f, -0.0f, -1.0f, 1e-40f, 1e-7f, 1e10f }) {
        std::vector<float> factors(96, 1.0f);
        factors[95] = bad;
        test("factor " + std::to_string(bad), array<float>("tier_factors", F, factors),
             key("tier_factors") + " must be from 1e-6 to 1e9, pair 31 of tier 2");
        test("attention factor " + std::to_string(bad), array<float>("tier_attn_factor", F, { 1, bad, 1 }),
             key("tier_attn_factor") + " must be from 0.01 to 100, value 1");
    }

    // optional keys
    test("log scaling", u32("attn_log_base", 2), "");
    for (const uint32_t base : { 0u, 1u }) {
        test("log base", u32("attn_log_base", base), key("attn_log_base") + " must be at least 2");
    }
    test("string base", str("attn_log_base", "8"), key("attn_log_base") + " must be");
    for (const char * name : { "layers", "attn_log_exempt_layers" }) {
        test(name, array<uint32_t>(name, U, { 0, 1 }), "");
        test(name, array<uint32_t>(name, U, { 0, 2 }), key(name) + " names layer 2");
        test(name, array<uint32_t>(name, U, { 0xFFFFFFFFu }), key(name) + " names layer 4294967295");
        test(name, array<int32_t>(name, GGUF_TYPE_INT32, { -1 }), key(name) + " must be");
        test(name, u32(name, 1), key(name) + " must be");
    }

    // beside other scaling
    test(
        "linear scaling", [](gguf_context * ctx) { gguf_set_val_f32(ctx, "llama.rope.scaling.factor", 4.0f); },
        key("*"));
    test(
        "unknown key alone",
        [&](gguf_context * ctx) {
            for (const auto & name : required) {
                gguf_remove_key(ctx, key(name).c_str());
            }
            gguf_set_val_u32(ctx, key("anything").c_str(), 1);
        },
        key("version") + " is missing");

    // geometry that no factors fit
    for (const uint32_t n_rot : { 0u, 1u, 63u, 66u, 0xFFFFFFFEu }) {
        for (const char * arch : { "qwen2", "phi3", "granite" }) {
            const std::string name = std::string(arch) + ".rope.dimension_count";
            test(name, [&](gguf_context * ctx) { gguf_set_val_u32(ctx, name.c_str(), n_rot); }, name, arch);
        }
    }
    test(
        "another dimension_count in local layers",
        [](gguf_context * ctx) {
            gguf_set_val_u32(ctx, "gemma3.block_count", 6);  // the last one is not local
            gguf_set_val_u32(ctx, "gemma3.rope.dimension_count_swa", 32);
        },
        "gemma3.rope.dimension_count", "gemma3");
    test(
        "layers without RoPE",
        [](gguf_context * ctx) { gguf_set_val_bool(ctx, "granite.rope.scaling.finetuned", false); },
        "granite.rope.scaling.finetuned", "granite");
    for (const uint32_t n : { 1, 2 }) {
        test(
            "layers that predict further tokens",
            [&](gguf_context * ctx) { gguf_set_val_u32(ctx, "llama.nextn_predict_layers", n); },
            "llama.nextn_predict_layers");
    }

    // architectures
    const tiny::config c = tiny::ladder();
    for (const char * arch : { "llama", "qwen2", "qwen3", "phi3", "gemma", "gemma2", "gemma3", "granite", "minicpm" }) {
        log_text.clear();
        report(arch, tiny::load(&c, nullptr, arch) != nullptr, "must be loaded");
    }
    for (const char * arch : { "falcon", "stablelm", "starcoder2", "olmo2", "smollm3" }) {
        test(arch, [](gguf_context *) {}, key("*", arch) + " cannot be honoured for architecture", arch);
    }
}

// options of a context that the factors replace
static void test_context_options() {
    const tiny::config c     = tiny::ladder();
    const auto         model = tiny::load(&c);

    const auto make = [&](void (*set)(llama_context_params & params)) {
        llama_context_params params = llama_context_default_params();
        params.n_ctx                = 256;
        set(params);
        log_text.clear();
        return llama_context_ptr(llama_init_from_model(model.get(), params));
    };
    const auto refused = [&](const char * what, void (*set)(llama_context_params & params)) {
        report(what, !make(set) && log_text.find("longrope") != std::string::npos, "must be refused, naming longrope");
    };
    const auto python = make([](llama_context_params & params) {
        params.yarn_attn_factor = 1.0f;
        params.yarn_beta_fast   = 32.0f;
        params.yarn_beta_slow   = 1.0f;
    });
    report("defaults of llama-cpp-python", python != nullptr, "must be taken");

    // a cache whose type loses much when it is rounded often
    for (const uint32_t n_tiers : { 10, 11 }) {
        for (const ggml_type type : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0 }) {
            tiny::config many = c;
            many.tiers.clear();
            for (uint32_t t = 0; t < n_tiers; ++t) {
                many.tiers.push_back({ 10 * (t + 1), 0, 1.0f, tiny::rising(1.0f + t) });
            }
            const auto           ladder = tiny::load(&many);
            llama_context_params params = llama_context_default_params();
            params.n_ctx                = 256;
            params.type_k               = type;
            log_text.clear();
            const llama_context_ptr ctx(llama_init_from_model(ladder.get(), params));
            const bool              warned = log_text.find("rounded") != std::string::npos;
            const bool              lossy  = type == GGML_TYPE_BF16 || type == GGML_TYPE_Q8_0;
            report(ggml_type_name(type), ctx && warned == (lossy && n_tiers > 10), "a warning about rounding");
        }
    }
    refused("rope_freq_base", [](llama_context_params & params) { params.rope_freq_base = 20000.0f; });
    refused("rope_freq_scale", [](llama_context_params & params) { params.rope_freq_scale = 0.5f; });
    refused("yarn", [](llama_context_params & params) { params.rope_scaling_type = LLAMA_ROPE_SCALING_TYPE_YARN; });
    refused("yarn_ext_factor", [](llama_context_params & params) { params.yarn_ext_factor = 1.0f; });
    refused("yarn_attn_factor", [](llama_context_params & params) { params.yarn_attn_factor = 1.2f; });
}

int main() {
    llama_log_set(
        [](ggml_log_level level, const char * text, void *) {
            if (level >= GGML_LOG_LEVEL_WARN) {
                log_text += text;
            }
        },
        nullptr);
    llama_backend_init();
    test_keys();
    test_context_options();
    llama_backend_free();
    printf("%d passed, %d failed\n", n_run - n_failed, n_failed);
    return n_failed > 0;
}

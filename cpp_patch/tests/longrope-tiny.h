#pragma once

// A tiny random model with longrope keys, and the definition of LongRoPE written out for it in double
// precision: no cache of rotated keys, no batches, no code of the library.

#include "ggml-cpp.h"
#include "ggml.h"
#include "gguf.h"
#include "llama-cpp.h"
#include "llama.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

namespace tiny {

constexpr uint32_t N_LAYER = 2, N_EMBD = 128, N_HEAD = 2, N_HEAD_KV = 1, N_HEAD_DIM = 64, N_FF = 64, N_VOCAB = 96;
constexpr float    THETA = 1000.0f, RMS_EPS = 1e-5f;

struct tier {
    uint32_t           length;
    uint32_t           n_start;
    float              attn_factor;
    std::vector<float> factors;  // [N_HEAD_DIM/2]
};

struct config {
    std::string           rule = "causal";
    std::vector<tier>     tiers;
    std::vector<uint32_t> layers;  // rescaled ones; empty: all
    uint32_t              log_base = 0;
    std::vector<uint32_t> log_exempt;
    bool                  stock_fields = false;  // also what the exporter writes for a llama.cpp without longrope
};

// factors that rise from 1 to last
inline std::vector<float> rising(float last) {
    const size_t       n = N_HEAD_DIM / 2;
    std::vector<float> result(n);
    for (size_t i = 0; i < n; ++i) {
        result[i] = 1.0f + (last - 1.0f) * i / (n - 1);
    }
    return result;
}

// borders at 12, 24 and 48; the first tier is the original model
inline config ladder() {
    config c;
    c.tiers = {
        { 12, 0, 1.0f, std::vector<float>(N_HEAD_DIM / 2, 1.0f) },
        { 24, 6, 1.07f, rising(3.0f) },
        { 48, 4, 1.2f, rising(8.0f) },
    };
    return c;
}

// metadata of a model; c = null leaves the longrope keys out
inline gguf_context_ptr metadata(const config * c, const std::string & arch = "llama") {
    gguf_context_ptr ctx(gguf_init_empty());
    const auto       key = [&](const std::string & name) {
        return arch + "." + name;
    };
    const auto u32 = [&](const std::string & name, uint32_t value) {
        gguf_set_val_u32(ctx.get(), key(name).c_str(), value);
    };
    gguf_set_val_str(ctx.get(), "general.architecture", arch.c_str());
    gguf_set_val_str(ctx.get(), "tokenizer.ggml.model", "no_vocab");
    u32("vocab_size", N_VOCAB);
    u32("context_length", 128);
    u32("embedding_length", N_EMBD);
    u32("block_count", N_LAYER);
    u32("feed_forward_length", N_FF);
    u32("attention.head_count", N_HEAD);
    u32("attention.head_count_kv", N_HEAD_KV);
    u32("attention.key_length", N_HEAD_DIM);
    u32("attention.value_length", N_HEAD_DIM);
    u32("attention.sliding_window", 16);  // of gemma2 and gemma3
    u32("rope.dimension_count", N_HEAD_DIM);
    gguf_set_val_f32(ctx.get(), key("rope.freq_base").c_str(), THETA);
    gguf_set_val_f32(ctx.get(), key("attention.layer_norm_epsilon").c_str(), RMS_EPS);  // of falcon
    gguf_set_val_f32(ctx.get(), key("logit_scale").c_str(), 1.0f);                      // of granite
    gguf_set_val_f32(ctx.get(), key("attention.layer_norm_rms_epsilon").c_str(), RMS_EPS);
    if (!c) {
        return ctx;
    }

    std::vector<uint32_t> lengths, starts;
    std::vector<float>    attn_factors, factors;
    for (const auto & t : c->tiers) {
        lengths.push_back(t.length);
        starts.push_back(t.n_start);
        attn_factors.push_back(t.attn_factor);
        factors.insert(factors.end(), t.factors.begin(), t.factors.end());
    }
    const auto array = [&](const std::string & name, gguf_type type, const auto & data) {
        gguf_set_arr_data(ctx.get(), key("rope.scaling.longrope." + name).c_str(), type, data.data(), data.size());
    };
    u32("rope.scaling.longrope.version", 1);
    gguf_set_val_str(ctx.get(), key("rope.scaling.longrope.switch").c_str(), c->rule.c_str());
    array("tier_length", GGUF_TYPE_UINT32, lengths);
    array("tier_start_tokens", GGUF_TYPE_UINT32, starts);
    array("tier_attn_factor", GGUF_TYPE_FLOAT32, attn_factors);
    array("tier_factors", GGUF_TYPE_FLOAT32, factors);
    if (c->stock_fields) {  // above 16 tokens of context: factors of 3, from fill_tensor()
        gguf_set_val_str(ctx.get(), key("rope.scaling.type").c_str(), "longrope");
        gguf_set_val_f32(ctx.get(), key("rope.scaling.attn_factor").c_str(), 1.3f);
        u32("rope.scaling.original_context_length", 16);
    }
    if (!c->layers.empty()) {
        array("layers", GGUF_TYPE_UINT32, c->layers);
    }
    if (c->log_base) {
        u32("rope.scaling.longrope.attn_log_base", c->log_base);
        array("attn_log_exempt_layers", GGUF_TYPE_UINT32, c->log_exempt);
    }
    return ctx;
}

using weights = std::map<std::string, std::vector<float>>;

inline void fill_tensor(ggml_tensor * tensor, void * userdata) {
    const std::string name = tensor->name;
    const auto        has  = [&](const char * part) {
        return name.find(part) != std::string::npos;
    };

    std::seed_seq                   seed(name.begin(), name.end());
    std::mt19937                    rng(seed);
    std::normal_distribution<float> normal;

    const float        gain = has("attn_q") || has("attn_k") ? 1.5f : 1.0f;
    std::vector<float> data(ggml_nelements(tensor));
    for (float & x : data) {
        x = has(".bias")        ? 0.0f :
            has("scale")        ? 1.0f :
            has("rope_freqs")   ? 1.0f :
            has("rope_factors") ? 3.0f :
            has("norm")         ? 1.0f + 0.1f * normal(rng) :
            has("token_embd")   ? normal(rng) :
                                  gain * normal(rng) / std::sqrt((float) tensor->ne[0]);
    }
    ggml_backend_tensor_set(tensor, data.data(), 0, ggml_nbytes(tensor));
    if (userdata) {
        (*static_cast<weights *>(userdata))[name] = data;
    }
}

// null if the metadata is refused
inline llama_model_ptr load_metadata(gguf_context * ctx, weights * w = nullptr) {
    return llama_model_ptr(llama_model_init_from_user(ctx, fill_tensor, w, llama_model_default_params()));
}

inline llama_model_ptr load(const config * c, weights * w = nullptr, const std::string & arch = "llama") {
    return load_metadata(metadata(c, arch).get(), w);
}

using vec = std::vector<double>;

class reference {
  public:
    struct cell {
        llama_pos        pos;
        std::vector<vec> k, v;  // [N_LAYER][N_HEAD_KV*N_HEAD_DIM], before rotation
    };

    using sequence = std::vector<std::shared_ptr<cell>>;

    reference(const config & c, const weights & w) : c(c), w(w) {}

    // a cell may stand in several sequences
    std::map<llama_seq_id, sequence> seqs;

    // first tier with n_tokens <= length
    size_t tier_for(size_t n_tokens) const {
        size_t t = 0;
        while (t + 1 < c.tiers.size() && n_tokens > c.tiers[t].length) {
            ++t;
        }
        return t;
    }

    // logits of one more token, which looks at all cells of the sequences up to its own position
    vec decode(const std::vector<llama_seq_id> & seq_ids, llama_token token, llama_pos pos, size_t t) {
        auto here = std::make_shared<cell>(cell{ pos, {}, {} });
        for (const llama_seq_id s : seq_ids) {
            seqs[s].push_back(here);
        }
        const auto & embd = w.at("token_embd.weight");
        vec          x(embd.begin() + token * N_EMBD, embd.begin() + (token + 1) * N_EMBD);

        for (uint32_t il = 0; il < N_LAYER; ++il) {
            const std::string block = "blk." + std::to_string(il) + ".";

            const vec h = norm(x, block + "attn_norm.weight");
            vec       q = mul(block + "attn_q.weight", h);
            here->k.push_back(mul(block + "attn_k.weight", h));
            here->v.push_back(mul(block + "attn_v.weight", h));

            const bool exempt = std::count(c.log_exempt.begin(), c.log_exempt.end(), il) > 0;
            if (c.log_base && !exempt) {
                for (double & value : q) {
                    value *= std::max(1.0, std::log(pos + 1.0) / std::log((double) c.log_base));
                }
            }
            vec mixed(N_HEAD * N_HEAD_DIM, 0.0);
            for (uint32_t head = 0; head < N_HEAD; ++head) {
                attend(il, seqs[seq_ids[0]], pos, t, &q[head * N_HEAD_DIM], head / (N_HEAD / N_HEAD_KV),
                       &mixed[head * N_HEAD_DIM]);
            }
            add(x, mul(block + "attn_output.weight", mixed));

            const vec h2   = norm(x, block + "ffn_norm.weight");
            vec       gate = mul(block + "ffn_gate.weight", h2);
            const vec up   = mul(block + "ffn_up.weight", h2);
            for (size_t i = 0; i < gate.size(); ++i) {
                gate[i] = gate[i] / (1.0 + std::exp(-gate[i])) * up[i];
            }
            add(x, mul(block + "ffn_down.weight", gate));
        }
        return mul("output.weight", norm(x, "output_norm.weight"));
    }

  private:
    vec mul(const std::string & name, const vec & x) const {
        const auto & m = w.at(name);
        vec          y(m.size() / x.size(), 0.0);
        for (size_t o = 0; o < y.size(); ++o) {
            for (size_t i = 0; i < x.size(); ++i) {
                y[o] += m[o * x.size() + i] * x[i];
            }
        }
        return y;
    }

    vec norm(const vec & x, const std::string & name) const {
        double sum = 0.0;
        for (const double value : x) {
            sum += value * value;
        }
        vec y = x;
        for (size_t i = 0; i < x.size(); ++i) {
            y[i] *= w.at(name)[i] / std::sqrt(sum / x.size() + RMS_EPS);
        }
        return y;
    }

    static void add(vec & x, const vec & y) {
        for (size_t i = 0; i < x.size(); ++i) {
            x[i] += y[i];
        }
    }

    vec rotate(const double * x, llama_pos pos, uint32_t il, size_t t) const {
        const auto & tier   = c.tiers[t];
        const bool   scaled = c.layers.empty() || std::count(c.layers.begin(), c.layers.end(), il) > 0;

        vec y(N_HEAD_DIM);
        for (uint32_t i = 0; i < N_HEAD_DIM / 2; ++i) {
            double angle = pos * std::pow((double) THETA, -2.0 * i / N_HEAD_DIM);
            if (scaled && pos >= (llama_pos) tier.n_start) {
                angle /= tier.factors[i];
            }
            const double m = scaled ? tier.attn_factor : 1.0;
            y[2 * i]       = m * (x[2 * i] * std::cos(angle) - x[2 * i + 1] * std::sin(angle));
            y[2 * i + 1]   = m * (x[2 * i] * std::sin(angle) + x[2 * i + 1] * std::cos(angle));
        }
        return y;
    }

    void attend(uint32_t         il,
                const sequence & cells,
                llama_pos        pos,
                size_t           t,
                const double *   q,
                uint32_t         head_kv,
                double *         result) const {
        const vec q_rotated = rotate(q, pos, il, t);
        vec       weight;
        double    sum = 0.0;
        for (const auto & other : cells) {
            const vec k     = rotate(&other->k[il][head_kv * N_HEAD_DIM], other->pos, il, t);
            double    score = 0.0;
            for (uint32_t i = 0; i < N_HEAD_DIM; ++i) {
                score += q_rotated[i] * k[i];
            }
            weight.push_back(other->pos <= pos ? std::exp(score / std::sqrt((double) N_HEAD_DIM)) : 0.0);
            sum += weight.back();
        }
        for (size_t j = 0; j < cells.size(); ++j) {
            for (uint32_t i = 0; i < N_HEAD_DIM; ++i) {
                result[i] += weight[j] / sum * cells[j]->v[il][head_kv * N_HEAD_DIM + i];
            }
        }
    }

    const config &  c;
    const weights & w;
};

}  // namespace tiny

#include "llama-longrope.h"

#include "gguf.h"
#include "llama-arch.h"
#include "llama-context.h"
#include "llama-hparams.h"
#include "llama-impl.h"
#include "llama-kv-cache-iswa.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

static constexpr uint32_t LONGROPE_VERSION   = 1;
static constexpr size_t   LONGROPE_MAX_TIERS = 65535;

//
// the keys of a file
//

namespace {

class longrope_keys {
  public:
    longrope_keys(const gguf_context * ctx, std::string prefix) : ctx(ctx), prefix(std::move(prefix)) {}

    [[noreturn]] void fail(const std::string & name, const std::string & what) const {
        throw std::runtime_error(format("key %s%s %s", prefix.c_str(), name.c_str(), what.c_str()));
    }

    bool has(const std::string & name) const { return gguf_find_key(ctx, (prefix + name).c_str()) >= 0; }

    uint32_t u32(const std::string & name) const {
        const int64_t id = find(name);
        if (gguf_get_kv_type(ctx, id) != GGUF_TYPE_UINT32) {
            fail(name, "must be a uint32");
        }
        return gguf_get_val_u32(ctx, id);
    }

    std::string str(const std::string & name) const {
        const int64_t id = find(name);
        if (gguf_get_kv_type(ctx, id) != GGUF_TYPE_STRING) {
            fail(name, "must be a string");
        }
        return gguf_get_val_str(ctx, id);
    }

    template <typename T> std::vector<T> array(const std::string & name, gguf_type type, size_t n_expected) const {
        const int64_t id = find(name);
        if (gguf_get_kv_type(ctx, id) != GGUF_TYPE_ARRAY || gguf_get_arr_type(ctx, id) != type) {
            fail(name, format("must be an array of %s", gguf_type_name(type)));
        }
        const size_t n = gguf_get_arr_n(ctx, id);
        if (n_expected != SIZE_MAX && n != n_expected) {
            fail(name, format("has %zu values, expected %zu", n, n_expected));
        }
        const T * data = (const T *) gguf_get_arr_data(ctx, id);
        return n == 0 ? std::vector<T>() : std::vector<T>(data, data + n);
    }

    // a list of layers as a mask; `otherwise` is for a key that is not there
    std::vector<bool> mask(const std::string & name, uint32_t n_layer, bool otherwise) const {
        if (!has(name)) {
            return std::vector<bool>(n_layer, otherwise);
        }
        std::vector<bool> result(n_layer, false);
        for (const uint32_t il : array<uint32_t>(name, GGUF_TYPE_UINT32, SIZE_MAX)) {
            if (il >= n_layer) {
                fail(name, format("names layer %u of a model with %u layers", il, n_layer));
            }
            result[il] = true;
        }
        return result;
    }

  private:
    int64_t find(const std::string & name) const {
        const int64_t id = gguf_find_key(ctx, (prefix + name).c_str());
        if (id < 0) {
            fail(name, "is missing");
        }
        return id;
    }

    const gguf_context * ctx;
    const std::string    prefix;
};

// beyond these bounds no method goes: angles or the keys in an F16 cache would overflow and end as NaN (NaN is outside too)
bool is_rescale_factor(float x) {
    return x >= 1e-6f && x <= 1e9f;
}

bool is_attention_factor(float x) {
    return x >= 0.01f && x <= 100.0f;
}

// architectures whose graphs rotate Q and K of every layer, in this order, by ggml_rope_ext
bool is_supported(llm_arch arch) {
    switch (arch) {
        case LLM_ARCH_LLAMA:
        case LLM_ARCH_MINICPM:
        case LLM_ARCH_GRANITE:
        case LLM_ARCH_GRANITE_MOE:
        case LLM_ARCH_QWEN2:
        case LLM_ARCH_QWEN2MOE:
        case LLM_ARCH_QWEN3:
        case LLM_ARCH_QWEN3MOE:
        case LLM_ARCH_PHI3:
        case LLM_ARCH_PHIMOE:
        case LLM_ARCH_GEMMA:
        case LLM_ARCH_GEMMA2:
        case LLM_ARCH_GEMMA3:
            return true;
        default:
            return false;
    }
}

}  // namespace

std::shared_ptr<const llama_longrope> llama_longrope::load(const gguf_context *  ctx,
                                                           llm_arch              arch,
                                                           const llama_hparams & hparams) {
    const std::string prefix = std::string(llm_arch_name(arch)) + ".rope.scaling.longrope.";

    bool any = false;
    for (int64_t i = 0; i < gguf_get_n_kv(ctx) && !any; ++i) {
        any = std::string(gguf_get_key(ctx, i)).rfind(prefix, 0) == 0;
    }
    if (!any) {
        return nullptr;
    }

    const longrope_keys keys(ctx, prefix);

    if (!is_supported(arch)) {
        keys.fail("*", format("cannot be honoured for architecture %s by this build", llm_arch_name(arch)));
    }
    if (const uint32_t version = keys.u32("version"); version != LONGROPE_VERSION) {
        keys.fail("version", format("is %u, this build reads %u", version, LONGROPE_VERSION));
    }

    auto result = std::make_shared<llama_longrope>();

    const std::string rule = keys.str("switch");
    if (rule == "causal") {
        result->rule = LLAMA_LONGROPE_SWITCH_CAUSAL;
    } else if (rule == "sequence") {
        result->rule = LLAMA_LONGROPE_SWITCH_SEQUENCE;
    } else {
        keys.fail("switch", format("must be causal or sequence, got \"%.40s\"", rule.c_str()));
    }

    const auto lengths = keys.array<uint32_t>("tier_length", GGUF_TYPE_UINT32, SIZE_MAX);
    if (lengths.empty() || lengths.size() > LONGROPE_MAX_TIERS) {
        keys.fail("tier_length", format("has %zu values, expected 1 to %zu", lengths.size(), LONGROPE_MAX_TIERS));
    }

    const uint32_t n_layer = hparams.n_layer();
    if (n_layer == 0 || n_layer != hparams.n_layer_all) {
        keys.fail("*", format("stand beside %s.nextn_predict_layers, which this build cannot honour together",
                              llm_arch_name(arch)));
    }
    const uint32_t n_rot = hparams.n_rot(0);
    for (uint32_t il = 0; il < n_layer; ++il) {
        if (!hparams.has_rope(il)) {
            keys.fail("*",
                      format("stand beside a key that switches RoPE off in layer %u: remove %s.rope.scaling.finetuned",
                             il, llm_arch_name(arch)));
        }
        if (n_rot < 2 || n_rot % 2 != 0 || n_rot > hparams.n_embd_head_k(il) || hparams.n_rot(il) != n_rot ||
            hparams.n_embd_head_k(il) != hparams.n_embd_head_k(0)) {
            keys.fail("*", format("need an even %s.rope.dimension_count up to the head size %u, the same in all "
                                  "layers, got %u in layer %u",
                                  llm_arch_name(arch), hparams.n_embd_head_k(il), hparams.n_rot(il), il));
        }
    }

    const size_t n_pairs      = n_rot / 2;
    const auto   starts       = keys.array<uint32_t>("tier_start_tokens", GGUF_TYPE_UINT32, lengths.size());
    const auto   attn_factors = keys.array<float>("tier_attn_factor", GGUF_TYPE_FLOAT32, lengths.size());
    const auto   factors      = keys.array<float>("tier_factors", GGUF_TYPE_FLOAT32, lengths.size() * n_pairs);

    for (size_t t = 0; t < lengths.size(); ++t) {
        if (lengths[t] < 1 || lengths[t] > INT32_MAX || (t > 0 && lengths[t] <= lengths[t - 1])) {
            keys.fail("tier_length", format("must rise and fit an int32, value %zu is %u", t, lengths[t]));
        }
        if (starts[t] > INT32_MAX) {
            keys.fail("tier_start_tokens", format("must fit an int32, value %zu is %u", t, starts[t]));
        }
        if (!is_attention_factor(attn_factors[t])) {
            keys.fail("tier_attn_factor", format("must be from 0.01 to 100, value %zu is %g", t, attn_factors[t]));
        }
        llama_longrope_tier tier = { lengths[t], starts[t], attn_factors[t], {}, true };
        tier.factors.assign(factors.begin() + t * n_pairs, factors.begin() + (t + 1) * n_pairs);
        for (size_t i = 0; i < n_pairs; ++i) {
            if (!is_rescale_factor(tier.factors[i])) {
                keys.fail("tier_factors",
                          format("must be from 1e-6 to 1e9, pair %zu of tier %zu is %g", i, t, tier.factors[i]));
            }
            tier.plain = tier.plain && tier.factors[i] == 1.0f;
        }
        result->tiers.push_back(std::move(tier));
    }

    result->layers     = keys.mask("layers", n_layer, true);
    result->log_exempt = keys.mask("attn_log_exempt_layers", n_layer, false);
    if (keys.has("attn_log_base")) {
        result->log_base = keys.u32("attn_log_base");
        if (result->log_base < 2) {
            keys.fail("attn_log_base", format("must be at least 2, got %u", result->log_base));
        }
    }
    if (hparams.rope_freq_scale_train != 1.0f) {
        keys.fail("*", "stand beside a linear scaling: remove rope.scaling.factor, the factors already hold it");
    }
    return result;
}

uint32_t llama_longrope::tier_for_length(uint32_t n_tokens) const {
    const auto it = std::lower_bound(tiers.begin(), tiers.end(), n_tokens,
                                     [](const llama_longrope_tier & tier, uint32_t n) { return tier.length < n; });
    return it == tiers.end() ? tiers.size() - 1 : it - tiers.begin();
}

float llama_longrope::log_scale(llama_pos pos) const {
    return log_base == 0 ? 1.0f : std::max(1.0, std::log(pos + 1.0) / std::log((double) log_base));
}

std::string llama_longrope::describe() const {
    uint32_t n_start = 0;
    for (const auto & tier : tiers) {
        n_start = std::max(n_start, tier.n_start);
    }
    return format("rule %s, %zu tiers (%u to %u tokens), %u start tokens, %s",
                  rule == LLAMA_LONGROPE_SWITCH_CAUSAL ? "causal" : "sequence", tiers.size(), tiers.front().length,
                  max_length(), n_start,
                  log_base ? format("log scaling from %u tokens", log_base).c_str() : "no log scaling");
}

//
// which tier each sequence stands on
//

llama_longrope_state::llama_longrope_state(const llama_model & model) :
    model(model.longrope),
    rule(model.longrope->rule) {
    const auto & first = model.longrope->tiers[0];

    bool stock = first.plain && first.attn_factor == 1.0f && model.hparams.rope_attn_factor == 1.0f;
    for (const auto & layer : model.layers) {
        stock = stock && !layer.rope_long && !layer.rope_short && !layer.rope_freqs;
    }
    stock_length = stock ? first.length : 0;
}

void llama_longrope_state::attach(llama_memory_i * memory, ggml_type type) {
    if (auto * iswa = dynamic_cast<llama_kv_cache_iswa *>(memory)) {
        caches = { iswa->get_base(), iswa->get_swa() };
    } else if (auto * kv = dynamic_cast<llama_kv_cache *>(memory)) {
        caches = { kv };
    } else if (memory) {
        throw std::runtime_error("longrope: this kind of KV cache is not supported");
    }
    for (auto * kv : caches) {
        kv->longrope = this;
    }
    type_k = type;
    warn_rounding();
}

void llama_longrope_state::warn_rounding() const {
    constexpr size_t n_harmless = 10;  // cpp_patch/README.md has the figures; F16 stays good with any number

    if (rule == LLAMA_LONGROPE_SWITCH_CAUSAL && model->tiers.size() > n_harmless && type_k != GGML_TYPE_F32 &&
        type_k != GGML_TYPE_F16) {
        LLAMA_LOG_WARN(
            "%s: at each of %zu tiers the cached keys are rotated and rounded to %s again, which costs precision "
            "with more than %zu tiers: use a cache of type f16 or f32, or fewer tiers\n",
            __func__, model->tiers.size(), ggml_type_name(type_k), n_harmless);
    }
}

bool llama_longrope_state::empty() const {
    for (const auto * kv : caches) {
        for (uint32_t strm = 0; strm < kv->get_n_stream(); ++strm) {
            if (kv->get_cells(strm).get_used() > 0) {  // without a unified cache, stream s holds sequence s
                return false;
            }
        }
    }
    return true;
}

void llama_longrope_state::set_length(llama_seq_id seq_id, uint32_t n_tokens) {
    for (llama_seq_id s = 0; s < LLAMA_MAX_SEQ; ++s) {
        if (seq_id < 0 || s == seq_id) {
            declared[s] = n_tokens;
        }
    }
}

bool llama_longrope_state::must_reprocess(llama_seq_id seq_id, uint32_t n_tokens) const {
    if (rule != LLAMA_LONGROPE_SWITCH_SEQUENCE || caches.empty()) {
        return false;
    }
    const auto & cells = caches[0]->get_cells(seq_id);
    const auto & order = cells.seq_pos_get(seq_id);
    return !order.empty() &&
           cells.tier_get(order.rbegin()->second) != model->tier_for_length(std::max(n_tokens, declared[seq_id]));
}

void llama_longrope_state::begin_batch(const llama_batch_allocr & balloc) {
    // sequences can share cells only if they lie in one stream
    const auto * kv = !caches.empty() && caches[0]->get_n_stream() == 1 ? caches[0] : nullptr;

    const llama_batch & batch = balloc.get_batch();
    shares = std::any_of(batch.n_seq_id, batch.n_seq_id + batch.n_tokens, [](int32_t n) { return n > 1; });

    size_t n_used = 0;
    for (llama_seq_id s = 0; s < LLAMA_MAX_SEQ; ++s) {
        const llama_pos last   = balloc.seq_pos_max(s);
        const llama_pos cached = kv ? kv->seq_pos_max(s) : -1;

        n_used += kv ? kv->get_cells(s).seq_pos_get(s).size() : 0;
        batch_tier[s] = model->tier_for_length(std::max<uint32_t>(std::max(last, cached) + 1, declared[s]));
        if (last < 0) {
            continue;
        }
        if (last >= (llama_pos) model->max_length() && !warned_length) {
            warned_length = true;
            LLAMA_LOG_WARN("%s: sequence %d grows beyond the last tier (%u tokens), which goes on to be used\n",
                           __func__, s, model->max_length());
        }
        if (must_reprocess(s, last + 1)) {
            LLAMA_LOG_WARN(
                "%s: sequence %d crosses a tier border under rule `sequence`: its cached keys are rotated, "
                "not computed again. See llama_longrope_must_reprocess() and llama_longrope_set_length()\n",
                __func__, s);
        }
    }
    shares =
        (shares || (kv && n_used > kv->get_cells(0).get_used())) && model->tiers.size() > llama_longrope_cut::MAX_TIERS;
}

uint32_t llama_longrope_state::tier_for(llama_seq_id seq_id, llama_pos pos) const {
    return rule == LLAMA_LONGROPE_SWITCH_CAUSAL ? model->tier_for_length(pos + 1) : batch_tier[seq_id];
}

void llama_longrope_state::forget(llama_seq_id seq_id) {
    if (seq_id < 0) {
        known.reset();
    } else {
        known.reset(seq_id);
    }
}

bool llama_longrope_state::read_tier(uint32_t & n_seq_id, llama_pos pos, uint32_t & tier) const {
    const uint32_t saved = n_seq_id >> 16;  // tier + 1

    n_seq_id &= 0xFFFF;
    tier = saved == 0 ? 0 : saved - 1;

    if (saved == 0 && pos >= (llama_pos) stock_length) {
        LLAMA_LOG_ERROR("%s: the state was saved without longrope, under another rotation: process the prompt again\n",
                        __func__);
        return false;
    }
    if (tier >= model->tiers.size()) {
        LLAMA_LOG_ERROR("%s: the state was saved under tier %u, the model has %zu\n", __func__, tier,
                        model->tiers.size());
        return false;
    }
    return true;
}

llama_seq_bits llama_longrope_state::sharing(llama_seq_id seq_id, const std::vector<llama_seq_bits> & joined) const {
    llama_seq_bits found;
    llama_seq_bits visited;
    found.set(seq_id);

    while (found != visited) {
        for (const auto & seqs : joined) {
            if ((seqs & found).any()) {
                found |= seqs;
            }
        }
        for (llama_seq_id s = 0; s < LLAMA_MAX_SEQ; ++s) {
            if (!found.test(s) || visited.test(s)) {
                continue;
            }
            visited.set(s);
            for (const auto * kv : caches) {
                const auto & cells = kv->get_cells(s);
                for (const auto & [pos, cell] : cells.seq_pos_get(s)) {
                    found |= cells.seq_get_all(cell);
                }
            }
        }
    }
    return found;
}

void llama_longrope_state::drop(const llama_seq_bits & seqs) {
    for (llama_seq_id s = 0; s < LLAMA_MAX_SEQ; ++s) {
        if (seqs.test(s)) {
            LLAMA_LOG_ERROR("%s: sequence %d is removed from the cache: its keys are half rotated\n", __func__, s);
            for (auto * kv : caches) {
                kv->seq_rm(s, -1, -1);
            }
        }
    }
}

bool llama_longrope_state::begin_ubatch(llama_context & lctx, const llama_ubatch & ubatch, bool & rotated) {
    std::map<llama_seq_id, uint32_t> asked;
    std::vector<llama_seq_bits>      joined;  // by tokens that belong to several sequences
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        llama_seq_bits seqs;
        for (int32_t s = 0; s < ubatch.n_seq_id[i]; ++s) {
            const llama_seq_id seq_id = ubatch.seq_id[i][s];
            asked[seq_id]             = std::max(asked[seq_id], tier_for(seq_id, ubatch.pos[i]));
            seqs.set(seq_id);
        }
        if (seqs.count() > 1 && std::find(joined.begin(), joined.end(), seqs) == joined.end()) {
            joined.push_back(seqs);
        }
    }

    bool settled = joined.empty();
    for (const auto & [seq_id, tier] : asked) {
        settled = settled && known.test(seq_id) && standing[seq_id] == tier;
    }
    if (settled) {
        return true;
    }

    llama_seq_bits moved;
    for (const auto & [seq_id, tier] : asked) {
        if (moved.test(seq_id)) {
            continue;
        }
        if (caches.empty()) {
            standing[seq_id] = tier;
            continue;
        }

        const llama_seq_bits group  = sharing(seq_id, joined);
        uint32_t             target = 0;
        for (llama_seq_id s = 0; s < LLAMA_MAX_SEQ; ++s) {
            if (group.test(s)) {
                const auto it = asked.find(s);
                target = std::max(target, it != asked.end() ? it->second : tier_for(s, caches[0]->seq_pos_max(s)));
            }
        }
        for (auto * kv : caches) {
            if (!kv->longrope_rotate(lctx, group, target, rotated)) {
                drop(group);
                return false;
            }
        }
        for (llama_seq_id s = 0; s < LLAMA_MAX_SEQ; ++s) {
            if (group.test(s)) {
                standing[s] = target;
            }
        }
        known |= group;
        moved |= group;
    }
    return true;
}

bool llama_longrope_cut::accepts(int32_t n_seq_id, const llama_seq_id * seq_ids, llama_pos pos) {
    if (!state) {
        return true;
    }
    for (int32_t i = 0; i < n_seq_id; ++i) {
        const uint32_t tier = state->tier_for(seq_ids[i], pos);

        // sequences that share cells move to tiers that are not known yet, each may need one of its own
        const bool full =
            state->is_sharing() ? tier_of_seq.size() >= MAX_TIERS : tiers.size() >= MAX_TIERS && tiers.count(tier) == 0;

        const auto it = tier_of_seq.find(seq_ids[i]);
        if (it != tier_of_seq.end() ? it->second != tier : full) {
            return false;
        }
    }
    for (int32_t i = 0; i < n_seq_id; ++i) {
        const uint32_t tier = state->tier_for(seq_ids[i], pos);
        tier_of_seq.emplace(seq_ids[i], tier);
        tiers.insert(tier);
    }
    return true;
}

//
// C API
//

uint32_t llama_model_longrope_n_tiers(const llama_model * model) {
    return model->longrope ? model->longrope->tiers.size() : 0;
}

bool llama_longrope_set_switch(llama_context * ctx, enum llama_longrope_switch rule) {
    if (!ctx->longrope || !ctx->longrope->empty()) {
        return false;
    }
    ctx->longrope->rule = rule == LLAMA_LONGROPE_SWITCH_FILE ? ctx->longrope->model->rule : rule;
    ctx->longrope->warn_rounding();
    return true;
}

bool llama_longrope_set_length(llama_context * ctx, llama_seq_id seq_id, uint32_t n_tokens) {
    if (!ctx->longrope) {
        return false;
    }
    ctx->longrope->set_length(seq_id, n_tokens);
    return ctx->longrope->rule == LLAMA_LONGROPE_SWITCH_SEQUENCE;
}

bool llama_longrope_must_reprocess(const llama_context * ctx, llama_seq_id seq_id, uint32_t n_tokens) {
    return ctx->longrope && ctx->longrope->must_reprocess(seq_id, n_tokens);
}

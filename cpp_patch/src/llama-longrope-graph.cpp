#include "llama-longrope-graph.h"

#include "ggml-cpp.h"
#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <functional>

static ggml_tensor * new_input(ggml_context * ctx, ggml_type type, int64_t ne0, int64_t ne1 = 1, int64_t ne2 = 1) {
    ggml_tensor * result = ggml_new_tensor_3d(ctx, type, ne0, ne1, ne2);
    ggml_set_input(result);
    return result;
}

// an input that the graph does not use has no buffer
template <typename T> static void set_tensor(ggml_tensor * tensor, const std::vector<T> & data) {
    if (tensor && tensor->buffer) {
        ggml_backend_tensor_set(tensor, data.data(), 0, data.size() * sizeof(T));
    }
}

// the CPU kernel reads a factor for every pair of the head, also behind the rotated ones
static std::vector<float> pad(std::vector<float> factors, int64_t n_embd_head) {
    factors.resize(n_embd_head / 2, 1.0f);
    return factors;
}

//
// rope in the model's graph
//

// a ubatch that only serves to reserve memory has no sequences
static uint32_t tier_of(const llama_longrope_state & state, const llama_ubatch & ubatch, uint32_t i) {
    return ubatch.n_seq_id[i] > 0 ? state.tier_of(ubatch.seq_id[i][0]) : 0;
}

static int32_t set_of(const llama_longrope_state & state, const llama_ubatch & ubatch, uint32_t i) {
    const uint32_t tier = tier_of(state, ubatch, i);
    return state.model->tiers[tier].keeps(ubatch.pos[i]) ? llama_longrope_plan::UNSCALED : (int32_t) tier;
}

static float magnitude_of(const llama_longrope_state & state, const llama_ubatch & ubatch, uint32_t i) {
    return state.model->tiers[tier_of(state, ubatch, i)].attn_factor;
}

llama_longrope_plan::llama_longrope_plan(const llama_longrope_state & state, const llama_ubatch & ubatch) {
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        const int32_t set = set_of(state, ubatch, i);
        if (std::find(sets.begin(), sets.end(), set) == sets.end()) {
            sets.push_back(set);
        }
        const float m   = magnitude_of(state, ubatch, i);
        mixed_magnitude = mixed_magnitude || (i > 0 && m != magnitude);
        magnitude       = m;
        log_scaled      = log_scaled || state.model->log_scale(ubatch.pos[i]) != 1.0f;
    }
    if (mixed_magnitude) {
        magnitude = 1.0f;
    }
    std::sort(sets.begin(), sets.end());
}

bool llama_longrope_plan::operator==(const llama_longrope_plan & other) const {
    return sets == other.sets && mixed_magnitude == other.mixed_magnitude && magnitude == other.magnitude &&
           log_scaled == other.log_scaled;
}

llm_graph_input_longrope::llm_graph_input_longrope(ggml_context * ctx, const llm_graph_params & params) :
    state(*params.cparams.longrope),
    plan(state, params.ubatch),
    n_layer(params.hparams.n_layer()),
    n_rot(params.hparams.n_rot()),
    n_embd_head(params.hparams.n_embd_head_k()) {
    const int64_t n_tokens = params.ubatch.n_tokens;

    for (const int32_t set : plan.sets) {
        const bool scaled = set != llama_longrope_plan::UNSCALED;
        factors.push_back(scaled ? new_input(ctx, GGML_TYPE_F32, n_embd_head / 2) : nullptr);
        gates.push_back(plan.sets.size() > 1 ? new_input(ctx, GGML_TYPE_I32, n_tokens) : nullptr);
    }
    if (plan.mixed_magnitude) {
        magnitude = new_input(ctx, GGML_TYPE_F32, n_embd_head, 1, n_tokens);
    }
    if (plan.log_scaled) {
        log_scale = new_input(ctx, GGML_TYPE_F32, 1, 1, n_tokens);
    }
}

void llm_graph_input_longrope::set_input(const llama_ubatch * ubatch) {
    GGML_ASSERT(n_calls == 2 * n_layer && "longrope: the graph does not rope Q and K of every layer");

    const uint32_t n_tokens = ubatch->n_tokens;

    for (size_t k = 0; k < plan.sets.size(); ++k) {
        if (factors[k]) {
            set_tensor(factors[k], pad(state.model->tiers[plan.sets[k]].factors, n_embd_head));
        }
        if (gates[k]) {
            std::vector<int32_t> pos(n_tokens, 0);
            for (uint32_t i = 0; i < n_tokens; ++i) {
                if (set_of(state, *ubatch, i) == plan.sets[k]) {
                    pos[i] = ubatch->pos[i];
                }
            }
            set_tensor(gates[k], pos);
        }
    }
    if (magnitude) {
        std::vector<float> scale(n_embd_head * n_tokens, 1.0f);
        for (uint32_t i = 0; i < n_tokens; ++i) {
            std::fill_n(scale.begin() + i * n_embd_head, n_rot, magnitude_of(state, *ubatch, i));
        }
        set_tensor(magnitude, scale);
    }
    if (log_scale) {
        std::vector<float> scale(n_tokens);
        for (uint32_t i = 0; i < n_tokens; ++i) {
            scale[i] = state.model->log_scale(ubatch->pos[i]);
        }
        set_tensor(log_scale, scale);
    }
}

bool llm_graph_input_longrope::can_reuse(const llm_graph_params & params) {
    return params.cparams.longrope == &state && plan == llama_longrope_plan(state, params.ubatch);
}

ggml_tensor * llm_graph_input_longrope::rope(ggml_context * ctx,
                                             ggml_tensor *  cur,
                                             ggml_tensor *  pos,
                                             int            n_dims,
                                             int            mode,
                                             int            n_ctx_orig,
                                             float          freq_base,
                                             float          freq_scale,
                                             float          beta_fast,
                                             float          beta_slow) {
    const uint32_t il = n_calls++ / 2;
    if (il >= n_layer || !state.model->layers[il]) {
        return ggml_rope_ext(ctx, cur, pos, nullptr, n_dims, mode, n_ctx_orig, freq_base, freq_scale, 0.0f, 1.0f,
                             beta_fast, beta_slow);
    }
    for (size_t k = 0; k < plan.sets.size(); ++k) {
        // a factor scales every token, so it goes on one rope of the chain
        const float m = k == 0 ? plan.magnitude : 1.0f;
        cur = ggml_rope_ext(ctx, cur, gates[k] ? gates[k] : pos, factors[k], n_dims, mode, n_ctx_orig, freq_base,
                            freq_scale, 0.0f, m, beta_fast, beta_slow);
    }
    return magnitude ? ggml_mul(ctx, cur, magnitude) : cur;
}

ggml_tensor * llm_graph_input_longrope::scale_q(ggml_context * ctx, ggml_tensor * q, int il) const {
    return log_scale && !state.model->log_exempt[il] ? ggml_mul(ctx, q, log_scale) : q;
}

// hides the global function from the graphs of all models
ggml_tensor * llm_graph_context::ggml_rope_ext(ggml_context * ctx,
                                               ggml_tensor *  a,
                                               ggml_tensor *  b,
                                               ggml_tensor *  c,
                                               int            n_dims,
                                               int            mode,
                                               int            n_ctx_orig,
                                               float          freq_base,
                                               float          freq_scale,
                                               float          ext_factor,
                                               float          attn_factor,
                                               float          beta_fast,
                                               float          beta_slow) const {
    if (inp_longrope) {
        return inp_longrope->rope(ctx, a, b, n_dims, mode, n_ctx_orig, freq_base, freq_scale, beta_fast, beta_slow);
    }
    return ::ggml_rope_ext(ctx, a, b, c, n_dims, mode, n_ctx_orig, freq_base, freq_scale, ext_factor, attn_factor,
                           beta_fast, beta_slow);
}

//
// rotation of cached keys
//

// one rope over some cells of the cache; position 0 leaves a cell as it is
struct longrope_step {
    std::vector<float>   factors;  // [n_rot/2]; empty: the original rotation
    std::vector<int32_t> pos;      // [n_cells]

    bool idle() const {
        return std::all_of(pos.begin(), pos.end(), [](int32_t p) { return p == 0; });
    }
};

// what happens to some cells of one stream
struct longrope_rotation {
    std::vector<uint32_t>      cells;
    std::vector<longrope_step> steps;  // for the rescaled layers
    std::vector<int32_t>       shift;  // [n_cells] change of position; empty: none
    float                      magnitude = 1.0f;
};

// factors of the rotation that turns pairs divided by `from` into pairs divided by `to`, at the same
// position: 1/g = 1/to - 1/from. A pair that stays where it is takes a factor that leaves no angle.
static std::vector<float> difference(const llama_longrope_tier & from,
                                     bool                        keeps_from,
                                     const llama_longrope_tier & to,
                                     bool                        keeps_to) {
    std::vector<float> result(from.factors.size());
    for (size_t i = 0; i < result.size(); ++i) {
        const double a = keeps_from ? 1.0 : 1.0 / from.factors[i];
        const double b = keeps_to ? 1.0 : 1.0 / to.factors[i];
        result[i]      = a == b ? 1e30f : (float) (1.0 / (b - a));
    }
    return result;
}

static bool on_cpu(const ggml_tensor * tensor) {
    const auto dev = ggml_backend_buft_get_device(ggml_backend_buffer_get_type(tensor->buffer));
    return !dev || ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU;
}

bool llama_kv_cache::longrope_compute(llama_context & lctx, uint32_t strm, const longrope_rotation & work) const {
    constexpr size_t max_bytes = 8u << 20;  // of the rows of one group in F32; the graph holds at most three copies

    const auto & cparams  = lctx.get_cparams();
    const auto & longrope = *cparams.longrope->model;

    // a CPU spends most of a rope on cos and sin of the positions, which are the same in every layer:
    // there, the keys of all layers with the same rotation are roped side by side, as if they were heads
    const auto alike = [&](uint32_t a, uint32_t b) {
        return longrope.layers[a] == longrope.layers[b] && hparams.n_embd_head_k(a) == hparams.n_embd_head_k(b) &&
               hparams.n_rot(a) == hparams.n_rot(b) &&
               model.get_rope_freq_base(cparams, a) == model.get_rope_freq_base(cparams, b) &&
               model.get_rope_freq_scale(cparams, a) == model.get_rope_freq_scale(cparams, b);
    };
    std::vector<std::vector<const kv_layer *>> groups;
    for (const auto & layer : layers) {
        if (!hparams.has_rope(layer.il) || (!longrope.layers[layer.il] && work.shift.empty())) {
            continue;
        }
        const auto joins = [&](const auto & group) {
            return on_cpu(layer.k) && on_cpu(group[0]->k) && alike(layer.il, group[0]->il);
        };
        const auto it = std::find_if(groups.begin(), groups.end(), joins);
        if (it == groups.end()) {
            groups.push_back({ &layer });
        } else {
            it->push_back(&layer);
        }
    }

    size_t row_bytes = 1;
    for (const auto & group : groups) {
        size_t bytes = 0;
        for (const auto * layer : group) {
            bytes += hparams.n_embd_k_gqa(layer->il) * sizeof(float);
        }
        row_bytes = std::max(row_bytes, bytes);
    }
    const size_t n_rows = std::max<size_t>(1, max_bytes / row_bytes);

    for (size_t i0 = 0; i0 < work.cells.size(); i0 += n_rows) {
        const size_t n = std::min(n_rows, work.cells.size() - i0);

        auto * sched = lctx.get_sched();
        auto * res   = lctx.get_gf_res_reserve();
        ggml_backend_sched_reset(sched);
        res->reset();
        auto * ctx = res->get_ctx();
        auto * gf  = res->get_gf();

        ggml_tensor * src = new_input(ctx, GGML_TYPE_I32, n);
        ggml_tensor * dst = new_input(ctx, GGML_TYPE_I64, n);
        ggml_tensor * rot = build_input_k_rot(ctx);

        std::vector<ggml_tensor *> pos;
        for (size_t k = 0; k < work.steps.size(); ++k) {
            pos.push_back(new_input(ctx, GGML_TYPE_I32, n));
        }
        ggml_tensor * shift = work.shift.empty() ? nullptr : new_input(ctx, GGML_TYPE_I32, n);

        std::map<int64_t, std::vector<ggml_tensor *>> factors;  // by head size

        for (const auto & group : groups) {
            const uint32_t il          = group[0]->il;
            const int64_t  n_embd_head = hparams.n_embd_head_k(il);

            std::vector<ggml_tensor *> caches;
            std::vector<size_t>        offsets = { 0 };  // in a row, the last one is its size
            for (const auto * layer : group) {
                const int64_t n_embd = hparams.n_embd_k_gqa(layer->il);
                caches.push_back(ggml_reshape_2d(ctx, layer->k, n_embd, (int64_t) get_size() * n_stream));
                offsets.push_back(offsets.back() + n_embd * sizeof(float));
            }

            auto & tensors = factors[n_embd_head];
            if (tensors.empty()) {
                for (const auto & step : work.steps) {
                    tensors.push_back(step.factors.empty() ? nullptr : new_input(ctx, GGML_TYPE_F32, n_embd_head / 2));
                }
            }

            const auto rope = [&](ggml_tensor * cur, ggml_tensor * p, ggml_tensor * f, float m) {
                return ggml_rope_ext_inplace(ctx, cur, p, f, hparams.n_rot(il), hparams.rope_type,
                                             cparams.n_ctx_orig_yarn, model.get_rope_freq_base(cparams, il),
                                             model.get_rope_freq_scale(cparams, il), 0.0f, m, cparams.yarn_beta_fast,
                                             cparams.yarn_beta_slow);
            };

            ggml_tensor * cur = nullptr;
            if (group.size() == 1) {
                cur = ggml_get_rows(ctx, caches[0], src);
            } else {
                cur = new_input(ctx, GGML_TYPE_F32, offsets.back() / sizeof(float), n);
                for (size_t k = 0; k < group.size(); ++k) {
                    cur = ggml_set_2d_inplace(ctx, cur, ggml_get_rows(ctx, caches[k], src), offsets.back(), offsets[k]);
                }
            }
            cur = ggml_reshape_3d(ctx, cur, n_embd_head, offsets.back() / sizeof(float) / n_embd_head, n);
            if (rot) {
                cur = llama_mul_mat_hadamard(ctx, cur, rot);
            }
            if (longrope.layers[il]) {
                for (size_t s = 0; s < work.steps.size(); ++s) {
                    cur = rope(cur, pos[s], tensors[s], s == 0 ? work.magnitude : 1.0f);
                }
            } else {
                cur = rope(cur, shift, nullptr, 1.0f);
            }
            if (rot) {
                cur = llama_mul_mat_hadamard(ctx, cur, rot);
            }
            for (size_t k = 0; k < group.size(); ++k) {
                ggml_tensor * rows = ggml_view_2d(ctx, cur, caches[k]->ne[0], n, offsets.back(), offsets[k]);
                ggml_build_forward_expand(gf, ggml_set_rows(ctx, caches[k], rows, dst));
            }
        }
        if (ggml_graph_n_nodes(gf) == 0) {
            return true;
        }
        if (!ggml_backend_sched_alloc_graph(sched, gf)) {
            LLAMA_LOG_ERROR("%s: failed to allocate the graph that rotates cached keys\n", __func__);
            return false;
        }

        std::vector<int32_t> rows(n);
        std::vector<int64_t> rows_dst(n);
        for (size_t i = 0; i < n; ++i) {
            rows_dst[i] = rows[i] = strm * get_size() + work.cells[i0 + i];
        }
        set_tensor(src, rows);
        set_tensor(dst, rows_dst);
        const auto slice = [&](const std::vector<int32_t> & all) {
            return std::vector<int32_t>(all.begin() + i0, all.begin() + i0 + n);
        };
        for (size_t s = 0; s < work.steps.size(); ++s) {
            set_tensor(pos[s], slice(work.steps[s].pos));
            for (auto & [n_embd_head, tensors] : factors) {
                if (tensors[s]) {
                    set_tensor(tensors[s], pad(work.steps[s].factors, n_embd_head));
                }
            }
        }
        if (shift) {
            set_tensor(shift, slice(work.shift));
        }
        if (rot && rot->buffer) {
            set_input_k_rot(rot);
        }
        if (lctx.graph_compute_whole(gf) != GGML_STATUS_SUCCESS) {
            LLAMA_LOG_ERROR("%s: failed to rotate cached keys\n", __func__);
            return false;
        }
    }
    return true;
}

bool llama_kv_cache::longrope_rotate(llama_context &        lctx,
                                     const llama_seq_bits & seqs,
                                     uint32_t               target,
                                     bool &                 rotated) {
    const auto & tiers = longrope->model->tiers;

    std::map<uint32_t, std::vector<uint32_t>> cells_of_tier;

    uint32_t strm = 0;
    for (llama_seq_id s = 0; s < LLAMA_MAX_SEQ; ++s) {
        if (!seqs.test(s)) {
            continue;
        }
        strm = seq_to_stream[s];
        for (const auto & [pos, cell] : v_cells[strm].seq_pos_get(s)) {
            if (v_cells[strm].tier_get(cell) != target) {
                cells_of_tier[v_cells[strm].tier_get(cell)].push_back(cell);
            }
        }
    }

    auto &       cells = v_cells[strm];
    const auto & to    = tiers[target];

    for (auto & [tier, list] : cells_of_tier) {
        const auto & from = tiers.at(tier);

        // a cell that several of the sequences share was found several times
        std::sort(list.begin(), list.end());
        list.erase(std::unique(list.begin(), list.end()), list.end());

        longrope_rotation work;
        work.cells     = list;
        work.magnitude = (double) to.attn_factor / from.attn_factor;

        for (const auto & [keeps_from, keeps_to] : {
                 std::pair(false, false), { true,  false },
                   { false, true  }
        }) {
            longrope_step step = { difference(from, keeps_from, to, keeps_to), {} };
            for (const uint32_t cell : list) {
                const llama_pos pos = cells.pos_get(cell);
                step.pos.push_back(from.keeps(pos) == keeps_from && to.keeps(pos) == keeps_to ? pos : 0);
            }
            if (!step.idle()) {
                work.steps.push_back(std::move(step));
            }
        }
        if (work.steps.empty() && work.magnitude != 1.0f) {
            work.steps.push_back({ {}, std::vector<int32_t>(list.size(), 0) });
        }
        if (!work.steps.empty()) {
            rotated = true;
            if (!longrope_compute(lctx, strm, work)) {
                return false;
            }
        }
        for (const uint32_t cell : list) {
            cells.tier_set(cell, target);
        }
    }
    return true;
}

bool llama_kv_cache::longrope_shift(llama_context & lctx) {
    for (uint32_t strm = 0; strm < n_stream; ++strm) {
        auto & cells = v_cells[strm];

        std::map<uint32_t, std::vector<uint32_t>> cells_of_tier;
        for (uint32_t i = 0; i < cells.size(); ++i) {
            if (!cells.is_empty(i) && cells.get_shift(i) != 0) {
                cells_of_tier[cells.tier_get(i)].push_back(i);
            }
        }

        for (const auto & [index, list] : cells_of_tier) {
            const auto & tier = longrope->model->tiers.at(index);

            longrope_rotation work;
            work.cells = list;

            longrope_step original = { {}, {} };
            longrope_step rescaled = { tier.factors, {} };
            for (const uint32_t cell : list) {
                const llama_pos shift = cells.get_shift(cell);
                const llama_pos pos   = cells.pos_get(cell);
                const llama_pos old   = pos - shift;
                original.pos.push_back((tier.keeps(pos) ? pos : 0) - (tier.keeps(old) ? old : 0));
                rescaled.pos.push_back((tier.keeps(pos) ? 0 : pos) - (tier.keeps(old) ? 0 : old));
                work.shift.push_back(shift);
            }
            work.steps = { std::move(original), std::move(rescaled) };
            if (!longrope_compute(lctx, strm, work)) {
                return false;
            }
        }
    }
    return true;
}

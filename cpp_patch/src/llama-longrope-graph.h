#pragma once

// The graph side of llama-longrope.h: position-gated chains of stock RoPE ops.
//
// A rotation by position 0 is the identity, so a ubatch whose tokens need different factors takes one
// rope per set of factors, each with the true position for the tokens of its set and 0 for all others.
// A ubatch that needs one set, as nearly all do, takes one rope, as without longrope.

#include "llama-graph.h"
#include "llama-longrope.h"

// what a graph has to hold for a ubatch; two ubatches of one size with equal plans can share a graph
struct llama_longrope_plan {
    static constexpr int32_t UNSCALED = -1;

    std::vector<int32_t> sets;  // index of a tier, or UNSCALED

    bool  mixed_magnitude = false;
    float magnitude       = 1.0f;  // attention factor, if all tokens have the same
    bool  log_scaled      = false;

    llama_longrope_plan(const llama_longrope_state & state, const llama_ubatch & ubatch);

    bool operator==(const llama_longrope_plan & other) const;
};

class llm_graph_input_longrope : public llm_graph_input_i {
  public:
    llm_graph_input_longrope(ggml_context * ctx, const llm_graph_params & params);

    void set_input(const llama_ubatch * ubatch) override;

    bool can_reuse(const llm_graph_params & params) override;

    // instead of ggml_rope_ext() for the Q and K of every layer, in this order; the factors and the attention
    // factor that the file has for llama.cpp without longrope are not used, not even for layers that are not rescaled
    ggml_tensor * rope(ggml_context * ctx,
                       ggml_tensor *  cur,
                       ggml_tensor *  pos,
                       int            n_dims,
                       int            mode,
                       int            n_ctx_orig,
                       float          freq_base,
                       float          freq_scale,
                       float          beta_fast,
                       float          beta_slow);

    // the logarithmic scale of q [n_embd_head, n_head, n_tokens]
    ggml_tensor * scale_q(ggml_context * ctx, ggml_tensor * q, int il) const;

  private:
    const llama_longrope_state & state;
    const llama_longrope_plan    plan;

    const uint32_t n_layer;
    const uint32_t n_rot;
    const int64_t  n_embd_head;

    uint32_t n_calls = 0;                // of rope()

    std::vector<ggml_tensor *> gates;    // I32 [n_tokens] per set, if there are several
    std::vector<ggml_tensor *> factors;  // F32 [n_embd_head/2] per set, null for UNSCALED

    ggml_tensor * magnitude = nullptr;   // F32 [n_embd_head, 1, n_tokens], for mixed tiers
    ggml_tensor * log_scale = nullptr;   // F32 [1, 1, n_tokens]
};

#pragma once

// Non-uniform RoPE with tiers: what the file says (llama_longrope), and which tier each sequence of
// a context stands on (llama_longrope_state). The graph side is in llama-longrope-graph.h.
//
// A tier is a set of factors for sequences up to a length. The pair i of the token at position p is
// rotated by p*theta_i if p < n_start, else by p*theta_i/factors[i]; cos and sin are multiplied by
// attn_factor. Invariant: all cached keys of a sequence are rotated by one tier, the same as the
// queries that look at them.

#include "llama-batch.h"
#include "llama.h"

#include <array>
#include <bitset>
#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

struct gguf_context;
struct llama_context;
struct llama_hparams;
struct llama_memory_i;
struct llama_model;

class llama_kv_cache;

struct llama_longrope_tier {
    uint32_t length;   // longest sequence in tokens, inclusive
    uint32_t n_start;  // positions below it keep the original rotation
    float    attn_factor;

    std::vector<float> factors;  // [n_rot/2] divisors of theta

    bool plain;                  // all factors are 1

    // true if the token at this position keeps the original rotation
    bool keeps(llama_pos pos) const { return plain || pos < (llama_pos) n_start; }
};

// the keys {arch}.rope.scaling.longrope.* of a file
struct llama_longrope {
    enum llama_longrope_switch rule;

    std::vector<llama_longrope_tier> tiers;   // by rising length
    std::vector<bool>                layers;  // [n_layer] true if the layer is rescaled

    uint32_t          log_base = 0;           // 0: no log scaling of q
    std::vector<bool> log_exempt;             // [n_layer]

    // null if the file has none of the keys
    // throws std::runtime_error with the name of the key that is missing or malformed, or if the
    // architecture ropes in a way that this code does not handle
    static std::shared_ptr<const llama_longrope> load(const gguf_context *  ctx,
                                                      llm_arch              arch,
                                                      const llama_hparams & hparams);

    // first tier with n_tokens <= length, the last one beyond all of them
    uint32_t tier_for_length(uint32_t n_tokens) const;

    uint32_t max_length() const { return tiers.back().length; }

    // max(ln(pos + 1)/ln(log_base), 1), Entropy-ABF (arXiv 2401.07004, section 3.2)
    float log_scale(llama_pos pos) const;

    std::string describe() const;
};

using llama_seq_bits = std::bitset<LLAMA_MAX_SEQ>;

// part of a context
class llama_longrope_state {
  public:
    explicit llama_longrope_state(const llama_model & model);

    const std::shared_ptr<const llama_longrope> model;

    enum llama_longrope_switch rule;

    // the caches that hold rotated keys, of this type; set once, after the memory was created
    void attach(llama_memory_i * memory, ggml_type type);

    // says so if the keys are rounded too often: at each border, to the type of the cache
    void warn_rounding() const;

    // true if nothing is cached
    bool empty() const;

    // the sequence will have at least n_tokens (rule `sequence`); seq_id < 0: every sequence
    void set_length(llama_seq_id seq_id, uint32_t n_tokens);

    // rule `sequence`: true if the tokens of seq_id in the cache stand on another tier than n_tokens need
    bool must_reprocess(llama_seq_id seq_id, uint32_t n_tokens) const;

    // call with a whole batch before it is split: picks the tiers of rule `sequence`
    void begin_batch(const llama_batch_allocr & balloc);

    // true if a sequence may end on another tier than it asks for, and there are so many tiers that it matters
    bool is_sharing() const { return shares; }

    // the tier that a token asks for
    uint32_t tier_for(llama_seq_id seq_id, llama_pos pos) const;

    // call before the cells of a ubatch are placed: moves the sequences of the ubatch to the tier that
    // they ask for, and rotates their cached keys if that is another one. A sequence that shares
    // cells with others moves together with them, to the highest tier that one of them asks for.
    // rotated: set to true if a graph was computed, so that an earlier one cannot be reused
    bool begin_ubatch(llama_context & lctx, const llama_ubatch & ubatch, bool & rotated);

    // the tier that the sequence stands on
    uint32_t tier_of(llama_seq_id seq_id) const { return standing[seq_id]; }

    // the tier of the sequence's cells is no longer known, for they were copied or restored; seq_id < 0: of all
    void forget(llama_seq_id seq_id);

    // takes the tier of a cell out of the upper half of a saved state's n_seq_id
    // false, after an error message, if the cell cannot be used
    bool read_tier(uint32_t & n_seq_id, llama_pos pos, uint32_t & tier) const;

  private:
    // seq_id and the sequences that share cells, or tokens of this ubatch, with it or with each other
    llama_seq_bits sharing(llama_seq_id seq_id, const std::vector<llama_seq_bits> & joined) const;

    void drop(const llama_seq_bits & seqs);

    std::vector<llama_kv_cache *> caches;
    ggml_type                     type_k = GGML_TYPE_F32;

    std::array<uint32_t, LLAMA_MAX_SEQ> standing   = {};  // index of the tier
    std::array<uint32_t, LLAMA_MAX_SEQ> declared   = {};  // tokens
    std::array<uint32_t, LLAMA_MAX_SEQ> batch_tier = {};
    llama_seq_bits                      known;

    // the first tier below this length is what llama.cpp computes for the file without our keys; 0: nowhere
    uint32_t stock_length = 0;

    bool shares        = false;
    bool warned_length = false;
};

// refuses the token with which a ubatch would hold two tiers of one sequence, or more tiers than its
// graph has room for
class llama_longrope_cut {
  public:
    explicit llama_longrope_cut(const llama_longrope_state * state) : state(state) {}

    bool accepts(int32_t n_seq_id, const llama_seq_id * seq_ids, llama_pos pos);

    static constexpr size_t MAX_TIERS = 4;

    // what a graph of MAX_TIERS tiers holds beyond one of none. Per layer: a rope of Q and of K for each, two
    // attention factors, the scale of q. As inputs: positions and factors for each, and those three.
    static constexpr uint32_t n_nodes(uint32_t n_layer) { return (2 * MAX_TIERS + 4) * (n_layer + 1); }

  private:
    const llama_longrope_state *     state;
    std::map<llama_seq_id, uint32_t> tier_of_seq;
    std::set<uint32_t>               tiers;
};

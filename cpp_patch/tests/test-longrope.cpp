// The behaviour of contexts with longrope keys, through the public API, against the definition in
// longrope-tiny.h. Without arguments all tests; with one, those whose name contains it, and only then
// `rounding`, which measures for half a minute.

#include "longrope-tiny.h"

#include <climits>
#include <cstdio>
#include <cstring>
#include <functional>

using tiny::config;
using tiny::reference;
using tiny::vec;

static std::string log_text;
static int         n_failed = 0;
static double      worst    = 0.0;  // of the running test

static void check(bool ok, const std::string & what) {
    if (!ok) {
        n_failed++;
        printf("  FAILED: %s\n%s", what.c_str(), log_text.c_str());
    }
    log_text.clear();
}

struct token {
    llama_token               id;
    llama_pos                 pos;
    std::vector<llama_seq_id> seqs = { 0 };
};

struct options {
    uint32_t  n_ubatch  = 512;
    uint32_t  n_seq_max = 1;
    bool      unified   = false;
    bool      flash     = false;
    ggml_type type_k    = GGML_TYPE_F32;
};

static llama_context_params context_params(const options & o) {
    llama_context_params params = llama_context_default_params();
    params.n_threads = params.n_threads_batch = 1;
    params.n_ctx                              = o.unified ? 512 : 256 * o.n_seq_max;
    params.n_batch                            = 512;
    params.n_ubatch                           = o.n_ubatch;
    params.n_seq_max                          = o.n_seq_max;
    params.kv_unified                         = o.unified;
    params.type_k                             = o.type_k;
    params.type_v                             = GGML_TYPE_F32;
    params.flash_attn_type = o.flash ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;
    return params;
}

class session {
  public:
    session(llama_model * model, const options & o) : ctx(llama_init_from_model(model, context_params(o))) {
        check(ctx != nullptr, "make a context");
    }

    llama_memory_t memory() const { return llama_get_memory(ctx.get()); }

    // logits of each token, empty if llama_decode fails
    std::vector<std::vector<float>> decode(const std::vector<token> & tokens) {
        llama_batch batch = llama_batch_init(tokens.size(), 0, 8);
        for (const auto & t : tokens) {
            const int i       = batch.n_tokens++;
            batch.token[i]    = t.id;
            batch.pos[i]      = t.pos;
            batch.n_seq_id[i] = t.seqs.size();
            std::copy(t.seqs.begin(), t.seqs.end(), batch.seq_id[i]);
            batch.logits[i] = true;
        }
        std::vector<std::vector<float>> result;
        if (llama_decode(ctx.get(), batch) == 0) {
            for (size_t i = 0; i < tokens.size(); ++i) {
                const float * logits = llama_get_logits_ith(ctx.get(), i);
                result.emplace_back(logits, logits + tiny::N_VOCAB);
            }
        }
        llama_batch_free(batch);
        return result;
    }

    // in batches of n tokens
    std::vector<std::vector<float>> decode(const std::vector<token> & tokens, size_t n) {
        std::vector<std::vector<float>> result;
        for (size_t i = 0; i < tokens.size(); i += n) {
            for (auto & row : decode({ tokens.begin() + i, tokens.begin() + std::min(i + n, tokens.size()) })) {
                result.push_back(std::move(row));
            }
        }
        return result;
    }

    std::vector<uint8_t> save(llama_seq_id seq_id = -1) {
        std::vector<uint8_t> data(seq_id < 0 ? llama_state_get_size(ctx.get()) :
                                               llama_state_seq_get_size(ctx.get(), seq_id));
        const size_t         n = seq_id < 0 ? llama_state_get_data(ctx.get(), data.data(), data.size()) :
                                              llama_state_seq_get_data(ctx.get(), data.data(), data.size(), seq_id);
        data.resize(n);
        return data;
    }

    bool restore(const std::vector<uint8_t> & data, llama_seq_id seq_id = -1) {
        return (seq_id < 0 ? llama_state_set_data(ctx.get(), data.data(), data.size()) :
                             llama_state_seq_set_data(ctx.get(), data.data(), data.size(), seq_id)) > 0;
    }

    llama_context_ptr ctx;
};

// the same as session::decode, one token at a time; tier_at is called with each token
static std::vector<vec> decode(reference &                                    ref,
                               const std::vector<token> &                     tokens,
                               const std::function<size_t(const token & t)> & tier_at) {
    std::vector<vec> result;
    for (const auto & t : tokens) {
        result.push_back(ref.decode(t.seqs, t.id, t.pos, tier_at(t)));
    }
    return result;
}

static std::function<size_t(const token & t)> causal(const reference & ref) {
    return [&ref](const token & t) {
        return ref.tier_for(t.pos + 1);
    };
}

template <typename A, typename B> static double difference(const A & a, const B & b) {
    if (a.size() != b.size()) {
        return INFINITY;
    }
    double result = 0.0;
    for (size_t i = 0; i < a.size(); ++i) {
        for (size_t j = 0; j < a[i].size(); ++j) {
            const double d = std::fabs((double) a[i][j] - b[i][j]);
            result         = d <= result ? result : std::isnan(d) ? INFINITY : d;
        }
    }
    return result;
}

// logits are of the order of 1; F32 cache, re-rotated any number of times
static constexpr double LIMIT = 1e-4;

// flash attention casts keys and values to F16
static constexpr double FLASH_LIMIT = 0.02;

template <typename A, typename B>
static void close_to(const A & got, const B & expected, const std::string & what, double limit = LIMIT) {
    const double d = difference(got, expected);
    worst          = std::max(worst, d);
    check(d <= limit, what + ": differs by " + std::to_string(d));
}

static std::vector<token> prompt(int n, llama_seq_id seq = 0, int seed = 1) {
    std::mt19937       rng(seed);
    std::vector<token> result;
    for (int i = 0; i < n; ++i) {
        result.push_back({ (llama_token) (rng() % tiny::N_VOCAB), i, { seq } });
    }
    return result;
}

static std::vector<token> slice(const std::vector<token> & tokens, size_t from, size_t to) {
    return { tokens.begin() + from, tokens.begin() + to };
}

// a model and the definition for it
struct fixture {
    explicit fixture(config c = tiny::ladder()) : c(std::move(c)), model(tiny::load(&this->c, &w)), ref(this->c, w) {
        check(model != nullptr, "load the model");
    }

    config          c;
    tiny::weights   w;
    llama_model_ptr model;
    reference       ref;
};

//
// tests
//

// every way of feeding 56 tokens gives the logits of the definition; they cross two borders, pass the
// last tier, and the start windows end inside of ubatches
static void test_chunking() {
    config half       = tiny::ladder();
    half.layers       = { 1 };
    half.stock_fields = true;
    config scaled     = tiny::ladder();
    scaled.log_base   = 8;
    config exempt     = scaled;
    exempt.log_exempt = { 0 };
    config first      = tiny::ladder();  // the first tier is rescaled as well
    first.tiers.erase(first.tiers.begin());

    for (const auto & c : { tiny::ladder(), half, scaled, exempt, first }) {
        fixture    f(c);
        const auto tokens   = prompt(56);
        const auto expected = decode(f.ref, tokens, causal(f.ref));

        reference  wrong(f.c, f.w);
        const auto other = decode(wrong, tokens, [](const token &) { return 0; });
        check(difference(other, expected) > 1000 * LIMIT, "the model does not see which tier it is on");

        for (const bool flash : { false, true }) {
            const double limit = flash ? FLASH_LIMIT : LIMIT;
            for (const int n_ubatch : { 512, 16, 7, 1 }) {
                session s(f.model.get(), { (uint32_t) n_ubatch, 1, false, flash });
                close_to(s.decode(tokens), expected, "one batch, ubatch " + std::to_string(n_ubatch), limit);
            }
            for (const int n : { 1, 5, 24 }) {
                session s(f.model.get(), { 512, 1, false, flash });
                close_to(s.decode(tokens, n), expected, "batches of " + std::to_string(n), limit);
            }
        }
    }
}

// sequences on all tiers in one batch, then token by token across the borders
static void test_sequences() {
    fixture f;
    for (const bool unified : { false, true }) {
        for (const int n_ubatch : { 512, 8 }) {
            session   s(f.model.get(), { (uint32_t) n_ubatch, 4, unified });
            reference ref(f.c, f.w);

            const int          lengths[] = { 5, 11, 23, 50 };
            std::vector<token> batch;
            for (int seq = 0; seq < 4; ++seq) {
                for (const auto & t : prompt(lengths[seq], seq, seq)) {
                    batch.push_back(t);
                }
            }
            close_to(s.decode(batch), decode(ref, batch, causal(ref)), "prompts");
            for (int step = 0; step < 9; ++step) {
                batch.clear();
                for (int seq = 0; seq < 4; ++seq) {
                    batch.push_back({ (step * 7 + seq) % 96, lengths[seq] + step, { seq } });
                }
                close_to(s.decode(batch), decode(ref, batch, causal(ref)), "step");
            }
        }
    }
}

// a sequence that shares cells with a longer one takes its tier, and returns when it is alone
static void test_shared_cells() {
    fixture    f;
    session    s(f.model.get(), { 512, 2, true });
    auto       a    = prompt(16, 0);
    const auto tier = [&](size_t t) {
        return [t](const token &) {
            return t;
        };
    };
    close_to(s.decode(slice(a, 0, 8)), decode(f.ref, slice(a, 0, 8), tier(0)), "prefix");
    llama_memory_seq_cp(s.memory(), 0, 1, -1, -1);
    f.ref.seqs[1] = f.ref.seqs[0];

    auto       b        = prompt(20, 1, 2);
    const auto crossing = slice(b, 8, 20);
    close_to(s.decode(crossing), decode(f.ref, crossing, causal(f.ref)), "the copy passes the border");
    close_to(s.decode({ a[8] }), decode(f.ref, { a[8] }, tier(1)), "the original stands on the copy's tier");

    // both in one ubatch, and a token that belongs to both
    const std::vector<token> both = {
        { 5, 9,  { 0 } },
        { 6, 20, { 1 } }
    };
    close_to(s.decode(both), decode(f.ref, both, tier(1)), "both in one batch");

    llama_memory_seq_rm(s.memory(), 1, 8, -1);
    f.ref.seqs[1].resize(8);
    close_to(s.decode({ a[10] }), decode(f.ref, { a[10] }, tier(0)), "the copy was cut");

    llama_memory_seq_rm(s.memory(), 0, 8, -1);
    f.ref.seqs[0].resize(8);
    const std::vector<token> joint = {
        { 7, 8, { 0, 1 } },
        { 8, 9, { 0, 1 } }
    };
    close_to(s.decode(joint), decode(f.ref, joint, tier(0)), "tokens of both sequences");
}

// random prompts, copies, removals, context shifts, saved and restored states
static void test_random(bool unified, uint32_t seed) {
    constexpr int n_seq = 3;

    fixture      f;
    std::mt19937 rng(seed);
    const auto   pick = [&](int n) {
        return (int) (rng() % n);
    };

    const options o      = { (uint32_t) (pick(2) ? 512 : 5), n_seq, unified };
    auto          s      = std::make_unique<session>(f.model.get(), o);
    auto &        seqs   = f.ref.seqs;
    const auto    length = [&](int seq) {
        return (int) seqs[seq].size();
    };  // positions have no holes

    // the sequences that share cells with seq, directly or not
    const auto group = [&](int seq) {
        std::vector<int> found = { seq };
        for (size_t i = 0; i < found.size(); ++i) {
            for (int other = 0; other < n_seq; ++other) {
                const auto & x      = seqs[found[i]];
                const auto & y      = seqs[other];
                const bool   shares = std::any_of(x.begin(), x.end(), [&](const auto & cell) {
                    return std::find(y.begin(), y.end(), cell) != y.end();
                });
                if (shares && std::find(found.begin(), found.end(), other) == found.end()) {
                    found.push_back(other);
                }
            }
        }
        return found;
    };
    const auto more = [&](int seq, int n) {
        std::vector<token> result;
        for (int i = 0; i < n; ++i) {
            result.push_back({ pick(tiny::N_VOCAB), length(seq) + i, { seq } });
        }
        return result;
    };
    std::string history;

    for (int step = 0; step < 60 && n_failed == 0; ++step) {
        const int  a    = pick(n_seq);
        const int  b    = (a + 1 + pick(n_seq - 1)) % n_seq;
        const int  n    = length(a);
        int        feed = -1;  // the only sequence of the next batch
        const auto note = [&](const char * name) {
            history += std::string(name) + std::to_string(a) + " ";
        };

        switch (pick(9)) {
            case 0:
                note("copy");
                llama_memory_seq_rm(s->memory(), b, -1, -1);
                llama_memory_seq_cp(s->memory(), a, b, -1, -1);
                seqs[b] = seqs[a];
                if (!unified) {
                    for (auto & cell : seqs[b]) {
                        cell = std::make_shared<reference::cell>(*cell);
                    }
                }
                feed = pick(n_seq);  // a state saved before it would not hold the copy
                break;
            case 1:
                if (n > 0) {
                    note("cut");
                    const int p = pick(n);
                    llama_memory_seq_rm(s->memory(), a, p, -1);
                    seqs[a].resize(p);
                }
                break;
            case 2:
                if (n > 8 && group(a).size() == 1) {
                    note("shift");
                    const int from = pick(n / 2), cut = 1 + pick(n / 3);
                    llama_memory_seq_rm(s->memory(), a, from, from + cut);
                    llama_memory_seq_add(s->memory(), a, from + cut, -1, -cut);
                    seqs[a].erase(seqs[a].begin() + from, seqs[a].begin() + from + cut);
                    for (int p = from; p < n - cut; ++p) {
                        seqs[a][p]->pos -= cut;
                    }
                    feed = pick(n_seq);
                }
                break;
            case 3:
                if (unified && pick(4) == 0) {  // reaches one stream only
                    note("keep");
                    llama_memory_seq_keep(s->memory(), a);
                    for (int other = 0; other < n_seq; ++other) {
                        if (other != a) {
                            seqs[other].clear();
                        }
                    }
                }
                break;
            case 4:
                {
                    note("restore all");
                    auto fresh = std::make_unique<session>(f.model.get(), o);
                    check(fresh->restore(s->save()), "restore a whole state");
                    s = std::move(fresh);
                    break;
                }
            case 5:
                if (n > 0) {
                    note("restore");
                    const auto data = s->save(a);
                    llama_memory_seq_rm(s->memory(), b, -1, -1);
                    check(s->restore(data, b), "restore a sequence");
                    seqs[b] = seqs[a];
                    for (auto & cell : seqs[b]) {
                        cell = std::make_shared<reference::cell>(*cell);
                    }
                }
                break;
            default:
                feed = pick(n_seq);
        }
        if (feed < 0) {
            continue;
        }
        // one or two sequences that share nothing
        std::vector<token> batch;
        std::vector<int>   fed = { feed };
        for (const int seq : { feed, (feed + 1) % n_seq }) {
            const auto g = group(feed);
            if (seq == feed || std::find(g.begin(), g.end(), seq) == g.end()) {
                for (const auto & t : more(seq, std::max(1, std::min(1 + pick(12), 60 - length(seq))))) {
                    batch.push_back(t);
                }
            }
        }
        history += "decode" + std::to_string(feed) + " ";
        const auto expected = decode(f.ref, batch, [&](const token & t) {
            size_t highest = f.ref.tier_for(t.pos + 1);
            for (const int other : group(t.seqs[0])) {
                highest = std::max(highest, other == t.seqs[0] ? 0 : f.ref.tier_for(length(other)));
            }
            return highest;
        });
        close_to(s->decode(batch), expected, "seed " + std::to_string(seed) + ": " + history);
    }
}

static void test_random_operations() {
    for (uint32_t seed = 0; seed < 12; ++seed) {
        test_random(seed % 2 == 0, seed);
    }
}

// a context shift with a second one on top of it, across a border and the start window
static void test_shift(const config & c) {
    fixture    f(c);
    session    s(f.model.get(), {});
    const auto tokens = prompt(30);
    s.decode(tokens);
    decode(f.ref, tokens, causal(f.ref));
    auto & cells = f.ref.seqs[0];
    for (const auto & [from, cut] : {
             std::pair(2, 9), { 1, 3 }
    }) {
        const int n = cells.size();
        llama_memory_seq_rm(s.memory(), 0, from, from + cut);
        llama_memory_seq_add(s.memory(), 0, from + cut, n, -cut);
        cells.erase(cells.begin() + from, cells.begin() + from + cut);
        for (size_t p = from; p < cells.size(); ++p) {
            cells[p]->pos -= cut;
        }
    }
    std::vector<token> rest;
    for (int p = cells.size(); p < 50; ++p) {
        rest.push_back({ p, p, { 0 } });
    }
    close_to(s.decode(rest, 4), decode(f.ref, rest, causal(f.ref)), "after two shifts");
}

static void test_shifts() {
    config half       = tiny::ladder();
    half.layers       = { 1 };
    half.stock_fields = true;
    for (const auto & c : { tiny::ladder(), half }) {
        test_shift(c);
    }
}

// an abort callback stops a batch, but leaves no key half rotated or shifted twice
static void test_abort() {
    fixture    f;
    const auto tokens   = prompt(30);
    const auto expected = decode(f.ref, tokens, causal(f.ref));
    for (const bool shift : { false, true }) {
        for (const int n_nodes : { 0, 8 }) {
            int        left = INT_MAX;
            reference  ref(f.c, f.w);
            session    s(f.model.get(), {});
            const auto abort_at = [](void * data) {
                return --*static_cast<int *>(data) < 0;
            };
            llama_set_abort_callback(s.ctx.get(), abort_at, &left);
            s.decode(slice(tokens, 0, 12));
            decode(ref, slice(tokens, 0, 12), causal(ref));
            int n = 12;
            if (shift) {
                n -= 3;
                llama_memory_seq_rm(s.memory(), 0, 2, 5);
                llama_memory_seq_add(s.memory(), 0, 5, 12, -3);
                auto & cells = ref.seqs[0];
                cells.erase(cells.begin() + 2, cells.begin() + 5);
                for (int p = 2; p < n; ++p) {
                    cells[p]->pos = p;
                }
            }
            std::vector<token> rest;
            for (int p = n; p < 30; ++p) {
                rest.push_back({ tokens[p].id, p, { 0 } });
            }
            left = n_nodes;
            check(s.decode(rest).empty(), "aborted");
            left = INT_MAX;
            check(llama_memory_seq_pos_max(s.memory(), 0) == n - 1, "what was cached before is still there");
            close_to(s.decode(rest), decode(ref, rest, causal(ref)), "after an abort");
        }
    }
}

// states without tiers: from a model without keys
static void test_old_state() {
    // of an architecture whose files have no other factors
    const config c     = tiny::ladder();
    const auto   model = tiny::load(&c, nullptr, "qwen2");
    const auto   stock = tiny::load(nullptr, nullptr, "qwen2");

    const auto tokens = prompt(30);
    session    whole(model.get(), {});
    const auto expected = whole.decode(tokens);
    for (const llama_seq_id seq : { -1, 0 }) {
        session old(stock.get(), {});
        old.decode(slice(tokens, 0, 10));
        const auto small = old.save(seq);
        old.decode(slice(tokens, 10, 14));
        const auto large = old.save(seq);

        session s(model.get(), {});
        check(s.restore(small, seq), "a state within the first tier is read");
        close_to(s.decode(slice(tokens, 10, 30)), std::vector(expected.begin() + 10, expected.end()), "goes on");
        check(!s.restore(large, seq), "a state beyond the first tier is refused");
        check(llama_memory_seq_pos_max(s.memory(), 0) < 0, "nothing of it is left");

        session extended(model.get(), {});
        extended.decode(tokens);
        check(!old.restore(extended.save(seq), seq), "a model without keys refuses a state with tiers");

        config one = tiny::ladder();
        one.tiers.resize(2);
        const auto fewer = tiny::load(&one, nullptr, "qwen2");
        session    small_ladder(fewer.get(), {});
        check(!small_ladder.restore(extended.save(seq), seq), "a tier that the model does not have is refused");

        config rescaled = tiny::ladder();
        rescaled.tiers.erase(rescaled.tiers.begin());
        const auto no_plain = tiny::load(&rescaled, nullptr, "qwen2");
        session    changed(no_plain.get(), {});
        check(!changed.restore(small, seq), "a state without tiers is refused where the first tier is rescaled");
    }

    // files that llama.cpp without longrope rotates by factors of their own
    config fields       = tiny::ladder();
    fields.stock_fields = true;
    for (const auto & with : { tiny::ladder(), fields }) {
        const auto llama       = tiny::load(&with);  // rope_freqs, rope_factors_long
        const auto llama_stock = tiny::load(nullptr);
        session    old(llama_stock.get(), {});
        old.decode(slice(tokens, 0, 10));
        session s(llama.get(), {});
        check(!s.restore(old.save()), "a state without tiers is refused beside other factors");
    }
}

// rule `sequence`: the declared or known length picks one tier for everything
static void test_sequence_rule() {
    config c = tiny::ladder();
    c.rule   = "sequence";
    fixture    f(c);
    const auto tokens = prompt(40);
    const auto at     = [](size_t t) {
        return [t](const token &) {
            return t;
        };
    };
    const auto fresh = [&](size_t n, size_t t) {
        reference ref(f.c, f.w);
        return decode(ref, slice(tokens, 0, n), at(t));
    };
    for (const int n_ubatch : { 512, 6 }) {
        for (const auto & [n, t] : {
                 std::pair(12, 0), { 13, 1 },
                   { 24, 1 },
                   { 25, 2 }
        }) {
            session s(f.model.get(), { (uint32_t) n_ubatch });
            close_to(s.decode(slice(tokens, 0, n)), fresh(n, t), "one batch of " + std::to_string(n));
        }
        session declared(f.model.get(), { (uint32_t) n_ubatch });
        check(llama_longrope_set_length(declared.ctx.get(), 0, 20), "declare a length");
        check(!llama_longrope_must_reprocess(declared.ctx.get(), 0, 20), "an empty sequence needs nothing");
        close_to(declared.decode(slice(tokens, 0, 20), 3), fresh(20, 1), "declared, in batches of 3");
        check(!llama_longrope_must_reprocess(declared.ctx.get(), 0, 24), "24 tokens are on this tier");
        check(llama_longrope_must_reprocess(declared.ctx.get(), 0, 25), "25 tokens are on another tier");
        llama_longrope_set_length(declared.ctx.get(), -1, 0);
        check(llama_longrope_must_reprocess(declared.ctx.get(), 0, 8), "the declaration was taken back");
    }
    // of sequences that share cells, one that is not in the batch decides
    reference pair(f.c, f.w);
    session   two(f.model.get(), { 512, 2, true });
    close_to(two.decode(slice(tokens, 0, 16)), decode(pair, slice(tokens, 0, 16), at(1)), "16 tokens");
    llama_memory_seq_cp(two.memory(), 0, 1, -1, -1);
    llama_memory_seq_rm(two.memory(), 0, 8, -1);
    pair.seqs[1] = pair.seqs[0];
    pair.seqs[0].resize(8);
    close_to(two.decode({ tokens[8] }), decode(pair, { tokens[8] }, at(1)), "the copy keeps its tier");
    llama_memory_seq_rm(two.memory(), 1, 8, -1);
    pair.seqs[1].resize(8);
    llama_longrope_set_length(two.ctx.get(), 1, 30);
    close_to(two.decode({ tokens[9] }), decode(pair, { tokens[9] }, at(2)), "the copy will be longer");

    // removed and decoded again: a fresh run
    session s(f.model.get(), {});
    s.decode(slice(tokens, 0, 10));
    check(llama_longrope_must_reprocess(s.ctx.get(), 0, 13), "13 tokens are on another tier");
    llama_memory_seq_rm(s.memory(), 0, -1, -1);
    close_to(s.decode(slice(tokens, 0, 13)), fresh(13, 1), "processed again");

    // kept: the keys are rotated, the rest stays as it was
    reference ref(f.c, f.w);
    session   kept(f.model.get(), {});
    close_to(kept.decode(slice(tokens, 0, 10)), decode(ref, slice(tokens, 0, 10), at(0)), "before the border");
    close_to(kept.decode(slice(tokens, 10, 30)), decode(ref, slice(tokens, 10, 30), at(2)), "rotated");

    // the rule can be overridden while nothing is cached
    check(!llama_longrope_set_switch(kept.ctx.get(), LLAMA_LONGROPE_SWITCH_CAUSAL), "refused: cached tokens");
    llama_memory_clear(kept.memory(), true);
    check(llama_longrope_set_switch(kept.ctx.get(), LLAMA_LONGROPE_SWITCH_CAUSAL), "override");
    reference other(f.c, f.w);
    close_to(kept.decode(tokens), decode(other, tokens, causal(other)), "causal now");
    check(!llama_longrope_must_reprocess(kept.ctx.get(), 0, 48), "never under causal");
    check(!llama_longrope_set_length(kept.ctx.get(), 0, 0), "a length means nothing under causal");
    llama_memory_clear(kept.memory(), true);
    check(llama_longrope_set_switch(kept.ctx.get(), LLAMA_LONGROPE_SWITCH_FILE), "back to the file's rule");
    close_to(kept.decode(slice(tokens, 0, 13)), fresh(13, 1), "sequence again");
}

// caches with fewer bits: the error against the definition stays of the size that the type brings
static void test_cache_types() {
    fixture                                         f;
    const auto                                      tokens   = prompt(56);
    const auto                                      expected = decode(f.ref, tokens, causal(f.ref));
    const std::vector<std::pair<ggml_type, double>> limits   = {
        { GGML_TYPE_F16,  0.02 },
        { GGML_TYPE_BF16, 0.2  },
        { GGML_TYPE_Q8_0, 0.2  },
        { GGML_TYPE_Q4_0, 3.0  }
    };
    for (const auto & [type, limit] : limits) {
        for (const bool flash : { false, true }) {
            session      a(f.model.get(), { 512, 1, false, flash, type });
            session      b(f.model.get(), { 512, 1, false, flash, type });
            const double one = difference(a.decode(tokens), expected);
            const double all = difference(b.decode(tokens, 1), expected);
            printf("  %-5s flash %d: one batch %.2g, token by token %.2g\n", ggml_type_name(type), flash, one, all);
            check(one <= limit && all <= limit, ggml_type_name(type));
        }
    }
}

// what it costs to rotate and round the cached keys many times: 420 tokens on ladders of ever more tiers from the
// same first factors to the same last ones
static void test_rounding() {
    constexpr int n      = 420;
    const auto    tokens = prompt(n);
    for (const int n_tiers : { 1, 3, 10, 30, 100, 210 }) {
        config c;
        for (int t = 0; t < n_tiers; ++t) {
            const float x = n_tiers == 1 ? 1.0f : (float) t / (n_tiers - 1);
            c.tiers.push_back(
                { (uint32_t) (n * (t + 1) / n_tiers), 4, 1.0f + 0.2f * x, tiny::rising(1.0f + 7.0f * x) });
        }
        fixture    f(c);
        const auto expected = decode(f.ref, tokens, causal(f.ref));
        printf("  %3d tiers:", n_tiers);
        for (const ggml_type type : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }) {
            session    s(f.model.get(), { 512, 2, true, false, type });
            const auto got = s.decode(tokens);
            double     sum = 0.0;
            for (int i = n * 3 / 4; i < n; ++i) {
                for (size_t j = 0; j < tiny::N_VOCAB; ++j) {
                    sum += std::pow(got.at(i)[j] - expected[i][j], 2) / (n / 4 * tiny::N_VOCAB);
                }
            }
            printf(" %s %.2g", ggml_type_name(type), std::sqrt(sum));
            check(type != GGML_TYPE_F32 || std::sqrt(sum) < LIMIT, "F32 stays exact");
        }
        printf("\n");
    }
}

// below the first border the model is bit for bit the one without keys, whatever is allocated
static void test_first_tier_is_stock() {
    fixture    f;
    const auto stock  = tiny::load(nullptr);
    const auto tokens = prompt(12);
    for (const options o : {
             options{},
             { 4, 1, false, true },
             { 512, 2, true, false, GGML_TYPE_F16 }
    }) {
        session a(f.model.get(), o);
        session b(stock.get(), o);
        check(a.decode(tokens) == b.decode(tokens), "bit for bit");
    }
    session s(stock.get(), {});
    check(llama_model_longrope_n_tiers(stock.get()) == 0, "no tiers without keys");
    check(llama_model_longrope_n_tiers(f.model.get()) == 3, "three tiers");
    check(!llama_longrope_set_switch(s.ctx.get(), LLAMA_LONGROPE_SWITCH_CAUSAL), "no rule without keys");
    check(!llama_longrope_set_length(s.ctx.get(), 0, 20), "no length without keys");
    check(!llama_longrope_must_reprocess(s.ctx.get(), 0, 1000), "nothing to process again without keys");
}

// as many tiers as tokens in one ubatch, then all sequences cross a border at once
static void test_many_tiers() {
    constexpr int n = 200;
    config        c = tiny::ladder();
    c.tiers.clear();
    for (uint32_t t = 0; t <= n; ++t) {
        c.tiers.push_back({ t + 1, t % 3, 1.0f + 0.001f * t, tiny::rising(1.0f + 0.01f * t) });
    }
    fixture f(c);
    session s(f.model.get(), { 512, n, true });
    for (int step = 0; step < 2; ++step) {
        std::vector<token> batch;
        for (int seq = 0; seq < n; ++seq) {
            batch.push_back({ (seq + step) % (int) tiny::N_VOCAB, seq + step, { seq } });
        }
        close_to(s.decode(batch), decode(f.ref, batch, causal(f.ref)), "200 tiers in one ubatch");
    }
}

// sequences that ask for one tier, and share cells with others of 100 tiers: more than a graph has nodes for
static void test_many_tiers_by_sharing() {
    constexpr int n = 100;
    config        c = tiny::ladder();
    c.rule          = "sequence";
    c.tiers.clear();
    for (uint32_t t = 0; t < n; ++t) {
        c.tiers.push_back({ t + 2, 0, 1.0f, tiny::rising(1.0f + 0.1f * t) });
    }
    const auto ctx = tiny::metadata(&c);
    gguf_set_val_u32(ctx.get(), "llama.block_count", 5);
    const auto model = tiny::load_metadata(ctx.get());

    std::vector<token> longer, shorter;
    for (int i = 0; i < n; ++i) {
        longer.push_back({ i % 90, 0, { 2 * i } });
        shorter.push_back({ i % 80, 1, { 2 * i + 1 } });
    }
    std::vector<std::vector<float>> results[2];
    for (const int size : { 1, n }) {
        session s(model.get(), { 512, 2 * n, true });
        for (int i = 0; i < n; ++i) {
            llama_longrope_set_length(s.ctx.get(), 2 * i, i + 2);
        }
        s.decode(longer);
        for (int i = 0; i < n; ++i) {
            llama_memory_seq_cp(s.memory(), 2 * i, 2 * i + 1, -1, -1);
        }
        results[size == n] = s.decode(shorter, size);
    }
    check(results[1].size() == n, "all sequences are decoded");
    close_to(results[1], results[0], "all in one batch");
}

// training builds its graphs beside all of this
static void test_training() {
    fixture f;
    session s(f.model.get(), {});
    bool    refused = false;
    try {
        llama_opt_init(s.ctx.get(), f.model.get(), {});
    } catch (const std::exception & error) {
        refused = strstr(error.what(), "longrope") != nullptr;
    }
    check(refused, "training is refused");
}

// all other architectures that are allowed agree with themselves when a prompt is cut to pieces
static void test_architectures() {
    constexpr double limit = 10 * LIMIT;  // logits of gemma reach 140

    for (const char * arch : { "qwen2", "qwen3", "phi3", "gemma", "gemma2", "gemma3", "granite", "minicpm" }) {
        for (const bool unified : { false, true }) {
            const config c     = tiny::ladder();
            const auto   model = tiny::load(&c, nullptr, arch);
            check(model != nullptr, std::string("load ") + arch);
            if (!model) {
                break;
            }
            const auto tokens = prompt(56);
            session    whole(model.get(), { 512, 1, unified });
            const auto expected = whole.decode(tokens);
            for (const int n_ubatch : { 512, 5 }) {
                session s(model.get(), { (uint32_t) n_ubatch, 1, unified });
                close_to(s.decode(tokens, 3), expected, std::string(arch) + " in batches of 3", limit);
                session half(model.get(), { (uint32_t) n_ubatch, 1, unified });
                half.decode(slice(tokens, 0, 20));
                session next(model.get(), { (uint32_t) n_ubatch, 1, unified });
                check(next.restore(half.save()), "restore");
                close_to(next.decode(slice(tokens, 20, 56)),
                         std::vector<std::vector<float>>(expected.begin() + 20, expected.end()),
                         std::string(arch) + " after a restored state", limit);
            }
        }
    }
}

int main(int argc, char ** argv) {
    llama_log_set(
        [](ggml_log_level level, const char * text, void *) {
            if (level >= GGML_LOG_LEVEL_WARN) {
                log_text += text;
            }
        },
        nullptr);
    llama_backend_init();

    const std::vector<std::pair<const char *, void (*)()>> tests = {
        { "chunking",          test_chunking              },
        { "sequences",         test_sequences             },
        { "shared_cells",      test_shared_cells          },
        { "shift",             test_shifts                },
        { "abort",             test_abort                 },
        { "random_operations", test_random_operations     },
        { "old_state",         test_old_state             },
        { "sequence_rule",     test_sequence_rule         },
        { "cache_types",       test_cache_types           },
        { "rounding",          test_rounding              },
        { "first_tier",        test_first_tier_is_stock   },
        { "many_tiers",        test_many_tiers            },
        { "sharing_tiers",     test_many_tiers_by_sharing },
        { "training",          test_training              },
        { "architectures",     test_architectures         },
    };
    int n_run = 0, n_bad = 0;
    for (const auto & [name, test] : tests) {
        if (argc > 1 ? !strstr(name, argv[1]) : test == test_rounding) {
            continue;
        }
        const int64_t t0     = ggml_time_ms();
        const int     before = n_failed;
        worst                = 0.0;
        test();
        printf("%s %s, largest difference %.2g, %.1f s\n", n_failed == before ? "ok  " : "FAIL", name, worst,
               (ggml_time_ms() - t0) / 1e3);
        fflush(stdout);
        n_run++;
        n_bad += n_failed != before;
    }
    llama_backend_free();
    printf("%d passed, %d failed\n", n_run - n_bad, n_bad);
    return n_bad > 0 || n_run == 0;
}

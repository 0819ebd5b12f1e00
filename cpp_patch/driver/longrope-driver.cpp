// Runs a model by a script, for `longrope-export verify` and for tests: reads commands from standard
// input, writes the logits of decoded tokens as float32 to a file. Uses the public API only, and the
// longrope part of it only if the library has it, so that one program measures the patched and the
// stock library.
//
//   longrope-driver MODEL LOGITS_FILE < script
//
//   ctx NAME=VALUE ...   n_ctx n_batch n_ubatch n_seq_max unified fa type_k type_v swa_full n_threads
//   add SEQ[,SEQ] POS TOKEN [TOKEN...]     more tokens of the batch
//   decode [COUNT]                         decode the batch; the logits of its last COUNT tokens are written,
//                                          of all without COUNT
//   score TOKEN                            decode the batch; instead of logits, -ln p of the token that follows
//                                          each one is written, TOKEN follows the last
//   run                                    decode the batch without output
//   layers                                 decode the batch; instead of logits, what each layer hands to the next one
//                                          is written: LAYERS x TOKENS x WIDTH values
//   rm SEQ P0 P1 | cp SRC DST P0 P1 | keep SEQ | shift SEQ P0 P1 DELTA | clear
//   switch file|causal|sequence | length SEQ N | must SEQ N
//   save FILE | load FILE | save_seq FILE SEQ | load_seq FILE SEQ
//   tokenize HEX                           of UTF-8 text, as two hexadecimal digits for each byte
//   detokenize TOKEN...                    without special tokens
//
// Prints "vocab TOKENS" at the start, "must 0|1", "tokens ID...", "text HEX", "layers LAYERS WIDTH", and after
// each batch, when all that it writes is written, "time MICROSECONDS" on standard output.

#include "ggml-backend.h"
#include "llama.h"

#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <map>
#include <sstream>
#include <string>
#include <vector>

[[noreturn]] static void fail(const std::string & message) {
    fprintf(stderr, "longrope-driver: %s\n", message.c_str());
    exit(1);
}

template <typename F> static F find_function(const char * name) {
    auto * function = (F) dlsym(RTLD_DEFAULT, name);
    if (!function) {
        fail(std::string(name) + " is not in this library");
    }
    return function;
}

static ggml_type parse_type(const std::string & name) {
    for (const ggml_type type : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }) {
        if (name == ggml_type_name(type)) {
            return type;
        }
    }
    fail("unknown type " + name);
}

static std::vector<uint8_t> read_file(const std::string & path) {
    std::ifstream in(path, std::ios::binary);
    return std::vector<uint8_t>(std::istreambuf_iterator<char>(in), {});
}

static void write_file(const std::string & path, const std::vector<uint8_t> & data) {
    std::ofstream(path, std::ios::binary).write((const char *) data.data(), data.size());
}

static float negative_log_likelihood(const float * logits, int n_vocab, llama_token next) {
    double largest = logits[0];
    for (int i = 1; i < n_vocab; ++i) {
        largest = std::max<double>(largest, logits[i]);
    }
    double sum = 0;
    for (int i = 0; i < n_vocab; ++i) {
        sum += std::exp(logits[i] - largest);
    }
    return std::log(sum) + largest - logits[next];
}

static std::string text_of_hex(const std::string & hex) {
    std::string text;
    for (size_t i = 0; i + 1 < hex.size(); i += 2) {
        text += (char) std::stoi(hex.substr(i, 2), nullptr, 16);
    }
    return text;
}

// Collects the outputs of all layers at every token of a batch. Inner batches come in order.
struct layer_watch {
    bool                              active = false;
    std::map<int, std::vector<float>> outputs;

    static bool callback(ggml_tensor * tensor, bool ask, void * data) {
        auto & watch = *(layer_watch *) data;
        int    layer;
        if (!watch.active || sscanf(tensor->name, "l_out-%d", &layer) != 1) {
            return !ask;  // not wanted; or computed, go on
        }
        if (!ask) {
            auto &       output = watch.outputs[layer];
            const size_t before = output.size();
            output.resize(before + ggml_nelements(tensor));
            ggml_backend_tensor_get(tensor, output.data() + before, 0, ggml_nbytes(tensor));
        }
        return true;
    }
};

struct token {
    llama_token               id;
    llama_pos                 pos;
    std::vector<llama_seq_id> seqs;
};

int main(int argc, char ** argv) {
    if (argc != 3) {
        fail("usage: longrope-driver MODEL LOGITS_FILE < script");
    }
    llama_log_set(
        [](ggml_log_level level, const char * text, void *) {
            if (level >= GGML_LOG_LEVEL_WARN) {
                fputs(text, stderr);
            }
        },
        nullptr);
    ggml_backend_load_all();
    llama_backend_init();

    llama_model * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (!model) {
        fail("cannot load the model");
    }
    const int n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));

    printf("vocab %d\n", n_vocab);
    fflush(stdout);

    std::ofstream      logits(argv[2], std::ios::binary);
    llama_context *    ctx = nullptr;
    layer_watch        watch;
    std::vector<token> batch;

    std::string line;
    while (std::getline(std::cin, line)) {
        std::istringstream in(line);
        std::string        command;
        if (!(in >> command)) {
            continue;
        }
        if (command == "ctx") {
            llama_context_params params = llama_context_default_params();
            params.n_threads = params.n_threads_batch = 2;
            params.n_seq_max                          = 1;
            params.type_k = params.type_v = GGML_TYPE_F32;
            params.flash_attn_type        = LLAMA_FLASH_ATTN_TYPE_DISABLED;
            params.cb_eval                = layer_watch::callback;
            params.cb_eval_user_data      = &watch;
            std::string option;
            while (in >> option) {
                const auto        equals = option.find('=');
                const std::string name   = option.substr(0, equals);
                const std::string value  = option.substr(equals + 1);
                if (name == "type_k") {
                    params.type_k = parse_type(value);
                } else if (name == "type_v") {
                    params.type_v = parse_type(value);
                } else if (name == "unified") {
                    params.kv_unified = value == "1";
                } else if (name == "swa_full") {
                    params.swa_full = value == "1";
                } else if (name == "fa") {
                    params.flash_attn_type =
                        value == "1" ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;
                } else if (name == "n_ctx") {
                    params.n_ctx = std::stoi(value);
                } else if (name == "n_batch") {
                    params.n_batch = std::stoi(value);
                } else if (name == "n_ubatch") {
                    params.n_ubatch = std::stoi(value);
                } else if (name == "n_seq_max") {
                    params.n_seq_max = std::stoi(value);
                } else if (name == "n_threads") {
                    params.n_threads = params.n_threads_batch = std::stoi(value);
                } else {
                    fail("unknown option " + name);
                }
            }
            llama_free(ctx);
            ctx = llama_init_from_model(model, params);
            if (!ctx) {
                fail("cannot make a context");
            }
            continue;
        }
        if (!ctx) {
            fail("the first command must be ctx");
        }
        llama_memory_t memory = llama_get_memory(ctx);
        if (command == "tokenize") {
            std::string hex;
            in >> hex;
            const std::string        text = text_of_hex(hex);
            std::vector<llama_token> ids(text.size() + 8);
            const int n = llama_tokenize(llama_model_get_vocab(model), text.data(), text.size(), ids.data(), ids.size(),
                                         /*add_special=*/true, /*parse_special=*/false);
            printf("tokens");
            for (int i = 0; i < n; ++i) {
                printf(" %d", ids[i]);
            }
            printf("\n");
            fflush(stdout);
        } else if (command == "detokenize") {
            std::vector<llama_token> ids;
            for (llama_token id; in >> id;) {
                ids.push_back(id);
            }
            std::string text(ids.size() * 16 + 16, 0);
            const auto  convert = [&] {
                return llama_detokenize(llama_model_get_vocab(model), ids.data(), ids.size(), text.data(), text.size(),
                                        /*remove_special=*/true, /*unparse_special=*/false);
            };
            int n = convert();
            if (n < 0) {  // the room that it needs
                text.resize(-n);
                n = convert();
            }
            printf("text ");
            for (int i = 0; i < n; ++i) {
                printf("%02x", (unsigned char) text[i]);
            }
            printf("\n");
            fflush(stdout);
        } else if (command == "add") {
            std::string seqs;
            llama_pos   pos;
            in >> seqs >> pos;
            std::vector<llama_seq_id> list;
            std::istringstream        names(seqs);
            for (std::string name; std::getline(names, name, ',');) {
                list.push_back(std::stoi(name));
            }
            for (llama_token id; in >> id;) {
                batch.push_back({ id, pos++, list });
            }
        } else if (command == "decode" || command == "score" || command == "run" || command == "layers") {
            int argument = command == "decode" ? batch.size() : 0;
            in >> argument;
            // without logits, the last layer leaves a token out
            const int first_kept = command == "run" ? batch.size() : command == "decode" ? batch.size() - argument : 0;
            watch                = layer_watch();
            watch.active         = command == "layers";
            llama_batch raw      = llama_batch_init(batch.size(), 0, 16);
            for (const auto & t : batch) {
                const int i     = raw.n_tokens++;
                raw.token[i]    = t.id;
                raw.pos[i]      = t.pos;
                raw.n_seq_id[i] = t.seqs.size();
                for (size_t s = 0; s < t.seqs.size(); ++s) {
                    raw.seq_id[i][s] = t.seqs[s];
                }
                raw.logits[i] = i >= first_kept;
            }
            const int64_t t0     = ggml_time_us();
            const int     status = llama_decode(ctx, raw);
            llama_synchronize(ctx);
            const int64_t t1 = ggml_time_us();
            if (status != 0) {
                fail("llama_decode returned " + std::to_string(status));
            }
            if (command == "layers") {
                const int n_layer = llama_model_n_layer(model), width = llama_model_n_embd(model);
                for (int layer = 0; layer < n_layer; ++layer) {
                    const auto & output = watch.outputs[layer];
                    if (output.size() != (size_t) raw.n_tokens * width) {
                        fail("the output of layer " + std::to_string(layer) + " was not seen");
                    }
                    logits.write((const char *) output.data(), output.size() * sizeof(float));
                }
                printf("layers %d %d\n", n_layer, width);
            }
            for (int i = command == "layers" ? raw.n_tokens : first_kept; i < raw.n_tokens; ++i) {
                const float * row = llama_get_logits_ith(ctx, i);
                if (command == "decode") {
                    logits.write((const char *) row, n_vocab * sizeof(float));
                } else {
                    const bool  last = i + 1 == raw.n_tokens;
                    const float nll  = negative_log_likelihood(row, n_vocab, last ? argument : raw.token[i + 1]);
                    logits.write((const char *) &nll, sizeof(nll));
                }
            }
            logits.flush();
            printf("time %lld\n", (long long) (t1 - t0));
            fflush(stdout);
            llama_batch_free(raw);
            batch.clear();
        } else if (command == "rm") {
            int s, p0, p1;
            in >> s >> p0 >> p1;
            llama_memory_seq_rm(memory, s, p0, p1);
        } else if (command == "cp") {
            int src, dst, p0, p1;
            in >> src >> dst >> p0 >> p1;
            llama_memory_seq_cp(memory, src, dst, p0, p1);
        } else if (command == "keep") {
            int s;
            in >> s;
            llama_memory_seq_keep(memory, s);
        } else if (command == "shift") {
            int s, p0, p1, delta;
            in >> s >> p0 >> p1 >> delta;
            llama_memory_seq_add(memory, s, p0, p1, delta);
        } else if (command == "clear") {
            llama_memory_clear(memory, true);
        } else if (command == "switch") {
            std::string name;
            in >> name;
            const int rule = name == "causal" ? 1 : name == "sequence" ? 2 : 0;
            if (!find_function<bool (*)(llama_context *, int)>("llama_longrope_set_switch")(ctx, rule)) {
                fail("llama_longrope_set_switch returned false");
            }
        } else if (command == "length") {
            int      s;
            uint32_t n;
            in >> s >> n;
            find_function<void (*)(llama_context *, llama_seq_id, uint32_t)>("llama_longrope_set_length")(ctx, s, n);
        } else if (command == "must") {
            int      s;
            uint32_t n;
            in >> s >> n;
            printf("must %d\n", find_function<bool (*)(const llama_context *, llama_seq_id, uint32_t)>(
                                    "llama_longrope_must_reprocess")(ctx, s, n));
            fflush(stdout);
        } else if (command == "save" || command == "save_seq") {
            std::string path;
            in >> path;
            int s = -1;
            in >> s;
            std::vector<uint8_t> data(command == "save" ? llama_state_get_size(ctx) : llama_state_seq_get_size(ctx, s));
            const size_t         n = command == "save" ? llama_state_get_data(ctx, data.data(), data.size()) :
                                                         llama_state_seq_get_data(ctx, data.data(), data.size(), s);
            if (n == 0) {
                fail("cannot save the state");
            }
            data.resize(n);
            write_file(path, data);
        } else if (command == "load" || command == "load_seq") {
            std::string path;
            in >> path;
            int s = -1;
            in >> s;
            const auto   data = read_file(path);
            const size_t n    = command == "load" ? llama_state_set_data(ctx, data.data(), data.size()) :
                                                    llama_state_seq_set_data(ctx, data.data(), data.size(), s);
            if (n == 0) {
                fail("cannot load the state");
            }
        } else {
            fail("unknown command " + command);
        }
    }
    llama_free(ctx);
    llama_model_free(model);
    return 0;
}

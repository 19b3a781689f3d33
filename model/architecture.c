/* The table of architectures, and hyper-parameters from a GGUF's keys. A key that would change the forward pass in a way the program cannot express is refused
 * here: never served wrongly in silence. Owns nothing; runs on the thread that opens the model. */
#include "model/architecture.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "base/check.h"

/* clang-format off */
static const struct architecture table[] = {
    /* name     pairs                 qkv_bias         qk_norm          rope_factors */
    {"llama",  ROPE_PAIRS_ADJACENT, WEIGHT_OPTIONAL, WEIGHT_ABSENT,   WEIGHT_OPTIONAL},
    {"qwen2",  ROPE_PAIRS_HALVES,   WEIGHT_REQUIRED, WEIGHT_ABSENT,   WEIGHT_ABSENT},
    {"qwen3",  ROPE_PAIRS_HALVES,   WEIGHT_ABSENT,   WEIGHT_REQUIRED, WEIGHT_ABSENT},
};
/* clang-format on */
#define ARCHITECTURES (sizeof table / sizeof *table)

/* Keys of other models' mathematics (below "<architecture>."). */
static const char *const refused[] = {"attention.scale",
                                      "attention.causal",
                                      "attention.clamp_kqv",
                                      "attention.max_alibi_bias",
                                      "attn_logit_softcapping",
                                      "final_logit_softcapping",
                                      "embedding_scale",
                                      "residual_scale",
                                      "logit_scale",
                                      "pooling_type"};

struct keys { /* where a reader of many keys stands: the first failure stays, what follows does nothing */
    const struct gguf *gguf;
    const char *prefix;
    char name[128];
    enum status status;
    struct error *error;
};

const struct architecture *architecture_find(const char *name) {
    for (size_t i = 0; i < ARCHITECTURES; i++)
        if (strcmp(table[i].name, name) == 0) return &table[i];
    return NULL;
}

static const char *key_of(struct keys *keys, const char *name) {
    (void)snprintf(keys->name, sizeof keys->name, "%s.%s", keys->prefix, name);
    return keys->name;
}

static void read_u32(struct keys *keys, const char *name, enum gguf_presence presence, uint32_t minimum, uint32_t maximum, uint32_t *value) {
    if (keys->status != STATUS_OK) return;
    bool present = gguf_has(keys->gguf, key_of(keys, name));
    keys->status = gguf_get_u32(keys->gguf, keys->name, presence, value, keys->error);
    if (keys->status == STATUS_OK && present && (*value < minimum || *value > maximum))
        keys->status = error_set(keys->error, STATUS_UNSUPPORTED, "%s: key %s is %" PRIu32 "; supported: %" PRIu32 " to %" PRIu32,
                                 gguf_path(keys->gguf), keys->name, *value, minimum, maximum);
}

/* Exclusive bounds, and finite. */
static void read_f32(struct keys *keys, const char *name, enum gguf_presence presence, double above, double below, double *value) {
    if (keys->status != STATUS_OK) return;
    float number = (float)*value;
    bool present = gguf_has(keys->gguf, key_of(keys, name));
    keys->status = gguf_get_f32(keys->gguf, keys->name, presence, &number, keys->error);
    if (keys->status != STATUS_OK || !present) return;
    *value = (double)number;
    if (!(*value > above && *value < below))
        keys->status = error_set(keys->error, STATUS_UNSUPPORTED, "%s: key %s is %g; supported: above %g and below %g", gguf_path(keys->gguf),
                                 keys->name, *value, above, below);
}

static void refuse(struct keys *keys, const char *words) {
    if (keys->status == STATUS_OK) keys->status = error_set(keys->error, STATUS_UNSUPPORTED, "%s: %s", gguf_path(keys->gguf), words);
}

static void refuse_other_kinds(struct keys *keys) {
    char words[256];
    uint32_t experts = 0;
    read_u32(keys, "expert_count", GGUF_OPTIONAL, 0, UINT32_MAX, &experts);
    if (experts > 0) {
        (void)snprintf(words, sizeof words, "key %s is %" PRIu32 "; mixtures of experts are not supported", key_of(keys, "expert_count"), experts);
        refuse(keys, words);
    }
    for (size_t i = 0; i < sizeof refused / sizeof *refused; i++) {
        if (!gguf_has(keys->gguf, key_of(keys, refused[i]))) continue;
        (void)snprintf(words, sizeof words, "key %s changes the forward pass in a way that is not supported for %s", keys->name, keys->prefix);
        refuse(keys, words);
    }
}

static void read_heads(struct keys *keys, struct hyper_parameters *p) {
    read_u32(keys, "attention.head_count", GGUF_REQUIRED, 1, MODEL_HEADS_MAX, &p->n_heads);
    p->n_kv_heads = p->n_heads;
    read_u32(keys, "attention.head_count_kv", GGUF_OPTIONAL, 1, MODEL_HEADS_MAX, &p->n_kv_heads);
    if (keys->status != STATUS_OK) return;
    char words[256];
    if (p->n_heads % p->n_kv_heads != 0) {
        (void)snprintf(words, sizeof words, "%" PRIu32 " heads are not a multiple of %" PRIu32 " KV heads", p->n_heads, p->n_kv_heads);
        refuse(keys, words);
    }
    if (!gguf_has(keys->gguf, key_of(keys, "attention.key_length")) && p->n_embd % p->n_heads != 0) {
        (void)snprintf(words, sizeof words, "embedding length %" PRIu32 " is not a multiple of %" PRIu32 " heads, and key %s is missing", p->n_embd,
                       p->n_heads, keys->name);
        refuse(keys, words);
    }
    uint32_t value_length = p->head_dim = p->n_embd / p->n_heads;
    read_u32(keys, "attention.key_length", GGUF_OPTIONAL, 2, MODEL_HEAD_DIM_MAX, &p->head_dim);
    read_u32(keys, "attention.value_length", GGUF_OPTIONAL, 2, MODEL_HEAD_DIM_MAX, &value_length);
    if (p->head_dim != value_length || p->head_dim < 2 || p->head_dim % 2 != 0 || p->head_dim > MODEL_HEAD_DIM_MAX) {
        (void)snprintf(words, sizeof words, "head dimensions %" PRIu32 " (keys) and %" PRIu32 " (values); supported: equal, even, 2 to %u",
                       p->head_dim, value_length, MODEL_HEAD_DIM_MAX);
        refuse(keys, words);
    }
}

/* As converters write it: a type, a factor; without a type the factor means linear. */
static void read_scaling(struct keys *keys, struct rope_parameters *rope) {
    struct gguf_string type = {"linear", 6};
    char found[32], words[256];
    read_f32(keys, "rope.scale_linear", GGUF_OPTIONAL, 0, 1e6, &rope->factor); /* the older name */
    read_f32(keys, "rope.scaling.factor", GGUF_OPTIONAL, 0, 1e6, &rope->factor);
    if (keys->status == STATUS_OK) keys->status = gguf_get_string(keys->gguf, key_of(keys, "rope.scaling.type"), GGUF_OPTIONAL, &type, keys->error);
    if (keys->status != STATUS_OK) return;
    if (gguf_string_equals(type, "none")) {
        rope->factor = 1;
    } else if (gguf_string_equals(type, "yarn")) {
        rope->scaling = ROPE_SCALING_YARN;
    } else if (!gguf_string_equals(type, "linear")) {
        (void)snprintf(words, sizeof words, "key %s is \"%s\"; supported: none, linear, yarn (and llama 3's scaling as tensor rope_freqs.weight)",
                       keys->name, gguf_printable(type, found, sizeof found));
        refuse(keys, words);
    } else if (rope->factor != 1) {
        rope->scaling = ROPE_SCALING_LINEAR;
    }
    if (rope->factor < 1) {
        (void)snprintf(words, sizeof words, "rope scaling by a factor of %g; supported: 1 and more", rope->factor);
        refuse(keys, words);
    }
}

static void read_yarn(struct keys *keys, struct rope_parameters *rope, uint32_t context) {
    double attention = 1, extrapolation = 1;
    rope->original_context = context;
    read_u32(keys, "rope.scaling.original_context_length", GGUF_OPTIONAL, 1, MODEL_CONTEXT_MAX, &rope->original_context);
    read_f32(keys, "rope.scaling.yarn_attn_factor", GGUF_OPTIONAL, 0, 1e3, &attention);
    read_f32(keys, "rope.scaling.yarn_beta_fast", GGUF_OPTIONAL, 0, 1e6, &rope->beta_fast);
    read_f32(keys, "rope.scaling.yarn_beta_slow", GGUF_OPTIONAL, 0, 1e6, &rope->beta_slow);
    read_f32(keys, "rope.scaling.yarn_ext_factor", GGUF_OPTIONAL, -2, 2, &extrapolation);
    rope->magnitude *= attention;
    if (extrapolation != 1 || gguf_has(keys->gguf, key_of(keys, "rope.scaling.yarn_log_multiplier")))
        refuse(keys, "rope.scaling.yarn_ext_factor other than 1 and rope.scaling.yarn_log_multiplier are not supported");
}

static void read_rope(struct keys *keys, struct hyper_parameters *p) {
    struct rope_parameters *rope = &p->rope;
    *rope = (struct rope_parameters){.dims = p->head_dim, .base = 10000, .factor = 1, .beta_fast = 32, .beta_slow = 1, .magnitude = 1};
    read_u32(keys, "rope.dimension_count", GGUF_OPTIONAL, 2, MODEL_HEAD_DIM_MAX, &rope->dims);
    read_f32(keys, "rope.freq_base", GGUF_OPTIONAL, 1, 1e12, &rope->base);
    read_f32(keys, "rope.scaling.attn_factor", GGUF_OPTIONAL, 0, 1e3, &rope->magnitude);
    read_scaling(keys, rope);
    if (rope->scaling == ROPE_SCALING_YARN) read_yarn(keys, rope, p->context_train);
    if (keys->status != STATUS_OK) return;
    /* Halves of a part of the head would pair other dimensions than kernels/program.h says. */
    bool whole = p->architecture->rope_pairs == ROPE_PAIRS_HALVES;
    if (rope->dims % 2 != 0 || rope->dims > p->head_dim || (whole && rope->dims != p->head_dim)) {
        char words[256];
        (void)snprintf(words, sizeof words, "key %s is %" PRIu32 "; supported: %s the head dimension %" PRIu32, key_of(keys, "rope.dimension_count"),
                       rope->dims, whole ? "exactly" : "even and at most", p->head_dim);
        refuse(keys, words);
    }
}

/* The embedding has a row for each token of the vocabulary, and a key that says otherwise is wrong. */
static void read_vocabulary(struct keys *keys, struct hyper_parameters *p) {
    struct gguf_array tokens = {0};
    if (keys->status != STATUS_OK) return;
    keys->status = gguf_get_array(keys->gguf, "tokenizer.ggml.tokens", GGUF_REQUIRED, GGUF_STRING, &tokens, keys->error);
    if (keys->status != STATUS_OK) return;
    char words[256];
    if (tokens.count < 1 || tokens.count > MODEL_VOCAB_MAX) {
        (void)snprintf(words, sizeof words, "key tokenizer.ggml.tokens has %zu tokens; supported: 1 to %u", tokens.count, MODEL_VOCAB_MAX);
        refuse(keys, words);
        return;
    }
    uint32_t declared = p->n_vocab = (uint32_t)tokens.count;
    read_u32(keys, "vocab_size", GGUF_OPTIONAL, 1, MODEL_VOCAB_MAX, &declared);
    if (declared != p->n_vocab) {
        (void)snprintf(words, sizeof words, "key %s is %" PRIu32 ", but tokenizer.ggml.tokens has %zu tokens", key_of(keys, "vocab_size"), declared,
                       tokens.count);
        refuse(keys, words);
    }
}

/* Another kind of file in the same container: an adapter, a part of a split model, an architecture that is not in the table. */
static enum status identify(const struct gguf *gguf, const struct architecture **architecture, struct error *error) {
    char found[64];
    struct gguf_string type = {"model", 5}, name;
    enum status status = gguf_get_string(gguf, "general.type", GGUF_OPTIONAL, &type, error);
    if (status != STATUS_OK) return status;
    if (!gguf_string_equals(type, "model"))
        return error_set(error, STATUS_UNSUPPORTED, "%s: key general.type is \"%s\"; supported: model", gguf_path(gguf),
                         gguf_printable(type, found, sizeof found));
    uint16_t parts = 1;
    status = gguf_get_u16(gguf, "split.count", GGUF_OPTIONAL, &parts, error);
    if (status != STATUS_OK) return status;
    if (parts > 1)
        return error_set(error, STATUS_UNSUPPORTED, "%s: one of %u parts of a split model; merge them into one file first", gguf_path(gguf), parts);
    status = gguf_get_string(gguf, "general.architecture", GGUF_REQUIRED, &name, error);
    if (status != STATUS_OK) return status;
    char supported[128] = "";
    for (size_t i = 0, used = 0; i < ARCHITECTURES; i++) {
        if (gguf_string_equals(name, table[i].name)) {
            *architecture = &table[i];
            return STATUS_OK;
        }
        if (used < sizeof supported) used += (size_t)snprintf(supported + used, sizeof supported - used, "%s%s", i ? ", " : "", table[i].name);
    }
    return error_set(error, STATUS_UNSUPPORTED, "%s: architecture \"%s\"; supported: %s", gguf_path(gguf), gguf_printable(name, found, sizeof found),
                     supported);
}

enum status architecture_read(const struct gguf *gguf, struct hyper_parameters *p, struct error *error) {
    *p = (struct hyper_parameters){0};
    enum status status = identify(gguf, &p->architecture, error);
    if (status != STATUS_OK) return status;
    struct keys keys = {.gguf = gguf, .prefix = p->architecture->name, .status = STATUS_OK, .error = error};
    double epsilon = 0;
    refuse_other_kinds(&keys);
    read_u32(&keys, "block_count", GGUF_REQUIRED, 1, MODEL_LAYERS_MAX, &p->n_layers);
    read_u32(&keys, "embedding_length", GGUF_REQUIRED, 1, MODEL_EMBD_MAX, &p->n_embd);
    read_u32(&keys, "feed_forward_length", GGUF_REQUIRED, 1, MODEL_FF_MAX, &p->n_ff);
    read_u32(&keys, "context_length", GGUF_REQUIRED, 1, MODEL_CONTEXT_MAX, &p->context_train);
    read_f32(&keys, "attention.layer_norm_rms_epsilon", GGUF_REQUIRED, 0, 1, &epsilon);
    p->norm_epsilon = (float)epsilon;
    read_heads(&keys, p);
    if (keys.status == STATUS_OK) read_rope(&keys, p);
    read_u32(&keys, "attention.sliding_window", GGUF_OPTIONAL, 0, UINT32_MAX, &p->sliding_window);
    if (p->sliding_window > 0 && p->sliding_window < p->context_train) p->context_train = p->sliding_window;
    read_vocabulary(&keys, p);
    return keys.status;
}

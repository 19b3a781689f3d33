/* Architectures, compiling and opening whole models: tiny files with one thing changed, each refused with the name of the key or tensor; and dummies. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include <math.h>

#include "base/check.h"
#include "model/compile.h"
#include "model/dummy.h"
#include "model/model.h"
#include "tests/support/gguf_writer.h"

struct opened {
    struct buffer file;
    struct gguf *gguf;
    struct hyper_parameters parameters;
    struct program *program;
    struct error error;
};

/* As model.c does, up to the tokenizer. */
static enum status compile(const struct gguf_writer *writer, struct opened *opened) {
    *opened = (struct opened){0};
    gguf_writer_finish(writer, &opened->file);
    enum status status = gguf_parse(opened->file.bytes, opened->file.length, "tiny", &opened->gguf, &opened->error);
    if (status == STATUS_OK) status = architecture_read(opened->gguf, &opened->parameters, &opened->error);
    if (status == STATUS_OK) status = program_compile_gguf(&opened->parameters, opened->gguf, &opened->program, &opened->error);
    return status;
}

static void close_opened(struct opened *opened) {
    program_free(opened->program);
    gguf_close(opened->gguf);
    buffer_done(&opened->file);
}

static void test_every_architecture_compiles(void **state) {
    (void)state;
    static const char *const names[] = {"llama", "qwen2", "qwen3"};
    for (size_t i = 0; i < 3; i++) {
        struct gguf_writer writer = {0};
        struct opened opened;
        gguf_writer_tiny_model(&writer, names[i]);
        if (compile(&writer, &opened) != STATUS_OK) fail_msg("%s: %s", names[i], opened.error.text);
        const struct program *program = opened.program;
        assert_true(program->n_layers == 1 && program->n_embd == 8 && program->n_heads == 2 && program->n_kv_heads == 1 && program->head_dim == 4);
        assert_true(program->n_ff == 16 && program->n_vocab == TINY_MODEL_VOCABULARY && program->context_train == 64 && program->tied_head);
        assert_int_equal(program->n_phases, 7);
        assert_true(program->rope_pairs == (i == 0 ? ROPE_PAIRS_ADJACENT : ROPE_PAIRS_HALVES));
        assert_true(program->attention_scale == 0.5f && program->rope_dims == 4);
        assert_true(fabs(program->rope_frequency[0] - 1) < 1e-12 && fabs(program->rope_frequency[1] - 0.01) < 1e-12);
        const struct phase *in = &program->phases[1];
        assert_true(in->kind == PHASE_ATTN_IN && in->weight[WEIGHT_K].rows == 4 && in->weight[WEIGHT_K].cols == 8);
        assert_true((in->bias[WEIGHT_Q].data != NULL) == (i == 1) && (in->q_norm.data != NULL) == (i == 2));
        close_opened(&opened);
        gguf_writer_done(&writer);
    }
}

/* One change to a llama model, and what is said about it. */
enum change { U32, F32, TEXT, BOOL, DROP, DROP_TENSOR, VECTOR, MATRIX };
static const struct {
    enum change change;
    const char *name;
    double value;
    double other;
    const char *text;
    enum status status;
    const char *words;
} changes[] = {
    {DROP, "general.architecture", 0, 0, NULL, STATUS_INVALID, "general.architecture is missing"},
    {TEXT, "general.architecture", 0, 0, "mamba", STATUS_UNSUPPORTED, "architecture \"mamba\"; supported: llama"},
    {TEXT, "general.architecture", 0, 0, "", STATUS_UNSUPPORTED, "supported: llama"},
    {TEXT, "general.architecture", 0, 0, "lla\nma", STATUS_UNSUPPORTED, "lla?ma"},
    {U32, "general.architecture", 1, 0, NULL, STATUS_INVALID, "has type u32, expected string"},
    {TEXT, "general.type", 0, 0, "adapter", STATUS_UNSUPPORTED, "adapter"},
    {DROP, "llama.block_count", 0, 0, NULL, STATUS_INVALID, "llama.block_count is missing"},
    {U32, "llama.block_count", 0, 0, NULL, STATUS_UNSUPPORTED, "llama.block_count is 0"},
    {U32, "llama.block_count", 4294967295.0, 0, NULL, STATUS_UNSUPPORTED, "llama.block_count"},
    {U32, "llama.block_count", 2, 0, NULL, STATUS_INVALID, "tensor blk.1.attn_norm.weight is missing"},
    {F32, "llama.block_count", 1, 0, NULL, STATUS_INVALID, "has type f32"},
    {U32, "llama.embedding_length", 0, 0, NULL, STATUS_UNSUPPORTED, "embedding_length"},
    {U32, "llama.embedding_length", 4294967295.0, 0, NULL, STATUS_UNSUPPORTED, "embedding_length"},
    {U32, "llama.embedding_length", 16, 0, NULL, STATUS_INVALID, "tensor"},
    {U32, "llama.embedding_length", 7, 0, NULL, STATUS_UNSUPPORTED, "not a multiple of 2 heads"},
    {U32, "llama.feed_forward_length", 0, 0, NULL, STATUS_UNSUPPORTED, "feed_forward_length"},
    {U32, "llama.feed_forward_length", 17, 0, NULL, STATUS_INVALID, "blk.0.ffn_gate.weight"},
    {U32, "llama.context_length", 0, 0, NULL, STATUS_UNSUPPORTED, "context_length"},
    {U32, "llama.attention.head_count", 0, 0, NULL, STATUS_UNSUPPORTED, "head_count"},
    {U32, "llama.attention.head_count", 4294967295.0, 0, NULL, STATUS_UNSUPPORTED, "head_count"},
    {U32, "llama.attention.head_count", 3, 0, NULL, STATUS_UNSUPPORTED, "multiple of 3 heads"},
    {U32, "llama.attention.head_count_kv", 0, 0, NULL, STATUS_UNSUPPORTED, "head_count_kv"},
    {U32, "llama.attention.head_count_kv", 3, 0, NULL, STATUS_UNSUPPORTED, "3 KV heads"},
    {U32, "llama.attention.key_length", 3, 0, NULL, STATUS_UNSUPPORTED, "head dimensions"},
    {U32, "llama.attention.key_length", 1 << 20, 0, NULL, STATUS_UNSUPPORTED, "key_length"},
    {U32, "llama.attention.value_length", 8, 0, NULL, STATUS_UNSUPPORTED, "head dimensions"},
    {F32, "llama.attention.layer_norm_rms_epsilon", 0, 0, NULL, STATUS_UNSUPPORTED, "epsilon"},
    {F32, "llama.attention.layer_norm_rms_epsilon", NAN, 0, NULL, STATUS_UNSUPPORTED, "epsilon"},
    {F32, "llama.attention.layer_norm_rms_epsilon", -1, 0, NULL, STATUS_UNSUPPORTED, "epsilon"},
    {F32, "llama.rope.freq_base", 0, 0, NULL, STATUS_UNSUPPORTED, "freq_base"},
    {F32, "llama.rope.freq_base", INFINITY, 0, NULL, STATUS_UNSUPPORTED, "freq_base"},
    {F32, "llama.rope.freq_base", NAN, 0, NULL, STATUS_UNSUPPORTED, "freq_base"},
    {U32, "llama.rope.dimension_count", 3, 0, NULL, STATUS_UNSUPPORTED, "dimension_count"},
    {U32, "llama.rope.dimension_count", 6, 0, NULL, STATUS_UNSUPPORTED, "dimension_count"},
    {U32, "llama.rope.dimension_count", 0, 0, NULL, STATUS_UNSUPPORTED, "dimension_count"},
    {TEXT, "llama.rope.scaling.type", 0, 0, "longrope", STATUS_UNSUPPORTED, "longrope"},
    {F32, "llama.rope.scaling.factor", 0.5, 0, NULL, STATUS_UNSUPPORTED, "factor"},
    {F32, "llama.rope.scaling.factor", NAN, 0, NULL, STATUS_UNSUPPORTED, "factor"},
    {U32, "llama.expert_count", 8, 0, NULL, STATUS_UNSUPPORTED, "experts"},
    {F32, "llama.attn_logit_softcapping", 50, 0, NULL, STATUS_UNSUPPORTED, "attn_logit_softcapping"},
    {F32, "llama.logit_scale", 2, 0, NULL, STATUS_UNSUPPORTED, "logit_scale"},
    {BOOL, "llama.attention.causal", 0, 0, NULL, STATUS_UNSUPPORTED, "causal"},
    {U32, "llama.vocab_size", 300, 0, NULL, STATUS_UNSUPPORTED, "vocab_size"},
    {DROP, "tokenizer.ggml.tokens", 0, 0, NULL, STATUS_INVALID, "tokenizer.ggml.tokens is missing"},
    {U32, "tokenizer.ggml.tokens", 1, 0, NULL, STATUS_INVALID, "tokenizer.ggml.tokens has type u32"},
    {DROP_TENSOR, "token_embd.weight", 0, 0, NULL, STATUS_INVALID, "tensor token_embd.weight is missing"},
    {DROP_TENSOR, "output_norm.weight", 0, 0, NULL, STATUS_INVALID, "tensor output_norm.weight is missing"},
    {DROP_TENSOR, "blk.0.ffn_down.weight", 0, 0, NULL, STATUS_INVALID, "tensor blk.0.ffn_down.weight is missing"},
    {MATRIX, "token_embd.weight", 8, 257, NULL, STATUS_INVALID, "tensor token_embd.weight"},
    {MATRIX, "blk.0.attn_q.weight", 8, 4, NULL, STATUS_INVALID, "tensor blk.0.attn_q.weight"},
    {MATRIX, "blk.0.attn_q.weight", 4, 8, NULL, STATUS_INVALID, "tensor blk.0.attn_q.weight"},
    {VECTOR, "blk.0.attn_q.weight", 64, 0, NULL, STATUS_INVALID, "tensor blk.0.attn_q.weight"},
    {VECTOR, "blk.0.attn_norm.weight", 7, 0, NULL, STATUS_INVALID, "tensor blk.0.attn_norm.weight"},
    {VECTOR, "output.weight", 8, 0, NULL, STATUS_INVALID, "tensor output.weight"},
    {VECTOR, "rope_freqs.weight", 3, 0, NULL, STATUS_INVALID, "tensor rope_freqs.weight"},
    {VECTOR, "rope_freqs.weight", 2, 0, NULL, STATUS_INVALID, "factor 0 is 0"}, /* the writer's zeros */
    {MATRIX, "blk.0.ffn_gate_inp.weight", 8, 8, NULL, STATUS_UNSUPPORTED, "ffn_gate_inp"},
    {VECTOR, "blk.0.attn_output.bias", 8, 0, NULL, STATUS_UNSUPPORTED, "attn_output.bias"},
    {MATRIX, "blk.1.attn_q.weight", 8, 8, NULL, STATUS_UNSUPPORTED, "blk.1.attn_q.weight"},
};

static void apply(struct gguf_writer *writer, size_t i) {
    const char *name = changes[i].name;
    switch (changes[i].change) {
    case U32: gguf_writer_u32(writer, name, (uint32_t)changes[i].value); break;
    case F32: gguf_writer_f32(writer, name, (float)changes[i].value); break;
    case TEXT: gguf_writer_string(writer, name, changes[i].text); break;
    case BOOL: gguf_writer_bool(writer, name, changes[i].value != 0); break;
    case DROP: gguf_writer_drop(writer, name); break;
    case DROP_TENSOR: gguf_writer_drop_tensor(writer, name); break;
    case VECTOR: gguf_writer_matrix(writer, name, (uint64_t)changes[i].value, 0); break;
    case MATRIX: gguf_writer_matrix(writer, name, (uint64_t)changes[i].value, (uint64_t)changes[i].other); break;
    }
}

static void test_one_thing_wrong_is_named(void **state) {
    (void)state;
    for (size_t i = 0; i < sizeof changes / sizeof *changes; i++) {
        struct gguf_writer writer = {0};
        struct opened opened;
        gguf_writer_tiny_model(&writer, "llama");
        apply(&writer, i);
        enum status status = compile(&writer, &opened);
        if (status != changes[i].status || !strstr(opened.error.text, changes[i].words))
            fail_msg("change %zu, %s: %s \"%s\", expected %s \"%s\"", i, changes[i].name, status_name(status), opened.error.text,
                     status_name(changes[i].status), changes[i].words);
        assert_null(opened.program);
        assert_null(strchr(opened.error.text, '\n'));
        close_opened(&opened);
        gguf_writer_done(&writer);
    }
}

static void test_vectors_are_f32(void **state) {
    (void)state;
    struct gguf_writer writer = {0};
    struct opened opened;
    gguf_writer_tiny_model(&writer, "llama");
    gguf_writer_tensor(&writer, "output_norm.weight", TENSOR_F16, (const uint64_t[]){8}, 1, NULL);
    assert_int_equal(compile(&writer, &opened), STATUS_UNSUPPORTED);
    assert_non_null(strstr(opened.error.text, "tensor output_norm.weight has type F16"));
    close_opened(&opened);
    gguf_writer_done(&writer);
}

static void test_required_weights_of_other_architectures(void **state) {
    (void)state;
    static const char *const cases[][2] = {{"qwen2", "blk.0.attn_k.bias"}, {"qwen3", "blk.0.attn_q_norm.weight"}};
    for (size_t i = 0; i < 2; i++) {
        struct gguf_writer writer = {0};
        struct opened opened;
        gguf_writer_tiny_model(&writer, cases[i][0]);
        gguf_writer_drop_tensor(&writer, cases[i][1]);
        assert_int_equal(compile(&writer, &opened), STATUS_INVALID);
        assert_non_null(strstr(opened.error.text, cases[i][1]));
        close_opened(&opened);
        gguf_writer_done(&writer);
    }
}

static void test_separate_head_and_scaled_positions(void **state) {
    (void)state;
    struct gguf_writer writer = {0};
    struct opened opened;
    gguf_writer_tiny_model(&writer, "llama");
    gguf_writer_matrix(&writer, "output.weight", 8, TINY_MODEL_VOCABULARY);
    gguf_writer_tensor(&writer, "rope_freqs.weight", TENSOR_F32, (const uint64_t[]){2}, 1, (const float[]){1, 8});
    if (compile(&writer, &opened) != STATUS_OK) fail_msg("%s", opened.error.text);
    assert_false(opened.program->tied_head);
    assert_true(fabs(opened.program->rope_frequency[1] - 0.01 / 8) < 1e-12);
    close_opened(&opened);
    gguf_writer_drop_tensor(&writer, "rope_freqs.weight");
    gguf_writer_f32(&writer, "llama.rope.scaling.factor", 4); /* no type: linear */
    if (compile(&writer, &opened) != STATUS_OK) fail_msg("%s", opened.error.text);
    assert_true(fabs(opened.program->rope_frequency[0] - 0.25) < 1e-12 && fabs(opened.program->rope_frequency[1] - 0.0025) < 1e-12);
    close_opened(&opened);
    gguf_writer_done(&writer);
}

static void test_the_window_bounds_the_context(void **state) {
    (void)state;
    struct gguf_writer writer = {0};
    struct opened opened;
    gguf_writer_tiny_model(&writer, "llama");
    gguf_writer_u32(&writer, "llama.attention.sliding_window", 32);
    assert_int_equal(compile(&writer, &opened), STATUS_OK);
    assert_int_equal(opened.program->context_train, 32);
    close_opened(&opened);
    gguf_writer_done(&writer);
}

/* Opening by path */

static void write_file(const char *path, const struct gguf_writer *writer) {
    struct buffer file = {0};
    gguf_writer_finish(writer, &file);
    FILE *out = fopen(path, "w");
    assert_non_null(out);
    assert_int_equal(fwrite(file.bytes, 1, file.length, out), file.length);
    assert_int_equal(fclose(out), 0);
    buffer_done(&file);
}

static void test_open_and_describe(void **state) {
    (void)state;
    char folder[] = "/tmp/kvasir-model-XXXXXX", path[64];
    assert_non_null(mkdtemp(folder));
    (void)snprintf(path, sizeof path, "%s/Tiny-1.gguf", folder);
    struct gguf_writer writer = {0};
    struct error error = {0};
    struct model *model = NULL;
    gguf_writer_tiny_model(&writer, "llama");
    gguf_writer_string(&writer, "tokenizer.chat_template", "{{ messages }}");
    write_file(path, &writer);
    if (model_open(path, &model, &error) != STATUS_OK) fail_msg("%s", error.text);
    assert_string_equal(model_name(model), "Tiny-1");
    assert_string_equal(model_path(model), path);
    assert_string_equal(model_architecture(model), "llama");
    size_t length;
    const char *chat = model_chat_template(model, &length);
    assert_true(length == 14 && memcmp(chat, "{{ messages }}", 14) == 0);
    assert_int_equal(tokenizer_vocabulary(model_tokenizer(model)), TINY_MODEL_VOCABULARY);
    assert_int_equal(model_parameters(model), 258 * 8 + 3 * 8 + 64 + 32 + 32 + 64 + 3 * 128);
    assert_int_equal(model_bytes(model), 4 * model_parameters(model));
    char text[4096] = "";
    FILE *out = fmemopen(text, sizeof text, "w");
    assert_non_null(out);
    model_describe(model, out);
    assert_int_equal(fclose(out), 0);
    assert_true(strstr(text, "llama") && strstr(text, "258 tokens") && strstr(text, "gpt-2"));
    model_close(model);
    model = NULL;
    gguf_writer_string(&writer, "tokenizer.ggml.pre", "unheard-of");
    write_file(path, &writer);
    assert_int_equal(model_open(path, &model, &error), STATUS_UNSUPPORTED);
    assert_non_null(strstr(error.text, "tokenizer.ggml.pre is \"unheard-of\"; supported: default, gpt-2"));
    assert_int_equal(unlink(path), 0);
    assert_int_equal(model_open(path, &model, &error), STATUS_IO);
    assert_null(model);
    assert_int_equal(rmdir(folder), 0);
    gguf_writer_done(&writer);
}

/* Dummies */

static const struct tensor *embedding(const struct model *model) { return &model_program(model)->phases[0].weight[WEIGHT_ONLY]; }

static void test_dummies_follow_their_seed(void **state) {
    (void)state;
    struct model *first = NULL, *same = NULL, *other = NULL;
    struct error error = {0};
    assert_int_equal(model_dummy("tiny", 1, &first, &error), STATUS_OK);
    assert_int_equal(model_dummy("tiny", 1, &same, &error), STATUS_OK);
    assert_int_equal(model_dummy("tiny", 2, &other, &error), STATUS_OK);
    const struct program *program = model_program(first);
    assert_int_equal(program->n_vocab, tokenizer_vocabulary(model_tokenizer(first)));
    assert_int_equal(tokenizer_eos(model_tokenizer(first)), 256);
    size_t bytes = tensor_bytes(embedding(first));
    assert_true(memcmp(embedding(first)->data, embedding(same)->data, bytes) == 0);
    assert_true(memcmp(embedding(first)->data, embedding(other)->data, bytes) != 0);
    size_t length;
    assert_null(model_chat_template(first, &length));
    model_close(first);
    model_close(same);
    model_close(other);
    other = NULL;
    uint64_t taken = 0;
    assert_int_equal(model_dummy_bytes("tiny", &taken, &error), STATUS_OK);
    assert_in_range(taken, bytes, 1 << 20);
    assert_int_equal(model_dummy_bytes("enormous", &taken, &error), STATUS_INVALID);
    assert_int_equal(model_dummy("enormous", 1, &other, &error), STATUS_INVALID);
    assert_non_null(strstr(error.text, "\"enormous\"; known: tiny"));
    assert_null(other);
}

struct told {
    double last;
    uint32_t count;
};

static void tell(void *context, double fraction) {
    struct told *told = context;
    assert_true(fraction > told->last && fraction <= 1);
    told->last = fraction;
    told->count++;
}

/* Told once a tensor, and only while bytes are made: 2 layers of 9 tensors, the embedding, the last norm, the head. */
static void test_dummies_tell_how_far_they_are(void **state) {
    (void)state;
    struct told told = {0};
    struct model *model = NULL, *silent = NULL;
    struct error error = {0};
    assert_int_equal(model_dummy_told("tiny", 1, (struct model_progress){tell, &told}, &model, &error), STATUS_OK);
    assert_true(told.last == 1);
    assert_int_equal(told.count, 2 * 9 + 3);
    assert_int_equal(model_dummy("tiny", 1, &silent, &error), STATUS_OK);
    assert_memory_equal(embedding(model)->data, embedding(silent)->data, tensor_bytes(embedding(model)));
    model_close(model);
    model_close(silent);
    assert_int_equal(model_dummy_told("enormous", 1, (struct model_progress){tell, &told}, &model, &error), STATUS_INVALID);
    assert_int_equal(told.count, 2 * 9 + 3);
}

/* Shapes without weights: nothing of 16 GB is allocated. */
static void test_seeded_dummies(void **state) {
    (void)state;
    struct model *model = NULL;
    struct error error = {0};
    assert_int_equal(model_dummy_seeded("llama-3.1-8b", 7, &model, &error), STATUS_OK);
    const struct program *p = model_program(model);
    assert_int_equal(p->random_seed, 7);
    assert_int_equal(p->n_layers, 32);
    assert_int_equal(p->n_embd, 4096);
    assert_int_equal(p->n_heads, 32);
    assert_int_equal(p->n_kv_heads, 8);
    assert_int_equal(p->head_dim, 128);
    assert_int_equal(p->n_ff, 14336);
    assert_int_equal(p->n_vocab, 128256);
    assert_int_equal(p->context_train, 131072);
    assert_false(p->tied_head);
    assert_true(p->rope_dims == 128 && p->rope_frequency[0] == 1 && fabs(p->rope_frequency[63] - pow(500000, -126.0 / 128)) < 1e-12);
    assert_int_equal(model_parameters(model), 8030261248ull); /* as published */
    uint64_t bytes = 0;
    for (uint32_t i = 0; i < p->n_phases; i++)
        for (int w = 0; w < 3; w++) {
            const struct tensor *tensor = &p->phases[i].weight[w];
            if (!tensor->data) continue;
            assert_int_equal(tensor->type, TENSOR_F16);
            bytes += tensor_bytes(tensor);
        }
    assert_int_equal(bytes + 65 * 4096 * sizeof(float), model_bytes(model));
    model_close(model);
    model = NULL;
    assert_int_equal(model_dummy_seeded("smollm2-135m", 1, &model, &error), STATUS_OK);
    assert_true(model_program(model)->tied_head);
    assert_int_equal(model_parameters(model), 134515008); /* as published */
    model_close(model);
    model = NULL;
    assert_int_equal(model_dummy_seeded("enormous", 1, &model, &error), STATUS_INVALID);
    assert_null(model);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_architecture_compiles),
        cmocka_unit_test(test_one_thing_wrong_is_named),
        cmocka_unit_test(test_vectors_are_f32),
        cmocka_unit_test(test_required_weights_of_other_architectures),
        cmocka_unit_test(test_separate_head_and_scaled_positions),
        cmocka_unit_test(test_the_window_bounds_the_context),
        cmocka_unit_test(test_open_and_describe),
        cmocka_unit_test(test_dummies_follow_their_seed),
        cmocka_unit_test(test_dummies_tell_how_far_they_are),
        cmocka_unit_test(test_seeded_dummies),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

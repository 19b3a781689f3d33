/* See gguf_writer.h. */
#include "tests/support/gguf_writer.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"

static const uint8_t file_numbers[TENSOR_TYPES] = {
    [TENSOR_F32] = 0,  [TENSOR_F16] = 1,   [TENSOR_Q4_0] = 2,  [TENSOR_Q4_1] = 3,  [TENSOR_Q5_0] = 6,  [TENSOR_Q5_1] = 7,
    [TENSOR_Q8_0] = 8, [TENSOR_Q4_K] = 12, [TENSOR_Q5_K] = 13, [TENSOR_Q6_K] = 14, [TENSOR_BF16] = 30,
};

static void drop(struct gguf_record *records, size_t *count, const char *name) {
    for (size_t i = 0; i < *count; i++) {
        if (strcmp(records[i].name, name) != 0) continue;
        buffer_done(&records[i].value);
        memmove(&records[i], &records[i + 1], (*count - i - 1) * sizeof *records);
        (*count)--;
        return;
    }
}

static struct gguf_record *add(struct gguf_record **records, size_t *count, const char *name, uint32_t type) {
    CHECK(strlen(name) < sizeof(*records)->name);
    drop(*records, count, name);
    *records = check_realloc(*records, *count + 1, sizeof **records);
    struct gguf_record *record = &(*records)[(*count)++];
    *record = (struct gguf_record){.type = type};
    strcpy(record->name, name);
    return record;
}

static void put(struct buffer *out, const void *bytes, size_t length) { buffer_append(out, bytes, length); }
static void put_u32(struct buffer *out, uint32_t value) { put(out, &value, sizeof value); }
static void put_u64(struct buffer *out, uint64_t value) { put(out, &value, sizeof value); }
static void put_string(struct buffer *out, const char *text) {
    put_u64(out, strlen(text));
    put(out, text, strlen(text));
}

static void number(struct gguf_writer *writer, const char *key, enum gguf_type type, const void *bytes, size_t length) {
    put(&add(&writer->keys, &writer->n_keys, key, (uint32_t)type)->value, bytes, length);
}

void gguf_writer_bool(struct gguf_writer *writer, const char *key, bool value) { number(writer, key, GGUF_BOOL, &value, 1); }
void gguf_writer_u16(struct gguf_writer *writer, const char *key, uint16_t value) { number(writer, key, GGUF_U16, &value, sizeof value); }
void gguf_writer_u32(struct gguf_writer *writer, const char *key, uint32_t value) { number(writer, key, GGUF_U32, &value, sizeof value); }
void gguf_writer_i32(struct gguf_writer *writer, const char *key, int32_t value) { number(writer, key, GGUF_I32, &value, sizeof value); }
void gguf_writer_u64(struct gguf_writer *writer, const char *key, uint64_t value) { number(writer, key, GGUF_U64, &value, sizeof value); }
void gguf_writer_f32(struct gguf_writer *writer, const char *key, float value) { number(writer, key, GGUF_F32, &value, sizeof value); }

void gguf_writer_string(struct gguf_writer *writer, const char *key, const char *value) {
    put_string(&add(&writer->keys, &writer->n_keys, key, GGUF_STRING)->value, value);
}

void gguf_writer_strings(struct gguf_writer *writer, const char *key, const char *const *values, size_t count) {
    struct buffer *value = &add(&writer->keys, &writer->n_keys, key, GGUF_ARRAY)->value;
    put_u32(value, GGUF_STRING);
    put_u64(value, count);
    for (size_t i = 0; i < count; i++) put_string(value, values[i]);
}

void gguf_writer_numbers(struct gguf_writer *writer, const char *key, enum gguf_type type, const void *values, size_t count) {
    CHECK(type == GGUF_U32 || type == GGUF_I32 || type == GGUF_F32);
    struct buffer *value = &add(&writer->keys, &writer->n_keys, key, GGUF_ARRAY)->value;
    put_u32(value, (uint32_t)type);
    put_u64(value, count);
    put(value, values, count * 4);
}

void gguf_writer_drop(struct gguf_writer *writer, const char *key) { drop(writer->keys, &writer->n_keys, key); }

void gguf_writer_tensor(struct gguf_writer *writer, const char *name, enum tensor_type type, const uint64_t *dims, uint32_t n_dims,
                        const void *data) {
    struct gguf_record *tensor = add(&writer->tensors, &writer->n_tensors, name, file_numbers[type]);
    const struct tensor_type_info *info = tensor_type_info(type);
    size_t elements = 1;
    tensor->n_dims = n_dims;
    for (uint32_t i = 0; i < n_dims; i++) elements *= tensor->dims[i] = dims[i];
    size_t bytes = elements / info->block_size * info->block_bytes;
    char *to = buffer_reserve(&tensor->value, bytes);
    if (data)
        memcpy(to, data, bytes);
    else
        memset(to, 0, bytes);
    tensor->value.length = bytes;
}

void gguf_writer_matrix(struct gguf_writer *writer, const char *name, uint64_t cols, uint64_t rows) {
    uint64_t dims[2] = {cols, rows};
    gguf_writer_tensor(writer, name, TENSOR_F32, dims, rows ? 2 : 1, NULL);
}

void gguf_writer_drop_tensor(struct gguf_writer *writer, const char *name) { drop(writer->tensors, &writer->n_tensors, name); }

void gguf_writer_done(struct gguf_writer *writer) {
    for (size_t i = 0; i < writer->n_keys; i++) buffer_done(&writer->keys[i].value);
    for (size_t i = 0; i < writer->n_tensors; i++) buffer_done(&writer->tensors[i].value);
    free(writer->keys);
    free(writer->tensors);
    *writer = (struct gguf_writer){0};
}

static void pad(struct buffer *file, size_t alignment) {
    while (file->length % alignment != 0) buffer_append_byte(file, 0);
}

void gguf_writer_finish(const struct gguf_writer *writer, struct buffer *file) {
    size_t alignment = writer->alignment ? writer->alignment : 32, offset = 0;
    put(file, "GGUF", 4);
    put_u32(file, writer->version ? writer->version : 3);
    put_u64(file, writer->n_tensors);
    put_u64(file, writer->n_keys);
    for (size_t i = 0; i < writer->n_keys; i++) {
        put_string(file, writer->keys[i].name);
        put_u32(file, writer->keys[i].type);
        put(file, writer->keys[i].value.bytes, writer->keys[i].value.length);
    }
    for (size_t i = 0; i < writer->n_tensors; i++) {
        const struct gguf_record *tensor = &writer->tensors[i];
        put_string(file, tensor->name);
        put_u32(file, tensor->n_dims);
        for (uint32_t dim = 0; dim < tensor->n_dims; dim++) put_u64(file, tensor->dims[dim]);
        put_u32(file, tensor->type);
        put_u64(file, offset);
        offset = (offset + tensor->value.length + alignment - 1) / alignment * alignment;
    }
    pad(file, alignment);
    for (size_t i = 0; i < writer->n_tensors; i++) {
        put(file, writer->tensors[i].value.bytes, writer->tensors[i].value.length);
        pad(file, alignment);
    }
}

static void tiny_vocabulary(struct gguf_writer *writer) {
    char texts[256][3];
    const char *tokens[TINY_MODEL_VOCABULARY];
    int32_t types[TINY_MODEL_VOCABULARY];
    uint32_t others = 256;
    for (uint32_t byte = 0; byte < 256; byte++) { /* bytes as characters: the printable ones are themselves */
        bool printable = (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
        uint32_t codepoint = printable ? byte : others++;
        if (codepoint < 0x80)
            (void)snprintf(texts[byte], sizeof texts[byte], "%c", (char)codepoint);
        else
            (void)snprintf(texts[byte], sizeof texts[byte], "%c%c", (char)(0xc0 | codepoint >> 6), (char)(0x80 | (codepoint & 0x3f)));
        tokens[byte] = texts[byte];
        types[byte] = 1;
    }
    tokens[256] = "he";
    tokens[257] = "<|end|>";
    types[256] = 1;
    types[257] = 3;
    gguf_writer_string(writer, "tokenizer.ggml.model", "gpt2");
    gguf_writer_string(writer, "tokenizer.ggml.pre", "gpt-2");
    gguf_writer_strings(writer, "tokenizer.ggml.tokens", tokens, TINY_MODEL_VOCABULARY);
    gguf_writer_numbers(writer, "tokenizer.ggml.token_type", GGUF_I32, types, TINY_MODEL_VOCABULARY);
    gguf_writer_strings(writer, "tokenizer.ggml.merges", (const char *const[]){"h e"}, 1);
    gguf_writer_u32(writer, "tokenizer.ggml.eos_token_id", 257);
}

static const char *key(char *out, size_t size, const char *architecture, const char *name) {
    (void)snprintf(out, size, "%s.%s", architecture, name);
    return out;
}

void gguf_writer_tiny_model(struct gguf_writer *writer, const char *architecture) {
    char name[96];
    gguf_writer_string(writer, "general.architecture", architecture);
    gguf_writer_u32(writer, key(name, sizeof name, architecture, "block_count"), 1);
    gguf_writer_u32(writer, key(name, sizeof name, architecture, "embedding_length"), 8);
    gguf_writer_u32(writer, key(name, sizeof name, architecture, "feed_forward_length"), 16);
    gguf_writer_u32(writer, key(name, sizeof name, architecture, "context_length"), 64);
    gguf_writer_u32(writer, key(name, sizeof name, architecture, "attention.head_count"), 2);
    gguf_writer_u32(writer, key(name, sizeof name, architecture, "attention.head_count_kv"), 1);
    gguf_writer_f32(writer, key(name, sizeof name, architecture, "attention.layer_norm_rms_epsilon"), 1e-5f);
    tiny_vocabulary(writer);
    gguf_writer_matrix(writer, "token_embd.weight", 8, TINY_MODEL_VOCABULARY);
    gguf_writer_matrix(writer, "output_norm.weight", 8, 0);
    gguf_writer_matrix(writer, "blk.0.attn_norm.weight", 8, 0);
    gguf_writer_matrix(writer, "blk.0.attn_q.weight", 8, 8);
    gguf_writer_matrix(writer, "blk.0.attn_k.weight", 8, 4);
    gguf_writer_matrix(writer, "blk.0.attn_v.weight", 8, 4);
    gguf_writer_matrix(writer, "blk.0.attn_output.weight", 8, 8);
    gguf_writer_matrix(writer, "blk.0.ffn_norm.weight", 8, 0);
    gguf_writer_matrix(writer, "blk.0.ffn_gate.weight", 8, 16);
    gguf_writer_matrix(writer, "blk.0.ffn_up.weight", 8, 16);
    gguf_writer_matrix(writer, "blk.0.ffn_down.weight", 16, 8);
    if (strcmp(architecture, "qwen2") == 0) {
        gguf_writer_matrix(writer, "blk.0.attn_q.bias", 8, 0);
        gguf_writer_matrix(writer, "blk.0.attn_k.bias", 4, 0);
        gguf_writer_matrix(writer, "blk.0.attn_v.bias", 4, 0);
    }
    if (strcmp(architecture, "qwen3") == 0) {
        gguf_writer_matrix(writer, "blk.0.attn_q_norm.weight", 4, 0);
        gguf_writer_matrix(writer, "blk.0.attn_k_norm.weight", 4, 0);
    }
}

void gguf_writer_spm_vocabulary(struct gguf_writer *writer) {
    static const char *const pieces[] = {"\xe2\x96\x81",
                                         "a",
                                         "b",
                                         "ab",
                                         "\xe2\x96\x81"
                                         "a",
                                         "<",
                                         "s",
                                         ">",
                                         "<turn>"};
    static const float piece_scores[] = {-10, -11, -12, -1, -2, -13, -14, -15, 0};
    static char byte_texts[256][7];
    const char *tokens[SPM_TOKENS] = {"<unk>", "<s>", "</s>"};
    int32_t types[SPM_TOKENS] = {2, 3, 3};
    float scores[SPM_TOKENS] = {0};
    for (uint32_t i = 0; i < 256; i++) {
        (void)snprintf(byte_texts[i], sizeof byte_texts[i], "<0x%02X>", i);
        tokens[SPM_BYTES + i] = byte_texts[i];
        types[SPM_BYTES + i] = 6;
    }
    for (uint32_t i = 0; i < SPM_TOKENS - SPM_SPACE; i++) {
        tokens[SPM_SPACE + i] = pieces[i];
        types[SPM_SPACE + i] = i == 8 ? 4 : 1;
        scores[SPM_SPACE + i] = piece_scores[i];
    }
    gguf_writer_string(writer, "tokenizer.ggml.model", "llama");
    gguf_writer_strings(writer, "tokenizer.ggml.tokens", tokens, SPM_TOKENS);
    gguf_writer_numbers(writer, "tokenizer.ggml.token_type", GGUF_I32, types, SPM_TOKENS);
    gguf_writer_numbers(writer, "tokenizer.ggml.scores", GGUF_F32, scores, SPM_TOKENS);
}

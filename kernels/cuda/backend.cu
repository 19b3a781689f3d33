/* The CUDA backend's life and its step. One stream carries everything; submit fills pinned memory and launches, sync waits. Nothing is allocated after prepare but captured graphs.
 *
 * A step's small arrays travel in one copy. Block tables stay on the device from step to step: only ids that are new are sent, and a lane's length is the length when its table was last
 * sent whole plus the rows since, the same for all lanes of a sequence. Steps of decode rows alone are captured into a graph for their bucket of rows and replayed: every size that
 * differs between two steps of a bucket is read from the header in device memory. Thread: the engine's. */
#include "kernels/cuda/cuda.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

extern "C" {
#include "base/clock.h"
extern const struct backend_ops backend_cuda;
}

enum {
    WRITES = 1 << 17,           /* table writes that wait in pinned memory */
    HEAD_ROWS_MAX = 1024,       /* rows whose logits are in memory at once, at most */
    LOGITS_BYTES = 512 << 20,   /* and what they may take, at most, if that is one row at least */
    GRAPH_ROWS_MAX = 512,       /* larger steps do not wait for launches */
    GRAPHS = 64,
    SPREAD_THREADS = 256,
};

struct table_write {
    uint32_t at, value; /* of `tables`, lengths behind the ids */
};

/* What the device already has of the tables. */
struct tables_host {
    uint32_t *changes;     /* [n_tables] batch_sequence.table_changes of what is there; 0: nothing */
    uint32_t *first_slots; /* [n_tables] lane 0's length when lengths were sent */
    uint32_t *room;        /* [n_tables] rows that every lane can take in the blocks sent, beyond the end of the last step */
    uint32_t *end;         /* [n_tables] lane 0's length at the end of the last step */
    uint32_t *blocks;      /* [n_tables][n_lanes] ids sent */
    struct table_write *writes, *writes_device; /* [WRITES] */
    uint32_t n_writes;
    cudaEvent_t writes_read; /* the pinned writes may be filled again */
};

/* Graphs of decode steps, by bucket. */
struct step_graph {
    uint32_t rows;
    cudaGraphExec_t exec;
};

struct cuda_private {
    struct cuda cuda; /* first: the backend's address */
    struct tables_host tables_host;
    struct device_arena weights, pool, rings, scratch;
    struct step_graph graphs[GRAPHS];
    uint32_t n_graphs;
    cudaEvent_t *phase_events; /* [n_phases + 1] where phase_ns is asked for */
};

static struct cuda_private *private_of(struct cuda *cuda) { return (struct cuda_private *)(void *)cuda; }

enum status cuda_status(struct error *error, cudaError_t result, const char *what) {
    if (result == cudaSuccess) return STATUS_OK;
    int length = 0;
    while (what[length] && what[length] != '(') length++;
    return error_set(error, STATUS_DEVICE, "CUDA: %.*s: %s", length, what, cudaGetErrorString(result));
}

void cuda_check(cudaError_t result, const char *what, const char *file, int line) {
    if (result == cudaSuccess) return;
    (void)fprintf(stderr, "CUDA: %s: %s\n", what, cudaGetErrorString(result));
    check_failed(file, line, "the device works");
}

/* ---- sizes ---- */

static size_t kv_bytes(uint32_t d, enum kv_dtype dtype) { return 2 * (size_t)BLOCK_TOKENS * d * (dtype == KV_Q8 ? 1 : dtype == KV_F32 ? 4 : 2); }

static size_t cuda_block_bytes(const struct program *program, enum kv_dtype dtype) {
    if (dtype != KV_F16 && dtype != KV_BF16 && dtype != KV_Q8) return 0;
    const size_t scales = dtype == KV_Q8 ? 2 * BLOCK_TOKENS * sizeof(float) : 0;
    return kv_bytes(program->head_dim, dtype) + scales + BLOCK_TOKENS * (sizeof(int32_t) + sizeof(uint64_t));
}

static uint32_t head_rows_max(const struct program *program, const struct backend_limits *limits) {
    size_t rows = (size_t)LOGITS_BYTES / (program->n_vocab * sizeof(float));
    if (rows > HEAD_ROWS_MAX) rows = HEAD_ROWS_MAX;
    if (rows < SKINNY_ROWS) rows = SKINNY_ROWS;
    if (rows > limits->max_samples) rows = limits->max_samples;
    return (uint32_t)(rows ? rows : 1);
}

/* A backend without memory: enough to count with. */
static void begin(struct cuda *cuda, const struct program *program, const struct backend_limits *limits) {
    memset(cuda, 0, sizeof *cuda);
    cuda->program = program;
    cuda->limits = *limits;
    cuda->deterministic = limits->deterministic;
    cuda->n_lanes = program_lanes(program);
    cuda->group = program->n_heads / program->n_kv_heads;
    cuda->n_q = program->n_heads * program->head_dim;
    cuda->n_kv = program->n_kv_heads * program->head_dim;
    cuda->n_tables = limits->n_tables ? limits->n_tables : limits->max_sequences;
    cuda->lane_blocks = limits->table_blocks ? limits->table_blocks : limits->n_blocks;
    cuda->max_tiles = div_up(limits->max_rows * cuda->group, PREFILL_QUERIES) + limits->max_sequences;
    cuda->rows_padded = div_up(limits->max_rows, 64) * 64;
    cuda->max_head_rows = head_rows_max(program, limits);
    cuda->pool.dtype = limits->kv_dtype;
    cuda->pool.d = program->head_dim;
    cuda->pool.n_blocks = limits->n_blocks;
    cuda->pool.block_bytes = kv_bytes(program->head_dim, limits->kv_dtype);
    cuda->layers = (struct device_layer *)check_calloc(program->n_layers, sizeof *cuda->layers);
}

static size_t ids_of_tables(const struct cuda *cuda) { return (size_t)cuda->n_tables * cuda->n_lanes * cuda->lane_blocks; }

/* Both sides of a step's arrays; `base` NULL: count. Returns bytes. The tiles come last, so that a step without them copies less. */
static size_t lay_out_view(const struct cuda *cuda, struct step_view *view, uint8_t *base) {
    const struct backend_limits *limits = &cuda->limits;
    struct device_arena arena = {base, 0};
    view->header = (struct step_header *)device_take(&arena, 1, sizeof *view->header);
    view->sequences = (struct step_sequence *)device_take(&arena, limits->max_sequences, sizeof *view->sequences);
    view->decode = (uint32_t *)device_take(&arena, limits->max_sequences, sizeof *view->decode);
    view->head_rows = (uint32_t *)device_take(&arena, limits->max_samples, sizeof *view->head_rows);
    view->sample_head_row = (uint32_t *)device_take(&arena, limits->max_samples, sizeof *view->sample_head_row);
    view->tokens = (int32_t *)device_take(&arena, limits->max_rows, sizeof *view->tokens);
    view->positions = (int32_t *)device_take(&arena, limits->max_rows, sizeof *view->positions);
    view->row_sequence = (uint32_t *)device_take(&arena, limits->max_rows, sizeof *view->row_sequence);
    view->tiles = (struct prefill_tile *)device_take(&arena, cuda->max_tiles, sizeof *view->tiles);
    return arena.used;
}

static void lay_out_pool(struct cuda *cuda, struct device_arena *arena) {
    const size_t slots = (size_t)cuda->limits.n_blocks * BLOCK_TOKENS;
    cuda->pool.kv = (uint8_t *)device_take(arena, cuda->limits.n_blocks, cuda->pool.block_bytes);
    cuda->pool.scales = cuda->pool.dtype == KV_Q8 ? (float *)device_take(arena, 2 * slots, sizeof(float)) : NULL;
    cuda->pool.positions = (int32_t *)device_take(arena, slots, sizeof(int32_t));
    cuda->pool.accumulated = cuda->limits.accumulators ? (uint64_t *)device_take(arena, slots, sizeof(uint64_t)) : NULL;
}

static void lay_out_rings(struct cuda *cuda, struct device_arena *arena) {
    const struct backend_limits *limits = &cuda->limits;
    const size_t rows = (size_t)limits->n_rings * cuda->program->n_layers * limits->ring_rows, sinks = (size_t)limits->n_rings * cuda->n_lanes * limits->sink_slots;
    cuda->ring_queries = (uint16_t *)device_take(arena, rows * cuda->n_q, sizeof(uint16_t));
    cuda->ring_sinks = (float *)device_take(arena, sinks * cuda->program->head_dim, sizeof(float));
}

static void lay_out_scratch(struct cuda *cuda, struct device_arena *arena) {
    const struct program *p = cuda->program;
    const size_t rows = cuda->rows_padded, head_rows = div_up(cuda->max_head_rows, 64) * 64;
    struct tables_host *tables = cuda->tables_host;
    struct step_view counted;
    cuda->tables = (uint32_t *)device_take(arena, ids_of_tables(cuda) + (size_t)cuda->n_tables * cuda->n_lanes, sizeof(uint32_t));
    tables->writes_device = (struct table_write *)device_take(arena, WRITES, sizeof(struct table_write));
    cuda->staging_bytes = lay_out_view(cuda, &counted, NULL);
    cuda->staging_device = device_take(arena, cuda->staging_bytes, 1);
    cuda->dev.lane_tokens = (uint32_t *)device_take(arena, (size_t)cuda->limits.max_sequences * cuda->n_lanes, sizeof(uint32_t));
    cuda->rope_frequency = (double *)device_take(arena, p->rope_dims / 2 + 1, sizeof(double));
    cuda->rope = (float2 *)device_take(arena, rows * (p->rope_dims / 2), sizeof(float2));
    cuda->x = (float *)device_take(arena, rows * p->n_embd, sizeof(float));
    cuda->h = (__half *)device_take(arena, rows * p->n_embd, sizeof(__half));
    cuda->qkv = (float *)device_take(arena, rows * (cuda->n_q + 2 * cuda->n_kv), sizeof(float));
    cuda->q = (uint16_t *)device_take(arena, rows * cuda->n_q, sizeof(uint16_t));
    cuda->a = (__half *)device_take(arena, rows * cuda->n_q, sizeof(__half));
    cuda->gate_up = (__half *)device_take(arena, rows * 2 * p->n_ff, sizeof(__half));
    cuda->g = (__half *)device_take(arena, rows * p->n_ff, sizeof(__half));
    cuda->row_max = (float *)device_take(arena, cuda->limits.accumulators ? rows * p->n_heads : 0, sizeof(float));
    cuda->row_sum = (float *)device_take(arena, cuda->limits.accumulators ? rows * p->n_heads : 0, sizeof(float));
    cuda->head_h = (__half *)device_take(arena, head_rows * p->n_embd, sizeof(__half));
    cuda->logits = (float *)device_take(arena, head_rows * p->n_vocab, sizeof(float));
    products_lay_out(cuda, arena);
    attention_lay_out(cuda, arena);
    services_lay_out(cuda, arena);
    sampling_lay_out(cuda, arena);
}

static uint32_t cuda_memory_plan(const struct program *program, const struct backend_limits *limits, struct memory_line *lines, uint32_t max) {
    struct cuda_private *counted = (struct cuda_private *)check_calloc(1, sizeof *counted);
    struct device_arena weights = {}, rings = {}, scratch = {};
    begin(&counted->cuda, program, limits);
    counted->cuda.tables_host = &counted->tables_host;
    weights_lay_out(&counted->cuda, &weights);
    lay_out_rings(&counted->cuda, &rings);
    lay_out_scratch(&counted->cuda, &scratch);
    const struct memory_line all[] = {{"weights", 1, weights.used}, {"scratch", 1, scratch.used}, {"query rings", 1, rings.used}};
    free(counted->cuda.layers);
    free(counted);
    uint32_t n = 0;
    for (; n < sizeof all / sizeof *all && n < max; n++) lines[n] = all[n];
    return n;
}

static uint64_t cuda_weight_bytes(const struct program *program, const struct backend_limits *limits) {
    struct cuda_private *counted = (struct cuda_private *)check_calloc(1, sizeof *counted);
    struct device_arena weights = {};
    begin(&counted->cuda, program, limits);
    counted->cuda.tables_host = &counted->tables_host;
    weights_lay_out(&counted->cuda, &weights);
    const uint64_t bytes = cuda_laid_out_weight_bytes(&counted->cuda);
    free(counted->cuda.layers);
    free(counted);
    return bytes;
}

/* ---- life ---- */

static void cuda_close(struct backend *backend) {
    if (!backend) return;
    struct cuda *cuda = cuda_of(backend);
    struct cuda_private *own = private_of(cuda);
    if (cuda->stream) (void)cudaStreamSynchronize(cuda->stream);
    for (uint32_t i = 0; i < own->n_graphs; i++) (void)cudaGraphExecDestroy(own->graphs[i].exec);
    for (uint32_t i = 0; own->phase_events && i <= cuda->program->n_phases; i++) (void)cudaEventDestroy(own->phase_events[i]);
    free(own->phase_events);
    sampling_close(cuda);
    services_close(cuda);
    attention_close(cuda);
    products_close(cuda);
    struct device_arena *arenas[] = {&own->weights, &own->pool, &own->rings, &own->scratch};
    for (size_t i = 0; i < sizeof arenas / sizeof *arenas; i++) (void)cudaFree(arenas[i]->base);
    (void)cudaFreeHost(cuda->staging_host);
    struct tables_host *tables = &own->tables_host;
    (void)cudaFreeHost(tables->writes);
    if (tables->writes_read) (void)cudaEventDestroy(tables->writes_read);
    free(tables->changes);
    free(tables->first_slots);
    free(tables->room);
    free(tables->end);
    free(tables->blocks);
    if (cuda->stream) (void)cudaStreamDestroy(cuda->stream);
    free(cuda->layers);
    free(own);
}

/* What this backend cannot do is said before anything is taken. */
static enum status check_program(const struct cuda *cuda, struct error *error) {
    const struct program *p = cuda->program;
    if (cuda_block_bytes(p, cuda->limits.kv_dtype) == 0)
        return error_set(error, STATUS_UNSUPPORTED, "cuda backend: KV dtype %s; f16, bf16 and q8 are supported", kv_dtype_name(cuda->limits.kv_dtype));
    if (p->n_ff % 2 != 0) return error_set(error, STATUS_UNSUPPORTED, "cuda backend: n_ff %u; even numbers are supported", p->n_ff);
    if (ids_of_tables(cuda) + (size_t)cuda->n_tables * cuda->n_lanes > UINT32_MAX)
        return error_set(error, STATUS_UNSUPPORTED, "cuda backend: block tables of %u sequences, %u lanes, %u blocks exceed 2^32 entries", cuda->n_tables, cuda->n_lanes, cuda->lane_blocks);
    return STATUS_OK;
}

static enum status open_device(struct cuda *cuda, struct error *error) {
    const enum status status = cuda_find_device(cuda->limits.device, &cuda->properties, error);
    if (status != STATUS_OK) return status;
    cuda->device = (int)cuda->limits.device;
    CUDA_TRY(error, cudaSetDevice(cuda->device));
    CUDA_TRY(error, cudaStreamCreateWithFlags(&cuda->stream, cudaStreamNonBlocking));
    return STATUS_OK;
}

static enum status open_arena(struct device_arena *arena, size_t bytes, const char *what, struct error *error) {
    if (cudaMalloc(&arena->base, bytes ? bytes : 1) == cudaSuccess) {
        arena->used = 0;
        return STATUS_OK;
    }
    (void)cudaGetLastError();
    size_t available = 0, total = 0;
    (void)cudaMemGetInfo(&available, &total);
    return error_set(error, STATUS_NO_MEMORY, "CUDA device: %s takes %.1f MiB, %.1f of %.1f MiB are free", what, (double)bytes / 0x1p20, (double)available / 0x1p20, (double)total / 0x1p20);
}

static enum status open_memory(struct cuda *cuda, struct error *error) {
    struct cuda_private *own = private_of(cuda);
    const struct {
        struct device_arena *arena;
        void (*lay_out)(struct cuda *, struct device_arena *);
        const char *what;
    } parts[] = {{&own->weights, weights_lay_out, "weights"}, {&own->pool, lay_out_pool, "KV pool"}, {&own->rings, lay_out_rings, "query rings"}, {&own->scratch, lay_out_scratch, "scratch"}};
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        struct device_arena count = {};
        parts[i].lay_out(cuda, &count);
        const enum status status = open_arena(parts[i].arena, count.used, parts[i].what, error);
        if (status != STATUS_OK) return status;
        parts[i].lay_out(cuda, parts[i].arena);
    }
    CUDA_TRY(error, cudaMemsetAsync(own->pool.base, 0, own->pool.used, cuda->stream)); /* finite */
    CUDA_TRY(error, cudaMemsetAsync(own->rings.base, 0, own->rings.used, cuda->stream));
    CUDA_TRY(error, cudaMemsetAsync(own->scratch.base, 0, own->scratch.used, cuda->stream));
    CUDA_TRY(error, cudaMallocHost(&cuda->staging_host, cuda->staging_bytes));
    memset(cuda->staging_host, 0, cuda->staging_bytes);
    uint32_t *lane_tokens = cuda->dev.lane_tokens;
    (void)lay_out_view(cuda, &cuda->host, (uint8_t *)cuda->staging_host);
    (void)lay_out_view(cuda, &cuda->dev, (uint8_t *)cuda->staging_device);
    cuda->dev.lane_tokens = lane_tokens;
    struct tables_host *tables = &own->tables_host;
    CUDA_TRY(error, cudaMallocHost(&tables->writes, WRITES * sizeof(struct table_write)));
    CUDA_TRY(error, cudaEventCreateWithFlags(&tables->writes_read, cudaEventDisableTiming));
    tables->changes = (uint32_t *)check_calloc(cuda->n_tables, sizeof(uint32_t));
    tables->first_slots = (uint32_t *)check_calloc(cuda->n_tables, sizeof(uint32_t));
    tables->room = (uint32_t *)check_calloc(cuda->n_tables, sizeof(uint32_t));
    tables->end = (uint32_t *)check_calloc(cuda->n_tables, sizeof(uint32_t));
    tables->blocks = (uint32_t *)check_calloc((size_t)cuda->n_tables * cuda->n_lanes, sizeof(uint32_t));
    CUDA_TRY(error, cudaMemcpyAsync(cuda->rope_frequency, cuda->program->rope_frequency, cuda->program->rope_dims / 2 * sizeof(double), cudaMemcpyHostToDevice, cuda->stream));
    return STATUS_OK;
}

static enum status open_phase_events(struct cuda *cuda, struct error *error) {
    if (!cuda->limits.phase_ns) return STATUS_OK;
    struct cuda_private *own = private_of(cuda);
    own->phase_events = (cudaEvent_t *)check_calloc(cuda->program->n_phases + 1, sizeof(cudaEvent_t));
    for (uint32_t i = 0; i <= cuda->program->n_phases; i++) CUDA_TRY(error, cudaEventCreate(&own->phase_events[i]));
    return STATUS_OK;
}

static enum status open_all(struct cuda *cuda, struct error *error) {
    enum status status = check_program(cuda, error);
    if (status == STATUS_OK) status = open_device(cuda, error);
    if (status == STATUS_OK) status = open_memory(cuda, error);
    if (status == STATUS_OK) status = products_open(cuda, error);
    if (status == STATUS_OK) status = attention_open(cuda, error);
    if (status == STATUS_OK) status = services_open(cuda, error);
    if (status == STATUS_OK) status = sampling_open(cuda, error);
    if (status == STATUS_OK) status = open_phase_events(cuda, error);
    if (status == STATUS_OK) status = weights_load(cuda, error);
    if (status != STATUS_OK) return status;
    CUDA_TRY(error, cudaStreamSynchronize(cuda->stream));
    return STATUS_OK;
}

static enum status cuda_prepare(const struct program *program, const struct backend_limits *limits, struct backend **backend, struct error *error) {
    struct cuda_private *own = (struct cuda_private *)check_calloc(1, sizeof *own);
    struct cuda *cuda = &own->cuda;
    begin(cuda, program, limits);
    cuda->tables_host = &own->tables_host;
    cuda->backend.ops = &backend_cuda;
    const enum status status = open_all(cuda, error);
    if (status != STATUS_OK) {
        cuda_close(&cuda->backend);
        return status;
    }
    (void)snprintf(cuda->description, sizeof cuda->description, "cuda %d, %s (%d.%d), weights %s%s", cuda->device, cuda->properties.name, cuda->properties.major, cuda->properties.minor,
                   cuda->layers[0].o.type == TENSOR_F16 ? "f16" : tensor_type_info(cuda->layers[0].o.type)->name, cuda->deterministic ? ", deterministic" : "");
    *backend = &cuda->backend;
    return STATUS_OK;
}

static const char *cuda_describe(const struct backend *backend) { return ((const struct cuda *)(const void *)backend)->description; }

/* ---- tables ---- */

static __global__ void write_tables(const struct table_write *writes, uint32_t n, uint32_t *tables) {
    const uint32_t i = blockIdx.x * SPREAD_THREADS + threadIdx.x;
    if (i < n) tables[writes[i].at] = writes[i].value;
}

static enum status send_writes(struct cuda *cuda, struct error *error) {
    struct tables_host *tables = cuda->tables_host;
    const uint32_t n = tables->n_writes;
    if (n == 0) return STATUS_OK;
    CUDA_TRY(error, cudaMemcpyAsync(tables->writes_device, tables->writes, n * sizeof(struct table_write), cudaMemcpyHostToDevice, cuda->stream));
    write_tables<<<div_up(n, SPREAD_THREADS), SPREAD_THREADS, 0, cuda->stream>>>(tables->writes_device, n, cuda->tables);
    CUDA_TRY(error, cudaEventRecord(tables->writes_read, cuda->stream));
    tables->n_writes = 0;
    return STATUS_OK;
}

/* The pinned writes of the step before were read before its results came, so waiting is needed only within one step that fills them more than once. */
static enum status add_write(struct cuda *cuda, uint32_t at, uint32_t value, struct error *error) {
    struct tables_host *tables = cuda->tables_host;
    if (tables->n_writes == WRITES) {
        const enum status status = send_writes(cuda, error);
        if (status != STATUS_OK) return status;
        CUDA_TRY(error, cudaEventSynchronize(tables->writes_read));
    }
    tables->writes[tables->n_writes++] = (struct table_write){at, value};
    return STATUS_OK;
}

/* Ids that the device lacks of one sequence, and lengths if it is new there. */
static enum status send_table(struct cuda *cuda, const struct batch *batch, const struct batch_sequence *sequence, uint32_t table, uint32_t changes, uint32_t *advance, struct error *error) {
    struct tables_host *tables = cuda->tables_host;
    const uint32_t first = sequence->lane_tokens[0];
    const bool known = changes != 0 && tables->changes[table] == changes && first >= tables->first_slots[table];
    const uint32_t lengths = (uint32_t)ids_of_tables(cuda) + table * cuda->n_lanes;
    uint32_t *blocks = tables->blocks + (size_t)table * cuda->n_lanes;
    if (known && first >= tables->end[table] && first - tables->end[table] + sequence->n_rows <= tables->room[table]) {
        tables->room[table] -= first - tables->end[table] + sequence->n_rows;
        tables->end[table] = first + sequence->n_rows;
        *advance = first - tables->first_slots[table];
        return STATUS_OK;
    }
    uint32_t room = UINT32_MAX;
    for (uint32_t lane = 0; lane < cuda->n_lanes; lane++) {
        const uint32_t end = sequence->lane_tokens[lane] + sequence->n_rows, needed = div_up(end, BLOCK_TOKENS);
        const uint32_t at = (table * cuda->n_lanes + lane) * cuda->lane_blocks, *ids = batch->block_ids + sequence->lane_first[lane];
        CHECK(needed <= cuda->lane_blocks);
        enum status status = known ? STATUS_OK : add_write(cuda, lengths + lane, sequence->lane_tokens[lane], error);
        for (uint32_t i = known ? blocks[lane] : 0; i < needed && status == STATUS_OK; i++) {
            CHECK(ids[i] < cuda->limits.n_blocks);
            status = add_write(cuda, at + i, ids[i], error);
        }
        if (status != STATUS_OK) return status;
        if (!known || blocks[lane] < needed) blocks[lane] = needed;
        const uint32_t left = blocks[lane] * BLOCK_TOKENS - end;
        if (left < room) room = left;
    }
    if (!known) tables->first_slots[table] = first;
    tables->changes[table] = changes;
    tables->room[table] = room;
    tables->end[table] = first + sequence->n_rows;
    *advance = first - tables->first_slots[table];
    return STATUS_OK;
}

/* ---- the step ---- */

/* lane_tokens of the step's sequences, from the lengths that are on the device. */
static __global__ void spread_lengths(const struct step_header *header, const struct step_sequence *sequences, const uint32_t *lengths, uint32_t n_lanes, uint32_t *lane_tokens) {
    const uint32_t lane = blockIdx.x * SPREAD_THREADS + threadIdx.x, s = blockIdx.y;
    if (s >= header->n_sequences || lane >= n_lanes) return;
    lane_tokens[(size_t)s * n_lanes + lane] = lengths[(size_t)sequences[s].table * n_lanes + lane] + sequences[s].advance;
}

static void stage_rows(struct cuda *cuda, const struct batch *batch) {
    const struct backend_limits *limits = &cuda->limits;
    struct step_view *view = &cuda->host;
    CHECK(batch->n_rows >= 1 && batch->n_rows <= limits->max_rows && batch->n_sequences <= limits->max_sequences && batch->n_samples <= limits->max_samples);
    memcpy(view->tokens, batch->tokens, batch->n_rows * sizeof *view->tokens);
    memcpy(view->positions, batch->positions, batch->n_rows * sizeof *view->positions);
    struct step_header header = {};
    header.n_rows = batch->n_rows;
    header.n_sequences = batch->n_sequences;
    header.n_samples = batch->n_samples;
    uint32_t row = 0;
    for (uint32_t s = 0; s < batch->n_sequences; s++) {
        const struct batch_sequence *sequence = &batch->sequences[s];
        CHECK(sequence->first_row == row && sequence->n_rows >= 1 && sequence->n_rows <= batch->n_rows - row && sequence->ring <= limits->n_rings);
        for (uint32_t i = 0; i < sequence->n_rows; i++) view->row_sequence[row++] = s;
        const uint32_t queries = sequence->n_rows * cuda->group;
        header.any_accumulates |= sequence->accumulate;
        if (queries <= TILE_QUERIES) {
            view->decode[header.n_decode++] = s;
            continue;
        }
        for (uint32_t first = (queries - 1) / PREFILL_QUERIES * PREFILL_QUERIES;; first -= PREFILL_QUERIES) { /* those that see most first */
            view->tiles[header.n_tiles++] = (struct prefill_tile){s, first};
            if (first == 0) break;
        }
    }
    CHECK(row == batch->n_rows);
    for (uint32_t i = 0; i < batch->n_samples; i++) {
        const uint32_t sampled = batch->samples[i].row;
        CHECK(sampled < batch->n_rows && (i == 0 || sampled >= batch->samples[i - 1].row));
        if (i == 0 || sampled != batch->samples[i - 1].row) view->head_rows[header.n_head_rows++] = sampled;
        view->sample_head_row[i] = header.n_head_rows - 1;
    }
    *view->header = header;
}

static enum status stage_tables(struct cuda *cuda, const struct batch *batch, struct error *error) {
    bool versions = true;
    for (uint32_t s = 0; s < batch->n_sequences; s++) versions = versions && batch->sequences[s].table_changes != 0;
    for (uint32_t s = 0; s < batch->n_sequences; s++) {
        const struct batch_sequence *sequence = &batch->sequences[s];
        const uint32_t table = versions ? sequence->table : s;
        CHECK(table < cuda->n_tables);
        struct step_sequence staged = {};
        staged.first_row = sequence->first_row;
        staged.n_rows = sequence->n_rows;
        staged.table = table;
        staged.ring = sequence->ring;
        staged.accumulate = sequence->accumulate;
        const enum status status = send_table(cuda, batch, sequence, table, versions ? sequence->table_changes : 0, &staged.advance, error);
        if (status != STATUS_OK) return status;
        cuda->host.sequences[s] = staged;
    }
    return send_writes(cuda, error);
}

static enum status send_staging(struct cuda *cuda, struct error *error) {
    const uint8_t *base = (const uint8_t *)cuda->staging_host;
    const uint8_t *end = cuda->host.header->n_tiles ? (const uint8_t *)(cuda->host.tiles + cuda->host.header->n_tiles) : (const uint8_t *)(cuda->host.row_sequence + cuda->host.header->n_rows);
    CUDA_TRY(error, cudaMemcpyAsync(cuda->staging_device, base, (size_t)(end - base), cudaMemcpyHostToDevice, cuda->stream));
    return STATUS_OK;
}

static void mark(struct cuda *cuda, uint32_t phase) {
    struct cuda_private *own = private_of(cuda);
    if (own->phase_events) CUDA_CHECK(cudaEventRecord(own->phase_events[phase], cuda->stream));
}

/* The part of the step's samples whose head rows are in it. */
static void cut_part(const struct cuda *cuda, uint32_t first, struct step_shape *part) {
    const uint32_t *map = cuda->host.sample_head_row, n = cuda->host.header->n_samples, end = first + part->head_rows;
    part->first_head_row = first;
    part->first_sample = 0;
    while (part->first_sample < n && map[part->first_sample] < first) part->first_sample++;
    part->samples = 0;
    while (part->first_sample + part->samples < n && map[part->first_sample + part->samples] < end) part->samples++;
}

static void tap(struct cuda *cuda, const struct step_shape *part) {
    const size_t n_vocab = cuda->program->n_vocab;
    for (uint32_t i = part->first_sample; cuda->tap && i < part->first_sample + part->samples; i++) {
        const float *row = cuda->logits + (cuda->host.sample_head_row[i] - part->first_head_row) * n_vocab;
        CUDA_CHECK(cudaMemcpyAsync(cuda->tap + i * n_vocab, row, n_vocab * sizeof(float), cudaMemcpyDeviceToHost, cuda->stream));
    }
}

/* As many head rows at a time as `logits` holds; a captured step has one part, whose sizes are the bucket's. */
static void run_head(struct cuda *cuda, const struct step_shape *shape) {
    for (uint32_t first = 0; first < shape->head_rows; first += cuda->max_head_rows) {
        struct step_shape part = *shape;
        if (shape->head_rows > cuda->max_head_rows) {
            part.head_rows = shape->head_rows - first < cuda->max_head_rows ? shape->head_rows - first : cuda->max_head_rows;
            cut_part(cuda, first, &part);
        }
        rows_norm_head(cuda, &part);
        product(cuda, &cuda->head, cuda->head_h, part.head_rows, cuda->logits, PRODUCT_F32);
        tap(cuda, &part);
        sampling_run(cuda, &part);
    }
}

static void run_phase(struct cuda *cuda, const struct phase *phase, const struct step_shape *shape) {
    struct device_layer *layer = phase->layer < cuda->program->n_layers ? &cuda->layers[phase->layer] : NULL;
    switch (phase->kind) {
    case PHASE_EMBED: weights_embed(cuda, shape); break;
    case PHASE_ATTN_IN:
        rows_norm(cuda, shape, layer->attention_norm, cuda->h);
        product(cuda, &layer->qkv, cuda->h, shape->rows, cuda->qkv, PRODUCT_F32);
        break;
    case PHASE_ATTN:
        rows_append(cuda, phase->layer, shape);
        attention_run(cuda, phase->layer, shape);
        break;
    case PHASE_ATTN_OUT: product(cuda, &layer->o, cuda->a, shape->rows, cuda->x, PRODUCT_ADD_F32); break;
    case PHASE_MLP_IN:
        rows_norm(cuda, shape, layer->mlp_norm, cuda->h);
        product(cuda, &layer->gate_up, cuda->h, shape->rows, cuda->gate_up, PRODUCT_F16);
        rows_activate(cuda, shape);
        break;
    case PHASE_MLP_OUT: product(cuda, &layer->down, cuda->g, shape->rows, cuda->x, PRODUCT_ADD_F32); break;
    case PHASE_HEAD: run_head(cuda, shape); break;
    default: CHECK(!"a phase");
    }
}

static void run_step(struct cuda *cuda, const struct step_shape *shape) {
    const dim3 grid(div_up(cuda->n_lanes, SPREAD_THREADS), shape->sequences);
    mark(cuda, 0);
    spread_lengths<<<grid, SPREAD_THREADS, 0, cuda->stream>>>(cuda->dev.header, cuda->dev.sequences, cuda->tables + ids_of_tables(cuda), cuda->n_lanes, cuda->dev.lane_tokens);
    rows_rope(cuda, shape);
    attention_plan(cuda, shape);
    for (uint32_t i = 0; i < cuda->program->n_phases; i++) {
        run_phase(cuda, &cuda->program->phases[i], shape);
        mark(cuda, i + 1);
    }
}

/* Few enough different sizes that graphs are used again, close enough that little is computed for nothing. */
static uint32_t bucket(uint32_t rows) {
    uint32_t step = rows <= 8 ? 1 : rows <= 16 ? 4 : rows <= 64 ? 8 : rows <= 256 ? 32 : 64;
    return div_up(rows, step) * step;
}

static enum status graph_of(struct cuda *cuda, const struct step_shape *shape, cudaGraphExec_t *exec, struct error *error) {
    struct cuda_private *own = private_of(cuda);
    for (uint32_t i = 0; i < own->n_graphs; i++)
        if (own->graphs[i].rows == shape->rows) {
            *exec = own->graphs[i].exec;
            return STATUS_OK;
        }
    CHECK(own->n_graphs < GRAPHS);
    products_warm(cuda, shape->rows); /* looks algorithms up; cannot be captured */
    cudaGraph_t graph;
    CUDA_TRY(error, cudaStreamBeginCapture(cuda->stream, cudaStreamCaptureModeThreadLocal));
    run_step(cuda, shape);
    CUDA_TRY(error, cudaStreamEndCapture(cuda->stream, &graph));
    const cudaError_t made = cudaGraphInstantiate(exec, graph, 0);
    (void)cudaGraphDestroy(graph);
    CUDA_TRY(error, made);
    own->graphs[own->n_graphs++] = (struct step_graph){shape->rows, *exec};
    return STATUS_OK;
}

static enum status launch(struct cuda *cuda, const struct batch *batch, struct error *error) {
    const struct step_header *header = cuda->host.header;
    struct step_shape shape = {};
    shape.rows = header->n_rows;
    shape.sequences = header->n_sequences;
    shape.decode = header->n_decode;
    shape.tiles = header->n_tiles;
    shape.head_rows = header->n_head_rows;
    shape.samples = header->n_samples;
    shape.accumulates = header->any_accumulates;
    (void)batch;
    const uint32_t rows = bucket(header->n_rows);
    const bool plain = header->n_tiles == 0 && !header->any_accumulates && header->n_head_rows == header->n_rows && header->n_samples == header->n_rows && header->n_sequences == header->n_rows;
    if (!plain || cuda->tap || private_of(cuda)->phase_events || rows > GRAPH_ROWS_MAX || rows > cuda->max_head_rows || rows > cuda->limits.max_sequences || rows > cuda->limits.max_samples ||
        rows > cuda->limits.max_rows) {
        run_step(cuda, &shape);
        CUDA_TRY(error, cudaGetLastError());
        return STATUS_OK;
    }
    cudaGraphExec_t exec;
    shape.rows = shape.sequences = shape.decode = shape.head_rows = shape.samples = rows;
    const enum status status = graph_of(cuda, &shape, &exec, error);
    if (status != STATUS_OK) return status;
    CUDA_TRY(error, cudaGraphLaunch(exec, cuda->stream));
    return STATUS_OK;
}

static enum status cuda_submit(struct backend *backend, const struct batch *batch, struct error *error) {
    struct cuda *cuda = cuda_of(backend);
    CHECK(!cuda->batch);
    stage_rows(cuda, batch);
    enum status status = stage_tables(cuda, batch, error);
    if (status == STATUS_OK) status = send_staging(cuda, error);
    if (status != STATUS_OK) return status;
    sampling_stage(cuda, batch);
    status = launch(cuda, batch, error);
    if (status == STATUS_OK) cuda->batch = batch;
    return status;
}

static void add_phase_times(struct cuda *cuda) {
    struct cuda_private *own = private_of(cuda);
    for (uint32_t i = 0; own->phase_events && i < cuda->program->n_phases; i++) {
        float ms;
        CUDA_CHECK(cudaEventElapsedTime(&ms, own->phase_events[i], own->phase_events[i + 1]));
        cuda->limits.phase_ns[cuda->program->phases[i].kind] += (uint64_t)((double)ms * 1e6);
    }
}

static enum status cuda_sync(struct backend *backend, struct sample_result *results, struct error *error) {
    struct cuda *cuda = cuda_of(backend);
    const struct batch *batch = cuda->batch;
    CHECK(batch);
    cuda->batch = NULL;
    cuda->tap = NULL;
    const uint64_t begun = cuda->limits.wait_ns ? clock_now_ns() : 0;
    CUDA_TRY(error, cudaStreamSynchronize(cuda->stream));
    if (cuda->limits.wait_ns) *cuda->limits.wait_ns += clock_now_ns() - begun;
    add_phase_times(cuda);
    sampling_collect(cuda, batch, results);
    return STATUS_OK;
}

static void cuda_tap_logits(struct backend *backend, float *destination) { cuda_of(backend)->tap = destination; }

extern "C" const struct backend_ops backend_cuda = {
    .name = "cuda",
    .memory = cuda_memory,
    .block_bytes = cuda_block_bytes,
    .memory_plan = cuda_memory_plan,
    .prepare = cuda_prepare,
    .close = cuda_close,
    .describe = cuda_describe,
    .submit = cuda_submit,
    .sync = cuda_sync,
    .copy_blocks = cuda_copy_blocks,
    .resumes = backend_resumes_always,
    .compact = cuda_compact,
    .read_f32 = cuda_read_f32,
    .score = cuda_score,
    .rank = cuda_rank,
    .cut = cuda_cut,
    .keep = cuda_keep,
    .read_positions = cuda_read_positions,
    .shift_sinks = cuda_shift_sinks,
    .tap_logits = cuda_tap_logits,
    .makes_weights = true,
    .weight_bytes = cuda_weight_bytes,
    .copy_bandwidth = cuda_copy_bandwidth,
};

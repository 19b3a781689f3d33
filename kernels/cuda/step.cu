/* A step: submit fills pinned memory and launches, sync waits; a second one may be submitted before that (struct step_flight). A step's small arrays, what its samples ask for and what is new of
 * its tables are taken from pinned memory by its first kernel: one call of the driver in place of one for each. Steps of decode rows alone are captured into a graph for their bucket of rows
 * and replayed: every size that differs between two steps of a bucket is read from the header in device memory. Owns the graphs and the events between phases. The engine's thread. */
#include "kernels/cuda/cuda.h"

#include <stdlib.h>
#include <string.h>

extern "C" {
#include "base/clock.h"
}

enum {
    GRAPH_ROWS_MAX = 512, /* larger steps do not wait for launches */
    GRAPHS = 64,          /* at least two for each bucket */
    SPREAD_THREADS = 256,
    DELIVER_THREADS = 128,
};

/* Of decode steps of a bucket, with or without accumulated attention. */
struct step_graph {
    uint32_t rows;
    bool accumulates;
    cudaGraphExec_t exec;
};

struct step_device {
    struct step_graph graphs[GRAPHS];
    uint32_t n_graphs;
    bool without_more;         /* graphs than there are: there was no memory for one */
    bool without_graphs;       /* nor for launching one that there is */
    cudaEvent_t *phase_events; /* [n_phases + 1] where phase_ns is asked for */
};

/* ---- life ---- */

enum status step_open(struct cuda *cuda, struct error *error) {
    cuda->step = (struct step_device *)check_calloc(1, sizeof *cuda->step);
    if (!cuda->limits.phase_ns) return STATUS_OK;
    cuda->step->phase_events = (cudaEvent_t *)check_calloc(cuda->program->n_phases + 1, sizeof(cudaEvent_t));
    for (uint32_t i = 0; i <= cuda->program->n_phases; i++) CUDA_TRY(error, cudaEventCreate(&cuda->step->phase_events[i]));
    return STATUS_OK;
}

void step_close(struct cuda *cuda) {
    struct step_device *own = cuda->step;
    if (!own) return;
    for (uint32_t i = 0; i < own->n_graphs; i++) (void)cudaGraphExecDestroy(own->graphs[i].exec);
    for (uint32_t i = 0; own->phase_events && i <= cuda->program->n_phases; i++)
        if (own->phase_events[i]) (void)cudaEventDestroy(own->phase_events[i]);
    free(own->phase_events);
    free(own);
    cuda->step = NULL;
}

/* ---- what it does ---- */

/* A thread takes a piece: of the staging, then of sampling's, then two writes. */
static __global__ void deliver_pieces(const struct delivery d) {
    uint32_t i = blockIdx.x * DELIVER_THREADS + threadIdx.x;
    if (i < d.n_staging) {
        d.staging_to[i] = d.staging[i];
        return;
    }
    i -= d.n_staging;
    if (i < d.n_sampling) {
        d.sampling_to[i] = d.sampling[i];
        return;
    }
    i = (i - d.n_sampling) * 2;
    if (i >= d.n_writes) return;
    const uint4 two = *(const uint4 *)(d.writes + i);
    d.tables[two.x] = two.y;
    if (i + 1 < d.n_writes) d.tables[two.z] = two.w;
}

void deliver(struct cuda *cuda, const struct delivery *delivery) {
    const uint32_t pieces = delivery->n_staging + delivery->n_sampling + div_up(delivery->n_writes, 2);
    if (pieces > 0) launch(deliver_pieces, div_up(pieces, DELIVER_THREADS), DELIVER_THREADS, 0, cuda->stream, *delivery);
}

/* lane_tokens of the step's sequences, from the lengths that are on the device. */
static __global__ void spread_lengths(const struct step_header *header, const struct step_sequence *sequences, const uint32_t *lengths, uint32_t n_lanes, uint32_t *lane_tokens) {
    const uint32_t lane = blockIdx.x * SPREAD_THREADS + threadIdx.x, s = blockIdx.y;
    if (s >= header->n_sequences || lane >= n_lanes) return;
    lane_tokens[(size_t)s * n_lanes + lane] = lengths[(size_t)sequences[s].table * n_lanes + lane] + sequences[s].advance;
}

/* A token < 0 is one that the step in flight draws; known here only if the host samples it. */
static void stage_tokens(struct cuda *cuda, const struct batch *batch) {
    const struct batch *before = cuda->n_flights ? cuda->flights[cuda->flight ^ 1].batch : NULL;
    for (uint32_t row = 0; row < batch->n_rows; row++) {
        int32_t token = batch->tokens[row];
        if (token < 0) {
            const uint32_t i = (uint32_t)(-1 - token);
            CHECK(before && i < before->n_samples && before->samples[i].target < 0);
            const int32_t known = sampling_host_token(cuda, cuda->flight ^ 1, i);
            if (known >= 0) token = known;
        }
        cuda->host.tokens[row] = token;
    }
}

static void stage_rows(struct cuda *cuda, const struct batch *batch) {
    const struct backend_limits *limits = &cuda->limits;
    struct step_view *view = &cuda->host;
    CHECK(batch->n_rows >= 1 && batch->n_rows <= limits->max_rows && batch->n_sequences <= limits->max_sequences && batch->n_samples <= limits->max_samples);
    stage_tokens(cuda, batch);
    memcpy(view->positions, batch->positions, batch->n_rows * sizeof *view->positions);
    struct step_header header = {};
    header.flight = cuda->flight;
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

/* All that the view has of this step; tiles lie at its end. */
static void staging_deliver(struct cuda *cuda, struct delivery *delivery) {
    const uint8_t *base = (const uint8_t *)cuda->flights[cuda->flight].staging;
    const uint8_t *end = cuda->host.header->n_tiles ? (const uint8_t *)(cuda->host.tiles + cuda->host.header->n_tiles) : (const uint8_t *)(cuda->host.row_sequence + cuda->host.header->n_rows);
    delivery->staging = (const uint4 *)base;
    delivery->staging_to = (uint4 *)cuda->staging_device;
    delivery->n_staging = div_up((uint32_t)(end - base), sizeof(uint4));
}

static void mark(struct cuda *cuda, uint32_t phase) {
    struct step_device *own = cuda->step;
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
        if (shape->tiles > 0) close_step(cuda, phase->layer, shape); /* later rows of a chunk read as codes what earlier ones fill */
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
    launch(spread_lengths, grid, SPREAD_THREADS, 0, cuda->stream, cuda->dev.header, cuda->dev.sequences, cuda->tables + ids_of_tables(cuda), cuda->n_lanes, cuda->dev.lane_tokens);
    rows_rope(cuda, shape);
    attention_plan(cuda, shape);
    for (uint32_t i = 0; i < cuda->program->n_phases; i++) {
        run_phase(cuda, &cuda->program->phases[i], shape);
        mark(cuda, i + 1);
    }
    if (shape->tiles == 0) close_step(cuda, UINT32_MAX, shape);
}

/* Few enough different sizes that graphs are used again, close enough that little is computed for nothing. */
static uint32_t bucket(uint32_t rows) {
    uint32_t step = rows <= 8 ? 1 : rows <= 16 ? 4 : rows <= 64 ? 8 : rows <= 256 ? 32 : 64;
    return div_up(rows, step) * step;
}

/* The bucket's graph; NULL: there is no memory for it. */
static enum status graph_of(struct cuda *cuda, const struct step_shape *shape, cudaGraphExec_t *exec, struct error *error) {
    struct step_device *own = cuda->step;
    for (uint32_t i = 0; i < own->n_graphs; i++)
        if (own->graphs[i].rows == shape->rows && own->graphs[i].accumulates == shape->accumulates) {
            *exec = own->graphs[i].exec;
            return STATUS_OK;
        }
    *exec = NULL;
    if (own->without_more) return STATUS_OK;
    CHECK(own->n_graphs < GRAPHS);
    products_warm(cuda, shape->rows); /* looks algorithms up; cannot be captured */
    cudaGraph_t graph;
    CUDA_TRY(error, cudaStreamBeginCapture(cuda->stream, cudaStreamCaptureModeThreadLocal));
    run_step(cuda, shape);
    CUDA_TRY(error, cudaStreamEndCapture(cuda->stream, &graph));
    const cudaError_t made = cudaGraphInstantiate(exec, graph, 0);
    (void)cudaGraphDestroy(graph);
    if (made == cudaErrorMemoryAllocation) {
        (void)cudaGetLastError();
        *exec = NULL;
        own->without_more = true;
        return STATUS_OK;
    }
    CUDA_TRY(error, made);
    own->graphs[own->n_graphs++] = (struct step_graph){shape->rows, shape->accumulates, *exec};
    return STATUS_OK;
}

/* Decode rows alone, each sampled, few enough that launches are waited for. */
static bool is_for_graph(const struct cuda *cuda, uint32_t rows) {
    const struct step_header *header = cuda->host.header;
    const struct backend_limits *limits = &cuda->limits;
    const bool plain = header->n_tiles == 0 && header->n_head_rows == header->n_rows && header->n_samples == header->n_rows && header->n_sequences == header->n_rows;
    return plain && !cuda->tap && !cuda->step->phase_events && !cuda->step->without_graphs && rows <= GRAPH_ROWS_MAX && rows <= cuda->max_head_rows && rows <= limits->max_sequences &&
           rows <= limits->max_samples && rows <= limits->max_rows;
}

/* *launched false: there is no memory for the graph; nothing of the step was launched. */
static enum status launch_graph(struct cuda *cuda, uint32_t rows, bool *launched, struct error *error) {
    struct step_shape shape = {};
    cudaGraphExec_t exec;
    shape.rows = shape.sequences = shape.decode = shape.head_rows = shape.samples = rows;
    shape.accumulates = cuda->host.header->any_accumulates;
    const enum status status = graph_of(cuda, &shape, &exec, error);
    if (status != STATUS_OK || !exec) return status;
    const cudaError_t result = cudaGraphLaunch(exec, cuda->stream);
    *launched = result == cudaSuccess;
    if (result != cudaErrorMemoryAllocation) return cuda_status(error, result, "cudaGraphLaunch");
    (void)cudaGetLastError();
    cuda->step->without_graphs = true;
    return STATUS_OK;
}

static enum status launch(struct cuda *cuda, struct error *error) {
    const struct step_header *header = cuda->host.header;
    const uint32_t rows = bucket(header->n_rows);
    bool launched = false;
    if (is_for_graph(cuda, rows)) {
        const enum status status = launch_graph(cuda, rows, &launched, error);
        if (status != STATUS_OK || launched) return status;
    }
    struct step_shape shape = {};
    shape.rows = header->n_rows;
    shape.sequences = header->n_sequences;
    shape.decode = header->n_decode;
    shape.tiles = header->n_tiles;
    shape.head_rows = header->n_head_rows;
    shape.samples = header->n_samples;
    shape.accumulates = header->any_accumulates;
    run_step(cuda, &shape);
    CUDA_TRY(error, cudaGetLastError());
    return STATUS_OK;
}

/* A step that failed on a device that still works: what was launched of it is waited for, as it may read what the next step writes, and the tables are taken anew. Else the process ends.
 * Another one in flight is as it was. */
static enum status end_failed(struct cuda *cuda, enum status status) {
    (void)cudaGetLastError();
    CUDA_CHECK(cudaStreamSynchronize(cuda->stream));
    tables_forget(cuda);
    residual_forget(cuda);
    cuda->tap = NULL;
    return status;
}

/* Of the next step, or back, of the last one. */
static void turn(struct cuda *cuda) {
    cuda->flight ^= 1;
    cuda->host = cuda->flights[cuda->flight].host;
}

static enum status stage_and_launch(struct cuda *cuda, const struct batch *batch, struct error *error) {
    stage_rows(cuda, batch);
    enum status status = tables_stage(cuda, batch, error);
    if (status != STATUS_OK) return status;
    struct delivery delivery = {};
    staging_deliver(cuda, &delivery);
    tables_deliver(cuda, &delivery);
    sampling_stage(cuda, batch, &delivery);
    deliver(cuda, &delivery);
    CUDA_TRY(error, cudaGetLastError()); /* of its launch: without it the step would be the one before */
    residual_begin(cuda, batch);
    status = launch(cuda, error);
    residual_end(cuda, batch);
    if (status == STATUS_OK) CUDA_TRY(error, cudaEventRecord(cuda->flights[cuda->flight].done, cuda->stream));
    return status;
}

enum status cuda_submit(struct backend *backend, const struct batch *batch, struct error *error) {
    struct cuda *cuda = cuda_of(backend);
    CHECK(cuda->n_flights < (cuda->backend.takes_two ? FLIGHTS : 1));
    services_pool_changes(cuda);
    if (cuda->n_flights > 0) sampling_finish(cuda);
    turn(cuda);
    const enum status status = stage_and_launch(cuda, batch, error);
    if (status != STATUS_OK) {
        turn(cuda);
        return end_failed(cuda, status);
    }
    cuda->flights[cuda->flight].batch = batch;
    cuda->n_flights++;
    cuda->tap = NULL;
    return STATUS_OK;
}

static void add_phase_times(struct cuda *cuda) {
    struct step_device *own = cuda->step;
    for (uint32_t i = 0; own->phase_events && i < cuda->program->n_phases; i++) {
        float ms;
        CUDA_CHECK(cudaEventElapsedTime(&ms, own->phase_events[i], own->phase_events[i + 1]));
        cuda->limits.phase_ns[cuda->program->phases[i].kind] += (uint64_t)((double)ms * 1e6);
    }
}

enum status cuda_sync(struct backend *backend, struct sample_result *results, struct error *error) {
    struct cuda *cuda = cuda_of(backend);
    CHECK(cuda->n_flights > 0);
    const uint32_t flight = cuda->n_flights == 1 ? cuda->flight : cuda->flight ^ 1; /* the older */
    cuda->n_flights--;
    const uint64_t begun = cuda->limits.wait_ns ? clock_now_ns() : 0;
    const enum status status = cuda_status(error, cudaEventSynchronize(cuda->flights[flight].done), "cudaEventSynchronize");
    if (status != STATUS_OK) return end_failed(cuda, status);
    if (cuda->limits.wait_ns) *cuda->limits.wait_ns += clock_now_ns() - begun;
    add_phase_times(cuda);
    sampling_collect(cuda, flight, cuda->flights[flight].batch, results);
    return STATUS_OK;
}

void cuda_tap_logits(struct backend *backend, float *destination) { cuda_of(backend)->tap = destination; }

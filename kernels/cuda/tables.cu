/* Block tables on the device. They stay from step to step: only ids that are new are sent, and a lane's length is the length when its table was last sent whole plus the rows since, the same
 * for all lanes of a sequence. Owns what the host knows of them and the pinned memory in which writes wait. The engine's thread. */
#include "kernels/cuda/cuda.h"

#include <stdlib.h>
#include <string.h>

enum {
    WRITES = 1 << 17, /* table writes that wait in pinned memory */
    WRITE_THREADS = 256,
    LANES_AHEAD = 16, /* lanes' lists lie far apart: without that, a cache miss a lane */
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
    uint32_t *lanes;       /* [n_lanes] of one table: those with ids to send */
    struct table_write *writes, *writes_device; /* [WRITES] */
    uint32_t n_writes;
    cudaEvent_t writes_read; /* the pinned writes may be filled again */
};

/* ---- life ---- */

void tables_lay_out(struct cuda *cuda, struct device_arena *arena) {
    uint32_t *ids = (uint32_t *)device_take(arena, ids_of_tables(cuda) + (size_t)cuda->n_tables * cuda->n_lanes, sizeof(uint32_t));
    struct table_write *writes = (struct table_write *)device_take(arena, WRITES, sizeof(struct table_write));
    if (!arena->base) return;
    if (!cuda->tables_host) cuda->tables_host = (struct tables_host *)check_calloc(1, sizeof *cuda->tables_host);
    cuda->tables = ids;
    cuda->tables_host->writes_device = writes;
}

size_t tables_pinned_bytes(void) { return WRITES * sizeof(struct table_write); }

enum status tables_open(struct cuda *cuda, struct error *error) {
    struct tables_host *tables = cuda->tables_host;
    CUDA_TRY(error, cudaMallocHost((void **)&tables->writes, tables_pinned_bytes()));
    CUDA_TRY(error, cudaEventCreateWithFlags(&tables->writes_read, cudaEventDisableTiming));
    tables->changes = (uint32_t *)check_calloc(cuda->n_tables, sizeof(uint32_t));
    tables->first_slots = (uint32_t *)check_calloc(cuda->n_tables, sizeof(uint32_t));
    tables->room = (uint32_t *)check_calloc(cuda->n_tables, sizeof(uint32_t));
    tables->end = (uint32_t *)check_calloc(cuda->n_tables, sizeof(uint32_t));
    tables->blocks = (uint32_t *)check_calloc((size_t)cuda->n_tables * cuda->n_lanes, sizeof(uint32_t));
    tables->lanes = (uint32_t *)check_calloc(cuda->n_lanes, sizeof(uint32_t));
    return STATUS_OK;
}

void tables_close(struct cuda *cuda) {
    struct tables_host *tables = cuda->tables_host;
    if (!tables) return;
    (void)cudaFreeHost(tables->writes);
    if (tables->writes_read) (void)cudaEventDestroy(tables->writes_read);
    free(tables->changes);
    free(tables->first_slots);
    free(tables->room);
    free(tables->end);
    free(tables->blocks);
    free(tables->lanes);
    free(tables);
    cuda->tables_host = NULL;
}

void tables_forget(struct cuda *cuda) {
    cuda->tables_host->n_writes = 0;
    for (uint32_t table = 0; table < cuda->n_tables; table++) cuda->tables_host->changes[table] = 0;
}

/* ---- what is new ---- */

static __global__ void write_tables(const struct table_write *writes, uint32_t n, uint32_t *tables) {
    const uint32_t i = blockIdx.x * WRITE_THREADS + threadIdx.x;
    if (i < n) tables[writes[i].at] = writes[i].value;
}

static enum status send_writes(struct cuda *cuda, struct error *error) {
    struct tables_host *tables = cuda->tables_host;
    const uint32_t n = tables->n_writes;
    if (n == 0) return STATUS_OK;
    CUDA_TRY(error, cudaMemcpyAsync(tables->writes_device, tables->writes, n * sizeof(struct table_write), cudaMemcpyHostToDevice, cuda->stream));
    launch(write_tables, div_up(n, WRITE_THREADS), WRITE_THREADS, 0, cuda->stream, tables->writes_device, n, cuda->tables);
    CUDA_TRY(error, cudaEventRecord(tables->writes_read, cuda->stream));
    tables->n_writes = 0;
    return STATUS_OK;
}

/* Before the pinned memory is filled anew, what was sent from it has been read: at once in the common case, as a step in flight has begun with it. */
static enum status add_write(struct cuda *cuda, uint32_t at, uint32_t value, struct error *error) {
    struct tables_host *tables = cuda->tables_host;
    if (tables->n_writes == WRITES) {
        const enum status status = send_writes(cuda, error);
        if (status != STATUS_OK) return status;
    }
    if (tables->n_writes == 0) CUDA_TRY(error, cudaEventSynchronize(tables->writes_read));
    tables->writes[tables->n_writes++] = (struct table_write){at, value};
    return STATUS_OK;
}

/* The lanes for whose rows ids are to be sent, to tables_host.lanes; returns how many. *room: that every lane will have then beyond the rows. Without a branch: of most sequences some lanes need
 * an id at each step, and which ones nobody can foretell. */
static uint32_t lanes_behind(struct cuda *cuda, const struct batch_sequence *sequence, const uint32_t *blocks, uint32_t *room) {
    uint32_t *lanes = cuda->tables_host->lanes, n = 0, least = UINT32_MAX;
    for (uint32_t lane = 0; lane < cuda->n_lanes; lane++) {
        const uint32_t end = sequence->lane_tokens[lane] + sequence->n_rows, needed = div_up(end, BLOCK_TOKENS), listed = needed > blocks[lane] ? needed : blocks[lane];
        const uint32_t left = listed * BLOCK_TOKENS - end;
        lanes[n] = lane;
        n += needed > blocks[lane];
        least = left < least ? left : least;
    }
    *room = least;
    return n;
}

/* Ids that the device lacks of one sequence, and lengths if it is new there. */
static enum status send_table(struct cuda *cuda, const struct batch *batch, const struct batch_sequence *sequence, uint32_t table, uint32_t changes, uint32_t *advance, struct error *error) {
    struct tables_host *tables = cuda->tables_host;
    const uint32_t first = sequence->lane_tokens[0];
    const bool known = changes != 0 && tables->changes[table] == changes && first >= tables->first_slots[table];
    uint32_t *blocks = tables->blocks + (size_t)table * cuda->n_lanes, room;
    if (known && first >= tables->end[table] && first - tables->end[table] + sequence->n_rows <= tables->room[table]) {
        tables->room[table] -= first - tables->end[table] + sequence->n_rows;
        tables->end[table] = first + sequence->n_rows;
        *advance = first - tables->first_slots[table];
        return STATUS_OK;
    }
    enum status status = STATUS_OK;
    if (!known) memset(blocks, 0, cuda->n_lanes * sizeof *blocks);
    for (uint32_t lane = 0; !known && lane < cuda->n_lanes && status == STATUS_OK; lane++)
        status = add_write(cuda, (uint32_t)ids_of_tables(cuda) + table * cuda->n_lanes + lane, sequence->lane_tokens[lane], error);
    const uint32_t n = lanes_behind(cuda, sequence, blocks, &room), *lanes = tables->lanes;
    for (uint32_t i = 0; i < n; i++) {
        if (i + LANES_AHEAD < n) __builtin_prefetch(batch->block_ids + sequence->lane_first[lanes[i + LANES_AHEAD]] + blocks[lanes[i + LANES_AHEAD]]);
        const uint32_t lane = lanes[i], from = blocks[lane], needed = div_up(sequence->lane_tokens[lane] + sequence->n_rows, BLOCK_TOKENS);
        const uint32_t *ids = batch->block_ids + sequence->lane_first[lane], at = (table * cuda->n_lanes + lane) * cuda->lane_blocks;
        CHECK(needed <= cuda->lane_blocks);
        for (uint32_t b = from; b < needed && status == STATUS_OK; b++) {
            CHECK(ids[b] < cuda->limits.n_blocks);
            status = add_write(cuda, at + b, ids[b], error);
        }
        if (status != STATUS_OK) return status;
        blocks[lane] = needed;
    }
    if (!known) tables->first_slots[table] = first;
    tables->changes[table] = changes;
    tables->room[table] = room;
    tables->end[table] = first + sequence->n_rows;
    *advance = first - tables->first_slots[table];
    return STATUS_OK;
}

enum status tables_stage(struct cuda *cuda, const struct batch *batch, struct error *error) {
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

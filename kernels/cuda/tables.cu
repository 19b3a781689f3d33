/* Block tables on the device. They stay from step to step: only ids that are new are sent, and a lane's length is the length when its table was last sent whole plus the rows since, the same
 * for all lanes of a sequence. Owns what the host knows of them and the pinned memory in which writes wait for the step's kernel that delivers them (step.cu). The engine's thread. */
#include "kernels/cuda/cuda.h"

#include <stdlib.h>
#include <string.h>

enum {
    WRITES = 1 << 17, /* table writes of a step that wait in pinned memory */
    RUNS_AHEAD = 32,  /* lanes' lists lie far apart: without that, a cache miss a lane */
};

/* New ids of one lane. */
struct id_run {
    const uint32_t *ids;
    uint32_t at, count; /* in `tables` */
};

/* What the device already has of the tables. Progress of a table: rows that every lane grew by since its lengths were sent. */
struct tables_host {
    uint32_t *changes;     /* [n_tables] batch_sequence.table_changes of what is there; 0: nothing */
    uint32_t *first_slots; /* [n_tables] lane 0's length when lengths were sent */
    uint32_t *sent;        /* [n_tables] the progress to whose end ids were sent */
    uint32_t *order;       /* [n_tables][n_lanes] lanes by phase: the progress, modulo BLOCK_TOKENS, with whose next row they enter a block */
    uint32_t *phases;      /* [n_tables][BLOCK_TOKENS + 1] where each phase begins in the order */
    struct table_write *writes[FLIGHTS]; /* [WRITES] pinned */
    uint32_t n_writes;                   /* of the step that is being staged */
    struct id_run runs[RUNS_AHEAD];      /* asked for, and not read yet; a ring */
    uint32_t n_runs, next_run;
    bool versions; /* of the step staged last: all its tables have one */
};

/* ---- life ---- */

void tables_lay_out(struct cuda *cuda, struct device_arena *arena) {
    uint32_t *ids = (uint32_t *)device_take(arena, ids_of_tables(cuda) + (size_t)cuda->n_tables * cuda->n_lanes, sizeof(uint32_t));
    if (!arena->base) return;
    if (!cuda->tables_host) cuda->tables_host = (struct tables_host *)check_calloc(1, sizeof *cuda->tables_host);
    cuda->tables = ids;
}

size_t tables_pinned_bytes(void) { return (size_t)FLIGHTS * (size_t)WRITES * sizeof(struct table_write); }

enum status tables_open(struct cuda *cuda, struct error *error) {
    struct tables_host *tables = cuda->tables_host;
    for (int i = 0; i < FLIGHTS; i++) CUDA_TRY(error, cudaHostAlloc((void **)&tables->writes[i], WRITES * sizeof(struct table_write), cudaHostAllocMapped));
    tables->changes = (uint32_t *)check_calloc(cuda->n_tables, sizeof(uint32_t));
    tables->first_slots = (uint32_t *)check_calloc(cuda->n_tables, sizeof(uint32_t));
    tables->sent = (uint32_t *)check_calloc(cuda->n_tables, sizeof(uint32_t));
    tables->order = (uint32_t *)check_calloc((size_t)cuda->n_tables * cuda->n_lanes, sizeof(uint32_t));
    tables->phases = (uint32_t *)check_calloc((size_t)cuda->n_tables * (BLOCK_TOKENS + 1), sizeof(uint32_t));
    return STATUS_OK;
}

void tables_close(struct cuda *cuda) {
    struct tables_host *tables = cuda->tables_host;
    if (!tables) return;
    for (int i = 0; i < FLIGHTS; i++) (void)cudaFreeHost(tables->writes[i]);
    free(tables->changes);
    free(tables->first_slots);
    free(tables->sent);
    free(tables->order);
    free(tables->phases);
    free(tables);
    cuda->tables_host = NULL;
}

void tables_forget(struct cuda *cuda) {
    cuda->tables_host->n_writes = cuda->tables_host->n_runs = 0;
    for (uint32_t table = 0; table < cuda->n_tables; table++) cuda->tables_host->changes[table] = 0;
}

void tables_deliver(struct cuda *cuda, struct delivery *delivery) {
    struct tables_host *tables = cuda->tables_host;
    delivery->tables = cuda->tables;
    delivery->writes = tables->writes[cuda->flight];
    delivery->n_writes = tables->n_writes;
    tables->n_writes = 0;
}

/* ---- what is new ---- */

/* Where the step's pinned memory is full, what is there is delivered, and read, before it is filled anew. */
static enum status add_write(struct cuda *cuda, uint32_t at, uint32_t value, struct error *error) {
    struct tables_host *tables = cuda->tables_host;
    if (tables->n_writes == WRITES) {
        struct delivery full = {};
        tables_deliver(cuda, &full);
        deliver(cuda, &full);
        CUDA_TRY(error, cudaGetLastError());
        CUDA_TRY(error, cudaStreamSynchronize(cuda->stream));
    }
    tables->writes[cuda->flight][tables->n_writes++] = (struct table_write){at, value};
    return STATUS_OK;
}

static enum status add_first_run(struct cuda *cuda, struct error *error) {
    struct tables_host *tables = cuda->tables_host;
    const struct id_run run = tables->runs[tables->next_run];
    enum status status = STATUS_OK;
    tables->next_run = (tables->next_run + 1) % RUNS_AHEAD;
    tables->n_runs--;
    for (uint32_t b = 0; b < run.count && status == STATUS_OK; b++) {
        CHECK(run.ids[b] < cuda->limits.n_blocks);
        status = add_write(cuda, run.at + b, run.ids[b], error);
    }
    return status;
}

/* The ids that a lane lacks whose blocks were sent up to the one of slot `sent` and are needed up to that of slot `end` (both not included). */
static enum status expect_ids(struct cuda *cuda, const struct batch *batch, const struct batch_sequence *sequence, uint32_t table, uint32_t lane, uint32_t sent, uint32_t end,
                              struct error *error) {
    struct tables_host *tables = cuda->tables_host;
    const uint32_t from = div_up(sent, BLOCK_TOKENS), needed = div_up(end, BLOCK_TOKENS);
    CHECK(needed <= cuda->lane_blocks);
    if (from >= needed) return STATUS_OK;
    if (tables->n_runs == RUNS_AHEAD) {
        const enum status status = add_first_run(cuda, error);
        if (status != STATUS_OK) return status;
    }
    const uint32_t *ids = batch->block_ids + sequence->lane_first[lane] + from;
    __builtin_prefetch(ids);
    tables->runs[(tables->next_run + tables->n_runs++) % RUNS_AHEAD] = {ids, (table * cuda->n_lanes + lane) * cuda->lane_blocks + from, needed - from};
    return STATUS_OK;
}

/* The progress, modulo BLOCK_TOKENS, at which a lane of so many slots has none left in its last block. */
static uint32_t phase_of(uint32_t slots) { return (BLOCK_TOKENS - slots % BLOCK_TOKENS) % BLOCK_TOKENS; }

static void sort_lanes(const struct cuda *cuda, uint32_t table, const uint32_t *slots) {
    uint32_t *order = cuda->tables_host->order + (size_t)table * cuda->n_lanes, *phases = cuda->tables_host->phases + (size_t)table * (BLOCK_TOKENS + 1);
    uint32_t next[BLOCK_TOKENS];
    memset(phases, 0, (BLOCK_TOKENS + 1) * sizeof *phases);
    for (uint32_t lane = 0; lane < cuda->n_lanes; lane++) phases[phase_of(slots[lane]) + 1]++;
    for (uint32_t phase = 0; phase < BLOCK_TOKENS; phase++) {
        next[phase] = phases[phase];
        phases[phase + 1] += phases[phase];
    }
    for (uint32_t lane = 0; lane < cuda->n_lanes; lane++) order[next[phase_of(slots[lane])]++] = lane;
}

/* A table of which the device has nothing: lengths, and all ids. */
static enum status send_whole(struct cuda *cuda, const struct batch *batch, const struct batch_sequence *sequence, uint32_t table, struct error *error) {
    enum status status = STATUS_OK;
    for (uint32_t lane = 0; lane < cuda->n_lanes && status == STATUS_OK; lane++) {
        const uint32_t slots = sequence->lane_tokens[lane];
        status = add_write(cuda, (uint32_t)ids_of_tables(cuda) + table * cuda->n_lanes + lane, slots, error);
        if (status == STATUS_OK) status = expect_ids(cuda, batch, sequence, table, lane, 0, slots + sequence->n_rows, error);
    }
    cuda->tables_host->first_slots[table] = sequence->lane_tokens[0];
    cuda->tables_host->sent[table] = sequence->n_rows;
    sort_lanes(cuda, table, sequence->lane_tokens);
    return status;
}

/* Lanes of the table that enter a block between one progress and another: those whose phase is between the two, unless all do. */
static struct lane_list lanes_between(const struct cuda *cuda, uint32_t table, uint32_t from, uint32_t to) {
    const uint32_t *order = cuda->tables_host->order + (size_t)table * cuda->n_lanes, *phases = cuda->tables_host->phases + (size_t)table * (BLOCK_TOKENS + 1);
    if (to - from >= BLOCK_TOKENS) return {{order, order}, {cuda->n_lanes, 0}};
    const uint32_t first = from % BLOCK_TOKENS, end = first + (to - from); /* phases; from BLOCK_TOKENS on, those from 0 on */
    if (end <= BLOCK_TOKENS) return {{order + phases[first], order}, {phases[end] - phases[first], 0}};
    return {{order + phases[first], order}, {cuda->n_lanes - phases[first], phases[end - BLOCK_TOKENS]}};
}

/* Ids of the blocks that lanes enter between the progress for which they were sent and `end`. */
static enum status send_new(struct cuda *cuda, const struct batch *batch, const struct batch_sequence *sequence, uint32_t table, uint32_t progress, uint32_t end, struct error *error) {
    struct tables_host *tables = cuda->tables_host;
    const uint32_t sent = tables->sent[table];
    const struct lane_list entering = lanes_between(cuda, table, sent, end);
    enum status status = STATUS_OK;
    for (uint32_t i = 0; i < lane_list_size(&entering) && status == STATUS_OK; i++) {
        const uint32_t lane = lane_list_at(&entering, i), slots = sequence->lane_tokens[lane] - progress; /* when lengths were sent */
        status = expect_ids(cuda, batch, sequence, table, lane, slots + sent, slots + end, error);
    }
    tables->sent[table] = end;
    return status;
}

/* What the device lacks of one sequence's table; *advance: its progress before the step. */
static enum status send_table(struct cuda *cuda, const struct batch *batch, const struct batch_sequence *sequence, uint32_t table, uint32_t changes, uint32_t *advance, struct error *error) {
    struct tables_host *tables = cuda->tables_host;
    const uint32_t first = sequence->lane_tokens[0];
    *advance = 0;
    if (changes == 0 || tables->changes[table] != changes || first < tables->first_slots[table]) {
        tables->changes[table] = changes;
        return send_whole(cuda, batch, sequence, table, error);
    }
    *advance = first - tables->first_slots[table];
    const uint32_t end = *advance + sequence->n_rows;
    return end > tables->sent[table] ? send_new(cuda, batch, sequence, table, *advance, end, error) : STATUS_OK;
}

enum status tables_stage(struct cuda *cuda, const struct batch *batch, struct error *error) {
    bool versions = true;
    for (uint32_t s = 0; s < batch->n_sequences; s++) versions = versions && batch->sequences[s].table_changes != 0;
    cuda->tables_host->versions = versions;
    for (uint32_t s = 0; s < batch->n_sequences; s++) {
        const struct batch_sequence *sequence = &batch->sequences[s];
        const uint32_t table = versions ? sequence->table : s;
        CHECK(table < cuda->n_tables && sequence->table < cuda->n_tables);
        struct step_sequence staged = {};
        staged.first_row = sequence->first_row;
        staged.n_rows = sequence->n_rows;
        staged.table = table;
        staged.ring = sequence->ring;
        staged.accumulate = sequence->accumulate;
        const enum status status = send_table(cuda, batch, sequence, table, versions ? sequence->table_changes : 0, &staged.advance, error);
        if (status != STATUS_OK) return status;
        if (!versions) cuda->tables_host->changes[sequence->table] = 0; /* its own table is not the one that it comes with */
        cuda->host.sequences[s] = staged;
    }
    while (cuda->tables_host->n_runs > 0) {
        const enum status status = add_first_run(cuda, error);
        if (status != STATUS_OK) return status;
    }
    return STATUS_OK;
}

bool tables_entering(const struct cuda *cuda, const struct batch *batch, uint32_t s, struct lane_list *entering) {
    const uint32_t progress = cuda->host.sequences[s].advance;
    if (!cuda->tables_host->versions) return false;
    *entering = lanes_between(cuda, batch->sequences[s].table, progress, progress + batch->sequences[s].n_rows);
    return true;
}

/* The device's block tables (tables.cu, and deliver of step.cu), alone on a device: after each step every length and every id that its rows need is there, and no more was sent than is
 * new. Sequences grow alike by one row or many, are cut, take rows back, and come without versions.
 *
 *   --check   exit 1 if anything is wrong; the first differences are printed
 *   --bench   microseconds: of the host to stage a step of 256 sequences at 8B's shape, of the device to take what was staged */
#include <algorithm>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <vector>

extern "C" {
#include "base/clock.h"
#include "base/random.h"
}
#include "kernels/cuda/cuda.h"
#include "tests/gpu/wrong.h"

enum { STEPS_UNDER_WAY = 2 };

/* A sequence: what its table should be on the device. */
struct expected {
    std::vector<uint32_t> slots, first, sent; /* by lane: filled; of its list in world.ids; blocks that the device has */
    uint32_t changes, last_rows;
    bool on_device;       /* with these changes */
    uint32_t slots_first; /* lane 0's, when it was sent whole */
};

struct world {
    struct cuda cuda;
    void *memory;
    std::vector<uint32_t> ids, seen; /* all lists; the tables, read back */
    std::vector<struct step_sequence> staged;
    std::vector<struct expected> sequences;
    std::vector<struct batch_sequence> batch_sequences;
    struct random random;
};

static void open_world(struct world *world, uint32_t n_tables, uint32_t n_lanes, uint32_t lane_blocks, uint64_t seed) {
    struct cuda *cuda = &world->cuda;
    struct device_arena arena = {};
    *cuda = {};
    cuda->n_tables = n_tables;
    cuda->n_lanes = n_lanes;
    cuda->lane_blocks = lane_blocks;
    cuda->limits.n_blocks = 1u << 30;
    world->random = {seed};
    CUDA_CHECK(cudaStreamCreateWithFlags(&cuda->stream, cudaStreamNonBlocking));
    tables_lay_out(cuda, &arena);
    CUDA_CHECK(cudaMalloc(&world->memory, arena.used));
    CUDA_CHECK(cudaMemset(world->memory, 0xff, arena.used));
    CUDA_CHECK(cudaDeviceSynchronize());
    arena = {(uint8_t *)world->memory, 0};
    tables_lay_out(cuda, &arena);
    CHECK(tables_open(cuda, NULL) == STATUS_OK);
    world->staged.resize(n_tables);
    cuda->host.sequences = world->staged.data();
    world->ids.resize((size_t)n_tables * n_lanes * lane_blocks);
    world->seen.resize(world->ids.size() + (size_t)n_tables * n_lanes);
    for (uint32_t &id : world->ids) id = (uint32_t)random_below(&world->random, 1u << 30);
    world->sequences.resize(n_tables);
    for (uint32_t s = 0; s < n_tables; s++) {
        struct expected *sequence = &world->sequences[s];
        sequence->slots.resize(n_lanes);
        sequence->sent.resize(n_lanes);
        for (uint32_t lane = 0; lane < n_lanes; lane++) sequence->first.push_back((s * n_lanes + lane) * lane_blocks);
        sequence->changes = 1;
        sequence->last_rows = 0;
        sequence->on_device = false;
    }
}

static void close_world(struct world *world) {
    CUDA_CHECK(cudaStreamSynchronize(world->cuda.stream));
    tables_close(&world->cuda);
    CUDA_CHECK(cudaFree(world->memory));
    CUDA_CHECK(cudaStreamDestroy(world->cuda.stream));
}

/* Each lane to another length, its ids anew. */
static void cut(struct world *world, struct expected *sequence, uint32_t most) {
    for (uint32_t lane = 0; lane < world->cuda.n_lanes; lane++) {
        sequence->slots[lane] = random_below(&world->random, most + 1);
        for (uint32_t b = 0; b < world->cuda.lane_blocks; b++) world->ids[sequence->first[lane] + b] = random_below(&world->random, 1u << 30);
    }
    sequence->changes++;
    sequence->last_rows = 0;
}

static uint32_t longest(const struct expected *sequence) { return *std::max_element(sequence->slots.begin(), sequence->slots.end()); }

/* What a step has to send of a sequence: lengths if it is new there, and ids. */
static uint64_t new_words(struct world *world, struct expected *sequence, bool versions, uint32_t rows) {
    uint64_t words = 0;
    const bool known = versions && sequence->on_device && sequence->slots[0] >= sequence->slots_first;
    if (!known) sequence->slots_first = sequence->slots[0];
    for (uint32_t lane = 0; lane < world->cuda.n_lanes; lane++) {
        const uint32_t needed = div_up(sequence->slots[lane] + rows, BLOCK_TOKENS), there = known ? sequence->sent[lane] : 0;
        words += !known + (needed > there ? needed - there : 0);
        sequence->sent[lane] = needed > there ? needed : there;
    }
    sequence->on_device = versions;
    return words;
}

/* Some of the sequences, each with rows. Returns words that are to be sent. */
static uint64_t make_step(struct world *world, bool versions, struct batch *batch) {
    struct random *random = &world->random;
    const uint32_t n_tables = world->cuda.n_tables, most = world->cuda.lane_blocks * BLOCK_TOKENS,
                   skipped = random_below(random, 3) ? n_tables : random_below(random, n_tables);
    uint64_t words = 0;
    uint32_t n_rows = 0;
    world->batch_sequences.clear();
    for (uint32_t s = 0; s < n_tables; s++) {
        struct expected *sequence = &world->sequences[s];
        if (s == skipped && n_tables > 1) continue;
        const uint32_t rows = random_below(random, 8) ? 1 : 1 + random_below(random, 3 * BLOCK_TOKENS), event = random_below(random, 40);
        const uint32_t back = event < 4    ? sequence->last_rows
                              : event == 4 ? random_below(random, *std::min_element(sequence->slots.begin(), sequence->slots.end()) + 1)
                                           : 0;
        for (uint32_t &slots : sequence->slots) slots -= back; /* the last rows did not count, or more */
        if (event == 39) cut(world, sequence, random_below(random, most / 2));
        if (longest(sequence) + rows > most) cut(world, sequence, most / 4);
        if (sequence->last_rows == 0 || event == 39) sequence->on_device = false;
        words += new_words(world, sequence, versions, rows);
        sequence->last_rows = rows;
        struct batch_sequence staged = {};
        staged.first_row = n_rows;
        staged.n_rows = rows;
        staged.table = s;
        staged.table_changes = versions ? sequence->changes : random_below(random, 2) ? sequence->changes : 0; /* without versions: of one at least */
        staged.lane_first = sequence->first.data();
        staged.lane_tokens = sequence->slots.data();
        world->batch_sequences.push_back(staged);
        n_rows += rows;
    }
    if (!versions) world->batch_sequences[random_below(random, (uint32_t)world->batch_sequences.size())].table_changes = 0;
    for (size_t s = 0; !versions && s < world->batch_sequences.size();
         s++) /* tables are taken in the order of the step's sequences then: what was there is overwritten */
        world->sequences[s].on_device = false;
    *batch = {};
    batch->block_ids = world->ids.data();
    batch->sequences = world->batch_sequences.data();
    batch->n_sequences = (uint32_t)world->batch_sequences.size();
    return words;
}

static void end_step(struct world *world) {
    for (const struct batch_sequence &sequence : world->batch_sequences)
        for (uint32_t &slots : world->sequences[sequence.table].slots) slots += sequence.n_rows;
    world->cuda.flight ^= 1;
}

static void compare_step(const struct world *world, const struct batch *batch, uint32_t step, bool versions) {
    const struct cuda *cuda = &world->cuda;
    const uint32_t *lengths = world->seen.data() + ids_of_tables(cuda);
    for (uint32_t s = 0; s < batch->n_sequences; s++) {
        const struct batch_sequence *sequence = &batch->sequences[s];
        const struct step_sequence *staged = &world->staged[s];
        if (staged->table != (versions ? sequence->table : s) || staged->n_rows != sequence->n_rows || staged->first_row != sequence->first_row)
            WRONG("step %u, sequence %u", step, s);
        for (uint32_t lane = 0; lane < cuda->n_lanes; lane++) {
            const uint32_t at = staged->table * cuda->n_lanes + lane, *ids = batch->block_ids + sequence->lane_first[lane];
            const uint32_t needed = div_up(sequence->lane_tokens[lane] + sequence->n_rows, BLOCK_TOKENS);
            if (lengths[at] + staged->advance != sequence->lane_tokens[lane])
                WRONG("step %u, sequence %u, lane %u: %u + %u slots in place of %u", step, s, lane, lengths[at], staged->advance,
                      sequence->lane_tokens[lane]);
            for (uint32_t b = 0; b < needed; b++)
                if (world->seen[(size_t)at * cuda->lane_blocks + b] != ids[b]) {
                    WRONG("step %u, sequence %u, lane %u, block %u of %u: %u in place of %u", step, s, lane, b, needed,
                          world->seen[(size_t)at * cuda->lane_blocks + b], ids[b]);
                    break;
                }
        }
    }
}

/* What is staged is put into `seen` here: how much it is can be told then. */
static void check_staging(uint32_t n_tables, uint32_t n_lanes, uint32_t lane_blocks, uint32_t steps, uint64_t seed) {
    struct world world;
    open_world(&world, n_tables, n_lanes, lane_blocks, seed);
    for (uint32_t step = 0; step < steps; step++) {
        struct batch batch;
        struct delivery staged = {};
        const bool versions = random_below(&world.random, 30) > 0;
        const uint64_t words = make_step(&world, versions, &batch);
        CHECK(tables_stage(&world.cuda, &batch, NULL) == STATUS_OK);
        tables_deliver(&world.cuda, &staged);
        if (staged.n_writes != words) WRONG("step %u: %u words are sent, %llu are new", step, staged.n_writes, (unsigned long long)words);
        for (uint32_t i = 0; i < staged.n_writes; i++) world.seen[staged.writes[i].at] = staged.writes[i].value;
        compare_step(&world, &batch, step, versions);
        end_step(&world);
    }
    close_world(&world);
}

/* Through the device, several steps under way before one is waited for. Sequences begin with so many slots. */
static void check_delivery(uint32_t n_tables, uint32_t n_lanes, uint32_t lane_blocks, uint32_t slots, uint32_t steps, uint64_t seed) {
    struct world world;
    open_world(&world, n_tables, n_lanes, lane_blocks, seed);
    for (struct expected &sequence : world.sequences) std::fill(sequence.slots.begin(), sequence.slots.end(), slots);
    for (uint32_t step = 0; step < steps; step++) {
        struct batch batch;
        const bool versions = random_below(&world.random, 30) > 0, waits = step % STEPS_UNDER_WAY == STEPS_UNDER_WAY - 1;
        (void)make_step(&world, versions, &batch);
        struct delivery staged = {};
        CHECK(tables_stage(&world.cuda, &batch, NULL) == STATUS_OK);
        tables_deliver(&world.cuda, &staged);
        deliver(&world.cuda, &staged);
        CUDA_CHECK(cudaGetLastError());
        if (waits) {
            CUDA_CHECK(cudaStreamSynchronize(world.cuda.stream));
            CUDA_CHECK(cudaMemcpy(world.seen.data(), world.cuda.tables, world.seen.size() * sizeof(uint32_t), cudaMemcpyDeviceToHost));
            compare_step(&world, &batch, step, versions);
        }
        end_step(&world);
    }
    close_world(&world);
}

static int check(void) {
    const uint32_t lanes[] = {1, 2, 7, 60, 256};
    for (uint32_t i = 0; i < sizeof lanes / sizeof *lanes; i++) {
        check_staging(1 + i, lanes[i], 6, 400, 100 + i);
        check_delivery(1 + i, lanes[i], 6, 0, 120, 200 + i);
    }
    for (uint64_t seed = 300; seed < 304; seed++)
        check_delivery(4, 1500, 60, 56 * BLOCK_TOKENS, 2, seed); /* whole tables are more than what waits in pinned memory */
    printf("tables: %u wrong\n", n_wrong);
    return n_wrong > 0;
}

static double median(std::vector<double> values) {
    std::sort(values.begin(), values.end());
    return values[values.size() / 2];
}

/* Decode steps of 256 sequences, all lanes alike or each at another place in its block. */
static void bench_steps(bool ragged) {
    enum { SEQUENCES = 256, LANES = 256, BLOCKS = 64, STEPS = 320, FIRST = 1000 };
    struct world world;
    std::vector<double> staged_us, delivered_us, words;
    cudaEvent_t begin, end;
    open_world(&world, SEQUENCES, LANES, BLOCKS, 1);
    CUDA_CHECK(cudaEventCreate(&begin));
    CUDA_CHECK(cudaEventCreate(&end));
    for (struct expected &sequence : world.sequences)
        for (uint32_t &slots : sequence.slots) slots = FIRST - (ragged ? random_below(&world.random, FIRST) : 0);
    for (uint32_t step = 0; step < STEPS; step++) {
        struct batch batch = {};
        world.batch_sequences.clear();
        uint32_t n_words = 0;
        for (uint32_t s = 0; s < SEQUENCES; s++) {
            struct batch_sequence staged = {};
            staged.n_rows = 1;
            staged.table = s;
            staged.table_changes = 1;
            staged.lane_first = world.sequences[s].first.data();
            staged.lane_tokens = world.sequences[s].slots.data();
            world.batch_sequences.push_back(staged);
            for (uint32_t slots : world.sequences[s].slots) n_words += slots % BLOCK_TOKENS == 0;
        }
        batch.block_ids = world.ids.data();
        batch.sequences = world.batch_sequences.data();
        batch.n_sequences = SEQUENCES;
        const uint64_t begun = clock_now_ns();
        CHECK(tables_stage(&world.cuda, &batch, NULL) == STATUS_OK);
        const uint64_t staged = clock_now_ns();
        float ms;
        struct delivery delivery = {};
        tables_deliver(&world.cuda, &delivery);
        CUDA_CHECK(cudaEventRecord(begin, world.cuda.stream));
        deliver(&world.cuda, &delivery);
        CUDA_CHECK(cudaEventRecord(end, world.cuda.stream));
        CUDA_CHECK(cudaEventSynchronize(end));
        CUDA_CHECK(cudaEventElapsedTime(&ms, begin, end));
        end_step(&world);
        if (step == 0) continue; /* everything is new */
        staged_us.push_back((double)(staged - begun) / 1e3);
        delivered_us.push_back((double)ms * 1e3);
        words.push_back(n_words);
    }
    double sum = 0;
    for (double us : staged_us) sum += us;
    printf("%-12s host %7.1f us a step (median %.1f), device %6.1f us, %.0f words (medians; most %.0f words)\n", ragged ? "ragged" : "lanes alike",
           sum / (double)staged_us.size(), median(staged_us), median(delivered_us), median(words), *std::max_element(words.begin(), words.end()));
    CUDA_CHECK(cudaEventDestroy(begin));
    CUDA_CHECK(cudaEventDestroy(end));
    close_world(&world);
}

int main(int argc, char **argv) {
    int n = 0;
    if (cudaGetDeviceCount(&n) != cudaSuccess || n == 0) return puts("skipped: no CUDA device"), 77;
    if (argc == 2 && strcmp(argv[1], "--check") == 0) return check();
    if (argc == 2 && strcmp(argv[1], "--bench") == 0) {
        bench_steps(false);
        bench_steps(true);
        return 0;
    }
    fprintf(stderr, "usage: %s --check | --bench\n", argv[0]);
    return 2;
}

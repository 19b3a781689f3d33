/* Sampling on the device against the host's sampler. A plain program; needs a device.
 *
 *   sample --check [CASES [SEED]]   random steps of every combination of parameters, ties, logits that are no numbers, lists that do not fit: tokens equal,
 *                                   log-probabilities within 1e-4, logits untouched; with clusters and without, launched, from a graph, and in parts.
 *                                   Prints the first differences; exit status 1 if there is one.
 *   sample --bench                  one line a case: median time of a step's sampling from 128,256 logits a row. */
#include "kernels/cuda/cuda.h"

#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

extern "C" {
#include "base/random.h"
}

enum { ROWS = 6, SAMPLES = 24, HISTORY = 64, LONG_HISTORY = 40000, BIASES = 70, BANNED = 40, REPORTED = 12 };

static uint32_t failures;

/* ---- a backend's part around sampling ---- */

struct fixture {
    struct cuda cuda;
    struct program program;
    void *arena;
    struct step_header header;
    cudaGraphExec_t graph; /* of max_samples samples */
};

static void must(enum status status, const struct error *error) {
    if (status == STATUS_OK) return;
    fprintf(stderr, "sample: %s\n", error->text);
    exit(1);
}

static void fixture_open(struct fixture *f, uint32_t n_vocab, uint32_t head_rows, uint32_t max_samples, bool clusters) {
    struct cuda *cuda = &f->cuda;
    struct error error = {};
    memset((void *)f, 0, sizeof *f);
    f->program.n_vocab = n_vocab;
    cuda->program = &f->program;
    cuda->limits.max_samples = max_samples;
    cuda->limits.max_sequences = 1;
    cuda->max_head_rows = head_rows;
    CUDA_CHECK(cudaGetDeviceProperties(&cuda->properties, 0));
    if (!clusters) cuda->properties.major = 8;
    CUDA_CHECK(cudaStreamCreate(&cuda->stream));
    struct device_arena arena = {};
    sampling_lay_out(cuda, &arena);
    const size_t counted = arena.used;
    CUDA_CHECK(cudaMalloc(&f->arena, counted));
    CUDA_CHECK(cudaMemset(f->arena, 0xa5, counted));
    arena.base = (uint8_t *)f->arena;
    arena.used = 0;
    sampling_lay_out(cuda, &arena);
    CHECK(arena.used == counted);
    must(sampling_open(cuda, &error), &error);
    CUDA_CHECK(cudaMalloc((void **)&cuda->logits, (size_t)head_rows * n_vocab * sizeof(float)));
    CUDA_CHECK(cudaMalloc((void **)&cuda->dev.header, sizeof(struct step_header)));
    CUDA_CHECK(cudaMalloc((void **)&cuda->dev.sample_head_row, max_samples * sizeof(uint32_t)));
    CUDA_CHECK(cudaHostAlloc((void **)&cuda->host.sample_head_row, max_samples * sizeof(uint32_t), cudaHostAllocDefault));
    cuda->host.header = &f->header;
    cudaGraph_t graph;
    struct step_shape shape = {};
    shape.samples = max_samples;
    CUDA_CHECK(cudaStreamBeginCapture(cuda->stream, cudaStreamCaptureModeThreadLocal));
    sampling_run(cuda, &shape);
    CUDA_CHECK(cudaStreamEndCapture(cuda->stream, &graph));
    CUDA_CHECK(cudaGraphInstantiate(&f->graph, graph, 0));
    CUDA_CHECK(cudaGraphDestroy(graph));
}

static void fixture_close(struct fixture *f) {
    CUDA_CHECK(cudaStreamSynchronize(f->cuda.stream));
    sampling_close(&f->cuda);
    CUDA_CHECK(cudaGraphExecDestroy(f->graph));
    CUDA_CHECK(cudaFree(f->cuda.logits));
    CUDA_CHECK(cudaFree(f->cuda.dev.header));
    CUDA_CHECK(cudaFree(f->cuda.dev.sample_head_row));
    CUDA_CHECK(cudaFreeHost(f->cuda.host.sample_head_row));
    CUDA_CHECK(cudaFree(f->arena));
    CUDA_CHECK(cudaStreamDestroy(f->cuda.stream));
}

static void send_step(struct fixture *f, const struct batch *batch, uint32_t n_head_rows) {
    struct cuda *cuda = &f->cuda;
    f->header.n_samples = batch->n_samples;
    f->header.n_head_rows = n_head_rows;
    for (uint32_t i = 0; i < batch->n_samples; i++) cuda->host.sample_head_row[i] = batch->samples[i].row;
    CUDA_CHECK(cudaMemcpyAsync(cuda->dev.header, &f->header, sizeof f->header, cudaMemcpyHostToDevice, cuda->stream));
    CUDA_CHECK(cudaMemcpyAsync(cuda->dev.sample_head_row, cuda->host.sample_head_row, batch->n_samples * sizeof(uint32_t), cudaMemcpyHostToDevice,
                               cuda->stream));
    struct delivery delivery = {};
    sampling_stage(cuda, batch, &delivery);
    deliver(cuda, &delivery);
    CUDA_CHECK(cudaStreamSynchronize(cuda->stream));
}

/* ---- cases ---- */

static struct random source;

static float unit(void) { return random_unit(random_next(&source)); }
static float pick(const float *from, uint32_t n) { return from[random_below(&source, n)]; }
#define PICK(...) pick((const float[]){__VA_ARGS__}, sizeof((const float[]){__VA_ARGS__}) / sizeof(float))

static void fill(float *logits, uint32_t n) {
    const uint32_t kind = random_below(&source, 16);
    const float spread = PICK(0, 1, 8, 20, 40, 200), step = PICK(0.01f, 0.25f, 2);
    for (uint32_t i = 0; i < n; i++) {
        float a = unit() + unit() + unit(), b = unit();
        logits[i] = spread * (a / 3 + b * b * b * b - 0.5f);
        if (kind >= 12) logits[i] = roundf(logits[i] / step) * step; /* ties */
    }
    if (kind < 4) { /* no numbers, few or many */
        const uint32_t odds = kind == 0 ? 2 : kind == 1 ? 50 : n + 1;
        for (uint32_t i = 0; i < n; i++)
            if (random_below(&source, odds) == 0) logits[i] = PICK(NAN, INFINITY, -INFINITY, -NAN, FLT_MAX, -FLT_MAX, 0, 1e-40f, -1e-40f);
    }
    if (kind == 4) /* nothing finite */
        for (uint32_t i = 0; i < n; i++) logits[i] = PICK(NAN, -INFINITY, -INFINITY, -INFINITY);
    if (kind == 5) /* no more than one */
        for (uint32_t i = 0, one = random_below(&source, n); i < n; i++)
            if (i != one) logits[i] = PICK(NAN, -INFINITY);
    if (kind == 6) { /* one far above, or the last */
        logits[random_below(&source, n)] = 60;
        logits[n - 1] = PICK(60, 59, -60);
    }
}

struct request_case {
    struct sampling sampling;
    struct logit_bias bias[BIASES];
    int32_t banned[BANNED];
};

static int32_t some_token(uint32_t n_vocab) {
    return random_below(&source, 20) == 0 ? (int32_t)random_next(&source) : (int32_t)random_below(&source, n_vocab);
}

static void make_request(struct request_case *r, uint32_t n_vocab) {
    struct sampling *s = &r->sampling;
    memset((void *)r, 0, sizeof *r);
    s->temperature = PICK(0, 0, 0.1f, 0.7f, 1, 1, 1.7f, 30, 1e-30f);
    s->top_p = PICK(1, 1, 0.95f, 0.9f, 0.5f, 0.01f, 1e-6f, 0.99999f);
    s->min_p = PICK(0, 0, 0, 0.001f, 0.05f, 0.9f, 1);
    s->top_k = (int32_t)PICK(0, 0, 1, 7, 40, 300, 3000, 1e9f);
    s->repetition_penalty = PICK(1, 1, 1.2f, 0.8f, 0.01f);
    s->presence_penalty = PICK(0, 0, 0.5f, -1);
    s->frequency_penalty = PICK(0, 0, 0.25f, -0.3f);
    s->seed = random_next(&source);
    s->n_top = (int32_t)PICK(-1, -1, 0, 1, 5, 20);
    s->bias = r->bias;
    s->banned = r->banned;
    s->n_bias = (uint32_t)PICK(0, 0, 1, 3, BIASES);
    s->n_banned = (uint32_t)PICK(0, 2, BANNED);
    for (uint32_t i = 0; i < BIASES; i++) r->bias[i] = {some_token(i < 3 ? n_vocab : n_vocab < 9 ? n_vocab : 9), 8 * unit() - 4};
    if (random_below(&source, 8) == 0) r->bias[0].bias = PICK(-INFINITY, 100, -100, FLT_MAX);
    for (uint32_t i = 0; i < BANNED; i++)
        r->banned[i] = i < n_vocab && n_vocab < BANNED ? (int32_t)i : some_token(n_vocab); /* all of a small vocabulary */
}

static void print_sample(const struct sample *sample, uint32_t n_vocab, uint32_t index) {
    const struct sampling *s = sample->sampling;
    printf("  sample %u of row %u, %u tokens: temperature %g top_k %d top_p %g min_p %g repetition %g presence %g frequency %g biases %u banned %u "
           "(%s) n_top %d target %d history %u + %u\n",
           index, sample->row, n_vocab, (double)s->temperature, s->top_k, (double)s->top_p, (double)s->min_p, (double)s->repetition_penalty,
           (double)s->presence_penalty, (double)s->frequency_penalty, s->n_bias, s->n_banned, sample->ban ? "on" : "off", s->n_top, sample->target,
           sample->n_prompt, sample->n_history - sample->n_prompt);
}

static bool is_near(float a, float b) { return a == b || fabs((double)a - (double)b) <= 1e-4 * fmax(1, fabs((double)b)); }

/* Tokens are equal, numbers are near. */
static bool is_same(const struct sample_result *got, const struct sample_result *expected) {
    if (got->token != expected->token || !is_near(got->logprob, expected->logprob) || got->n_top != expected->n_top) return false;
    for (int32_t i = 0; i < expected->n_top; i++)
        if (got->top[i].token != expected->top[i].token || !is_near(got->top[i].logprob, expected->top[i].logprob)) return false;
    return true;
}

static void report(const char *how, const struct sample *sample, uint32_t index, uint32_t n_vocab, const struct sample_result *got,
                   const struct sample_result *expected) {
    if (failures++ >= REPORTED) return;
    printf("DIFFERS (%s): token %d, expected %d; logprob %g, expected %g; n_top %d, expected %d\n", how, got->token, expected->token,
           (double)got->logprob, (double)expected->logprob, got->n_top, expected->n_top);
    for (int32_t i = 0; i < expected->n_top && i < got->n_top; i++)
        if (got->top[i].token != expected->top[i].token || !is_near(got->top[i].logprob, expected->top[i].logprob)) {
            printf("  top %d: token %d (%g), expected %d (%g)\n", i, got->top[i].token, (double)got->top[i].logprob, expected->top[i].token,
                   (double)expected->top[i].logprob);
            break;
        }
    print_sample(sample, n_vocab, index);
}

/* Samples the step, logits [n_rows] being on the device: launched, from the graph, or in parts of `logits` as a step with many head rows is. */
static void run_step(struct fixture *f, const struct batch *batch, const float *logits, uint32_t n_rows, uint32_t way) {
    struct cuda *cuda = &f->cuda;
    struct step_shape shape = {};
    const uint32_t part_rows = way == 2 ? 2 : n_rows;
    if (way == 1) {
        CUDA_CHECK(cudaGraphLaunch(f->graph, cuda->stream));
        return;
    }
    cuda->max_head_rows = part_rows;
    if (way == 2)
        CUDA_CHECK(cudaMemsetAsync(cuda->logits, 0x40, (size_t)ROWS * f->program.n_vocab * sizeof *logits, cuda->stream)); /* no row where it was */
    for (uint32_t first = 0; first < n_rows; first += part_rows) {
        const uint32_t rows = n_rows - first < part_rows ? n_rows - first : part_rows;
        shape.first_head_row = first;
        shape.first_sample += shape.samples;
        shape.samples = 0;
        for (uint32_t i = 0; i < batch->n_samples; i++) shape.samples += batch->samples[i].row >= first && batch->samples[i].row < first + rows;
        if (way == 2)
            CUDA_CHECK(cudaMemcpyAsync(cuda->logits, logits + (size_t)first * f->program.n_vocab, (size_t)rows * f->program.n_vocab * sizeof *logits,
                                       cudaMemcpyHostToDevice, cuda->stream));
        sampling_run(cuda, &shape);
    }
    cuda->max_head_rows = ROWS;
}

/* One step: random rows, samples and requests. */
static void check_step(struct fixture *f, uint32_t number, bool long_histories, const char *how) {
    static struct request_case requests[SAMPLES];
    static int32_t history[LONG_HISTORY];
    const uint32_t n_vocab = f->program.n_vocab, n = 1 + random_below(&source, SAMPLES),
                   n_rows = 1 + random_below(&source, n < ROWS ? n : (uint32_t)ROWS);
    const size_t logits_bytes = (size_t)n_rows * n_vocab * sizeof(float);
    float *logits = (float *)check_calloc((size_t)n_rows * n_vocab, sizeof *logits),
          *copy = (float *)check_calloc((size_t)n_rows * n_vocab, sizeof *copy);
    float *scratch = (float *)check_calloc(sampler_scratch_floats(n_vocab), sizeof *scratch);
    struct sample samples[SAMPLES];
    struct sample_result results[SAMPLES], expected;
    for (uint32_t row = 0; row < n_rows; row++) fill(logits + (size_t)row * n_vocab, n_vocab);
    for (uint32_t i = 0; i < LONG_HISTORY; i++) history[i] = some_token(i % 2 && n_vocab > 5 ? 5 : n_vocab);
    for (uint32_t i = 0; i < n; i++) {
        struct sample *sample = &samples[i];
        const bool again = i > 0 && random_below(&source, 3) == 0; /* another choice of the request before */
        if (!again) make_request(&requests[i], n_vocab);
        const uint32_t n_history = long_histories ? (uint32_t)LONG_HISTORY : random_below(&source, HISTORY + 1);
        memset((void *)sample, 0, sizeof *sample);
        sample->row = i < n_rows ? i : n_rows - 1;
        sample->sampling = again ? samples[i - 1].sampling : &requests[i].sampling;
        sample->choice = i;
        sample->token_index = number;
        sample->ban = random_below(&source, 2);
        sample->target = random_below(&source, 6) == 0 ? (int32_t)random_below(&source, n_vocab) : -1;
        sample->history = history;
        sample->n_history = again && random_below(&source, 2) ? samples[i - 1].n_history : n_history;
        sample->n_prompt =
            again && sample->n_history == samples[i - 1].n_history ? samples[i - 1].n_prompt : random_below(&source, sample->n_history + 1);
    }
    struct batch batch = {};
    batch.n_samples = n;
    batch.samples = samples;
    CUDA_CHECK(cudaMemcpyAsync(f->cuda.logits, logits, logits_bytes, cudaMemcpyHostToDevice, f->cuda.stream));
    send_step(f, &batch, n_rows);
    run_step(f, &batch, logits, n_rows, number % 3);
    CUDA_CHECK(cudaStreamSynchronize(f->cuda.stream));
    memset((void *)results, 0x5a, sizeof results);
    sampling_collect(&f->cuda, 0, &batch, results);
    CUDA_CHECK(cudaMemcpyAsync(copy, f->cuda.logits, logits_bytes, cudaMemcpyDeviceToHost, f->cuda.stream));
    CUDA_CHECK(cudaStreamSynchronize(f->cuda.stream));
    if (number % 3 != 2 && memcmp(copy, logits, logits_bytes) != 0 && failures++ < REPORTED)
        printf("DIFFERS (%s): logits were written, %u tokens\n", how, n_vocab);
    for (uint32_t i = 0; i < n; i++) {
        memcpy(copy, logits + (size_t)samples[i].row * n_vocab, n_vocab * sizeof *copy);
        sampler_sample(&samples[i], copy, n_vocab, scratch, &expected);
        if (!is_same(&results[i], &expected)) report(how, &samples[i], i, n_vocab, &results[i], &expected);
    }
    free(logits);
    free(copy);
    free(scratch);
}

static uint32_t check_vocabulary(uint32_t n_vocab, uint32_t steps, bool clusters, bool long_histories) {
    static struct fixture f;
    char how[64];
    const uint32_t before = failures;
    snprintf(how, sizeof how, "%s%s", clusters ? "clusters" : "single blocks", long_histories ? ", long histories" : "");
    fixture_open(&f, n_vocab, ROWS, SAMPLES, clusters);
    for (uint32_t i = 0; i < steps; i++) check_step(&f, i, long_histories, how);
    fixture_close(&f);
    printf("%7u tokens, %s: %u steps, %u differences\n", n_vocab, how, steps, failures - before);
    fflush(stdout);
    return failures - before;
}

/* `cases`: samples, about, of the smaller vocabularies; larger ones get fewer. */
static int check(uint32_t cases, uint64_t seed) {
    const uint32_t small[] = {1, 2, 32, 33, 200, 1000, 5000}, large[] = {8193, 20001, 32000, 49152, 128256, 151936, 262144};
    const uint32_t steps = cases / 12 + 1, large_steps = cases < 100 ? 1 : cases / 200 + 6;
    source = {seed};
    for (int clusters = 1; clusters >= 0; clusters--) {
        for (uint32_t i = 0; i < sizeof small / sizeof *small; i++) check_vocabulary(small[i], steps, clusters, false);
        for (uint32_t i = 0; i < sizeof large / sizeof *large; i++) check_vocabulary(large[i], large_steps, clusters, false);
        check_vocabulary(5000, large_steps, clusters, true); /* together longer than the buffer for lists: some are sampled by the host */
        check_vocabulary(49152, large_steps, clusters, true);
    }
    printf("sample: %u differences\n", failures);
    return failures > 0;
}

/* ---- bench ---- */

enum { BENCH_VOCAB = 128256, BENCH_ROWS = 256, BENCH_REPEATS = 20, BENCH_RUNS = 15 };

static int ascending(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

/* Microseconds of one of BENCH_REPEATS launches in a graph. */
static float time_graph(cudaGraphExec_t graph, cudaStream_t stream) {
    cudaEvent_t begin, end;
    float us[BENCH_RUNS];
    CUDA_CHECK(cudaEventCreate(&begin));
    CUDA_CHECK(cudaEventCreate(&end));
    for (int i = -3; i < BENCH_RUNS; i++) {
        float ms;
        CUDA_CHECK(cudaEventRecord(begin, stream));
        CUDA_CHECK(cudaGraphLaunch(graph, stream));
        CUDA_CHECK(cudaEventRecord(end, stream));
        CUDA_CHECK(cudaEventSynchronize(end));
        CUDA_CHECK(cudaEventElapsedTime(&ms, begin, end));
        if (i >= 0) us[i] = ms * 1000 / (float)BENCH_REPEATS;
    }
    CUDA_CHECK(cudaEventDestroy(begin));
    CUDA_CHECK(cudaEventDestroy(end));
    qsort(us, BENCH_RUNS, sizeof *us, ascending);
    return us[BENCH_RUNS / 2];
}

static double copy_gb_s(cudaStream_t stream) {
    const size_t bytes = (size_t)256 << 20;
    uint8_t *a, *b;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    CUDA_CHECK(cudaMalloc((void **)&a, bytes));
    CUDA_CHECK(cudaMalloc((void **)&b, bytes));
    CUDA_CHECK(cudaMemset(a, 0x3c, bytes));
    CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < BENCH_REPEATS; i++) CUDA_CHECK(cudaMemcpyAsync(b, a, bytes, cudaMemcpyDeviceToDevice, stream));
    CUDA_CHECK(cudaStreamEndCapture(stream, &graph));
    CUDA_CHECK(cudaGraphInstantiate(&exec, graph, 0));
    const double us = (double)time_graph(exec, stream);
    CUDA_CHECK(cudaGraphExecDestroy(exec));
    CUDA_CHECK(cudaGraphDestroy(graph));
    CUDA_CHECK(cudaFree(a));
    CUDA_CHECK(cudaFree(b));
    return 2 * (double)bytes / us / 1e3;
}

static void bench_case(struct fixture *f, const char *name, const struct sampling *sampling, uint32_t n, double copy, bool clusters) {
    static struct sample samples[BENCH_ROWS];
    struct batch batch = {};
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    struct step_shape shape = {};
    shape.samples = n;
    for (uint32_t i = 0; i < n; i++) {
        memset((void *)&samples[i], 0, sizeof samples[i]);
        samples[i].row = samples[i].choice = i;
        samples[i].sampling = sampling;
        samples[i].target = -1;
    }
    batch.n_samples = n;
    batch.samples = samples;
    send_step(f, &batch, n);
    CUDA_CHECK(cudaStreamBeginCapture(f->cuda.stream, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < BENCH_REPEATS; i++) sampling_run(&f->cuda, &shape);
    CUDA_CHECK(cudaStreamEndCapture(f->cuda.stream, &graph));
    CUDA_CHECK(cudaGraphInstantiate(&exec, graph, 0));
    const double us = (double)time_graph(exec, f->cuda.stream), bytes = (double)n * (double)BENCH_VOCAB * sizeof(float);
    printf("%-13s %-22s %3u samples of %u: %8.1f us  %6.1f MB  %7.1f GB/s  %5.1f %% of copy\n", clusters ? "clusters" : "single blocks", name, n,
           (uint32_t)BENCH_VOCAB, us, bytes / 1e6, bytes / us / 1e3, 100 * bytes / us / 1e3 / copy);
    CUDA_CHECK(cudaGraphExecDestroy(exec));
    CUDA_CHECK(cudaGraphDestroy(graph));
}

static int bench(void) {
    static struct fixture f;
    struct sampling plain = {};
    plain.temperature = 1;
    plain.top_p = 1;
    plain.repetition_penalty = 1;
    plain.n_top = -1;
    struct sampling greedy = plain, top_p = plain, top_k = plain, top_5 = plain;
    greedy.temperature = 0;
    top_p.top_p = 0.9f;
    top_k.top_k = 40;
    top_k.top_p = 0.9f;
    top_5.temperature = 0;
    top_5.n_top = 5;
    const struct {
        const char *name;
        const struct sampling *sampling;
    } cases[] = {
        {"greedy", &greedy}, {"temperature 1", &plain}, {"top-p 0.9", &top_p}, {"top-k 40, top-p 0.9", &top_k}, {"greedy, 5 logprobs", &top_5}};
    float *logits = (float *)check_calloc((size_t)BENCH_ROWS * BENCH_VOCAB, sizeof *logits);
    source = {7};
    for (size_t i = 0; i < (size_t)BENCH_ROWS * BENCH_VOCAB; i++) { /* a bell of width 2 and a tail, as models have */
        float bell = 4 * (unit() + unit() + unit() - 1.5f), tail = unit();
        logits[i] = bell + (tail > 0.9998f ? 14 * unit() : 0);
    }
    for (int clusters = 1; clusters >= 0; clusters--) {
        fixture_open(&f, BENCH_VOCAB, BENCH_ROWS, BENCH_ROWS, clusters);
        CUDA_CHECK(cudaMemcpy(f.cuda.logits, logits, (size_t)BENCH_ROWS * BENCH_VOCAB * sizeof *logits, cudaMemcpyHostToDevice));
        const double copy = copy_gb_s(f.cuda.stream);
        if (clusters) printf("%s: device-to-device copy %.0f GB/s\n", f.cuda.properties.name, copy);
        for (uint32_t i = 0; i < sizeof cases / sizeof *cases; i++)
            for (uint32_t n = 1; n <= 256; n = n == 1 ? 64 : n * 4) bench_case(&f, cases[i].name, cases[i].sampling, n, copy, clusters);
        fixture_close(&f);
    }
    free(logits);
    return 0;
}

int main(int argc, char **argv) {
    int n_devices = 0;
    if (cudaGetDeviceCount(&n_devices) != cudaSuccess || n_devices == 0) {
        printf("SKIP: no CUDA device\n");
        return 77;
    }
    if (argc >= 2 && strcmp(argv[1], "--check") == 0)
        return check(argc > 2 ? (uint32_t)strtoul(argv[2], NULL, 10) : 3000, argc > 3 ? strtoull(argv[3], NULL, 10) : 1);
    if (argc == 2 && strcmp(argv[1], "--bench") == 0) return bench();
    fprintf(stderr, "usage: sample --check [CASES [SEED]] | --bench\n");
    return 2;
}

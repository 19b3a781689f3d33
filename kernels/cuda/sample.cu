/* From logits to tokens: parameters to the device, one launch, results back. Owns struct sampling_device: pinned memory on the host; on the device one buffer of parameters and lists, and
 * copies of rows where shared memory has no room for them. The engine's thread. How a row is sampled: sample_team.cuh. Random numbers and logarithms are the host's.
 *
 * Parameters and lists (biases, bans, histories) of a step lie in one pinned buffer, one behind the other, and go to the device in one copy of just their size; sampling_stage enqueues
 * it before the step's launches, so that no graph contains it. Kernels write results straight into pinned memory: 32 bytes a sample, alternatives where they are asked for. They are there
 * when the stream has been waited for, and a graph needs no copy.
 *
 * Only penalties need histories; without a repetition penalty, of a history only what was generated. Samples of one request share its lists. The buffer is bounded (LIST_WORDS_...), requests are not: a
 * sample whose lists do not fit any more is sampled by the host after the step, from its row, by the function that the device follows to the bit. That takes a millisecond instead of
 * microseconds, and is needed only where penalised histories of a step exceed millions of tokens. */
#include "kernels/cuda/sample_team.cuh"

#include "kernels/cuda/cuda.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

extern "C" {
#include "base/random.h"
}

enum {
    CHUNK_MIN = 4096, /* tokens of a rank: below, a cluster's barriers cost more than the reading they divide */
    SCRATCH_TEAMS = 64,
    LIST_WORDS_MIN = 1 << 16, /* lists of a step */
    LIST_WORDS_SEQUENCE = 1 << 14,
    LIST_WORDS_MAX = 1 << 22,
};

struct sampling_device {
    uint32_t ranks, chunk;
    size_t shared_bytes;
    uint32_t max_samples, n_vocab;
    uint32_t list_words;    /* capacity */
    uint32_t *stage_device; /* parameters of a step's samples, then its lists */
    float *scratch;         /* [SCRATCH_TEAMS][n_vocab] or NULL */
    /* pinned */
    uint32_t *stage;
    struct sample_answer *answers; /* [max_samples] */
    struct sample_place *tops;     /* [max_samples][SAMPLE_TOP_MAX] */
    /* the host's own, for what does not fit: made when first needed */
    float *host_row, *host_scratch;
};

static_assert(sizeof(struct sample_params) == 80 && sizeof(struct sample_answer) == 32 && sizeof(struct sample_place) == 8, "as kernels read and write them");
static_assert(sizeof(struct team_shared) % 16 == 0 && offsetof(struct team_shared, list) == MARKS_MAX * sizeof(uint32_t), "marks take the place of the histograms");
static_assert(BINS % THREADS == 0 && BINS % RANKS_MAX == 0 && BINS == 1 << BIN_BITS, "histograms are divided evenly");

static __global__ void __launch_bounds__(THREADS, 2) sample_kernel(const struct sampling_args args) { sample_all(&args); }

/* ---- sizes ---- */

static uint32_t chunk_of(uint32_t n_vocab, uint32_t ranks) { return div_up(div_up(n_vocab, ranks), 4) * 4; }
static size_t shared_bytes_of(uint32_t chunk) { return sizeof(struct team_shared) + (size_t)chunk * sizeof(float); }

static uint32_t ranks_of(const struct cuda *cuda) {
    uint32_t ranks = 1;
    if (cuda->properties.major < 9) return 1;
    while (ranks < RANKS_MAX && cuda->program->n_vocab > ranks * CHUNK_MIN) ranks *= 2;
    return ranks;
}

static bool is_copied_to_shared(const struct cuda *cuda, uint32_t ranks) {
    return shared_bytes_of(chunk_of(cuda->program->n_vocab, ranks)) <= cuda->properties.sharedMemPerBlockOptin;
}

static uint32_t list_words_of(const struct cuda *cuda) {
    uint64_t words = (uint64_t)cuda->limits.max_sequences * LIST_WORDS_SEQUENCE;
    if (words < LIST_WORDS_MIN) return LIST_WORDS_MIN;
    return words > LIST_WORDS_MAX ? (uint32_t)LIST_WORDS_MAX : (uint32_t)words;
}

static uint32_t scratch_teams_of(const struct cuda *cuda) { return cuda->limits.max_samples < SCRATCH_TEAMS ? cuda->limits.max_samples : (uint32_t)SCRATCH_TEAMS; }

static size_t stage_words(const struct cuda *cuda) { return (size_t)cuda->limits.max_samples * PARAMS_WORDS + list_words_of(cuda); }

/* Reads program, limits and properties. Counting makes nothing; with a base, what it makes is sampling_close's to free. */
void sampling_lay_out(struct cuda *cuda, struct device_arena *arena) {
    const uint32_t ranks = ranks_of(cuda);
    const bool copied = is_copied_to_shared(cuda, ranks);
    uint32_t *stage = (uint32_t *)device_take(arena, stage_words(cuda), sizeof(uint32_t));
    float *scratch = copied ? NULL : (float *)device_take(arena, (size_t)scratch_teams_of(cuda) * cuda->program->n_vocab, sizeof(float));
    if (!arena->base) return;
    CHECK(cuda->program->n_vocab > 0 && cuda->program->n_vocab < 1u << 23);
    if (!cuda->sampling) cuda->sampling = (struct sampling_device *)check_calloc(1, sizeof *cuda->sampling);
    struct sampling_device *s = cuda->sampling;
    s->ranks = copied ? ranks : 1;
    s->chunk = chunk_of(cuda->program->n_vocab, s->ranks);
    s->shared_bytes = copied ? shared_bytes_of(s->chunk) : sizeof(struct team_shared);
    s->max_samples = cuda->limits.max_samples;
    s->n_vocab = cuda->program->n_vocab;
    s->list_words = list_words_of(cuda);
    s->stage_device = stage;
    s->scratch = scratch;
}

static void configure(struct cuda *cuda, uint32_t samples, cudaLaunchConfig_t *config, cudaLaunchAttribute *cluster) {
    const struct sampling_device *s = cuda->sampling;
    const uint32_t teams = s->scratch && samples > SCRATCH_TEAMS ? (uint32_t)SCRATCH_TEAMS : samples;
    *config = {};
    config->gridDim = dim3(teams * s->ranks);
    config->blockDim = dim3(THREADS);
    config->dynamicSmemBytes = s->shared_bytes;
    config->stream = cuda->stream;
    if (s->ranks == 1) return;
    cluster->id = cudaLaunchAttributeClusterDimension;
    cluster->val.clusterDim = {s->ranks, 1, 1};
    config->attrs = cluster;
    config->numAttrs = 1;
}

/* Parts of a device may have no room for a cluster of 8. */
static enum status fit_cluster(struct cuda *cuda, struct error *error) {
    struct sampling_device *s = cuda->sampling;
    for (;;) {
        cudaLaunchConfig_t config;
        cudaLaunchAttribute cluster;
        int clusters = 0;
        CUDA_TRY(error, cudaFuncSetAttribute(sample_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)s->shared_bytes));
        if (s->ranks == 1) return STATUS_OK;
        configure(cuda, 1, &config, &cluster);
        CUDA_TRY(error, cudaOccupancyMaxActiveClusters(&clusters, sample_kernel, &config));
        if (clusters > 0) return STATUS_OK;
        if (!is_copied_to_shared(cuda, s->ranks / 2))
            return error_set(error, STATUS_DEVICE, "%s: no room for %u blocks that sample together from %u tokens", cuda->properties.name, s->ranks, s->n_vocab);
        s->ranks /= 2;
        s->chunk = chunk_of(s->n_vocab, s->ranks);
        s->shared_bytes = shared_bytes_of(s->chunk);
    }
}

enum status sampling_open(struct cuda *cuda, struct error *error) {
    struct sampling_device *s = cuda->sampling;
    const size_t words = stage_words(cuda);
    CUDA_TRY(error, cudaHostAlloc((void **)&s->stage, words * sizeof(uint32_t), cudaHostAllocDefault));
    CUDA_TRY(error, cudaHostAlloc((void **)&s->answers, s->max_samples * sizeof *s->answers, cudaHostAllocMapped));
    CUDA_TRY(error, cudaHostAlloc((void **)&s->tops, (size_t)s->max_samples * SAMPLE_TOP_MAX * sizeof *s->tops, cudaHostAllocMapped));
    return fit_cluster(cuda, error);
}

void sampling_close(struct cuda *cuda) {
    struct sampling_device *s = cuda->sampling;
    if (!s) return;
    if (s->stage) cudaFreeHost(s->stage);
    if (s->answers) cudaFreeHost(s->answers);
    if (s->tops) cudaFreeHost(s->tops);
    free(s->host_row);
    free(s->host_scratch);
    free(s);
    cuda->sampling = NULL;
}

/* ---- a step ---- */

/* The lists of a step while they are laid down. */
struct lists {
    uint32_t *words; /* the buffer; indices count from its beginning */
    uint32_t used, end;
};

/* Room for `count` words; false: there is none. */
static bool lists_take(struct lists *lists, uint32_t count, uint32_t *at) {
    if (count > lists->end - lists->used) return false;
    *at = lists->used;
    lists->used += count;
    return true;
}

static bool penalizes(const struct sampling *s) { return s->repetition_penalty != 1 || s->presence_penalty != 0 || s->frequency_penalty != 0; }

static bool stage_biases(struct lists *lists, const struct sampling *s, struct sample_params *p) {
    p->n_bias = s->n_bias;
    if (s->n_bias > UINT32_MAX / 2 || !lists_take(lists, 2 * s->n_bias, &p->bias_at)) return false;
    for (uint32_t i = 0; i < s->n_bias; i++) {
        memcpy(lists->words + p->bias_at + 2 * i, &s->bias[i].token, sizeof(uint32_t));
        memcpy(lists->words + p->bias_at + 2 * i + 1, &s->bias[i].bias, sizeof(uint32_t));
    }
    return true;
}

static bool stage_banned(struct lists *lists, const struct sampling *s, struct sample_params *p) {
    p->n_banned = s->n_banned;
    if (!lists_take(lists, s->n_banned, &p->banned_at)) return false;
    if (s->n_banned > 0) memcpy(lists->words + p->banned_at, s->banned, s->n_banned * sizeof(uint32_t));
    return true;
}

static bool stage_history(struct lists *lists, const struct sample *sample, struct sample_params *p) {
    const uint32_t n_prompt = sample->n_prompt < sample->n_history ? sample->n_prompt : sample->n_history;
    const uint32_t skipped = sample->sampling->repetition_penalty == 1 ? n_prompt : 0; /* presence and frequency look at what was generated */
    p->n_history = sample->n_history - skipped;
    p->n_prompt = n_prompt - skipped;
    if (!lists_take(lists, p->n_history, &p->history_at)) return false;
    if (p->n_history > 0) memcpy(lists->words + p->history_at, sample->history + skipped, p->n_history * sizeof(uint32_t));
    return true;
}

/* `before`: the sample before, whose lists may serve again; NULL: there is none. Returns false if there is no room. */
static bool stage_lists(struct lists *lists, const struct sample *sample, const struct sample *before, const struct sample_params *before_p, struct sample_params *p) {
    const struct sampling *s = sample->sampling;
    const bool same = before && before->sampling == s && before->target < 0 && !before_p->on_host;
    if (same) {
        p->bias_at = before_p->bias_at;
        p->n_bias = before_p->n_bias;
    } else if (!stage_biases(lists, s, p)) {
        return false;
    }
    if (same && before->ban && sample->ban) {
        p->banned_at = before_p->banned_at;
        p->n_banned = before_p->n_banned;
    } else if (sample->ban && !stage_banned(lists, s, p)) {
        return false;
    }
    if (!penalizes(s)) return true;
    if (same && before->history == sample->history && before->n_prompt == sample->n_prompt && before->n_history == sample->n_history) {
        p->history_at = before_p->history_at;
        p->n_prompt = before_p->n_prompt;
        p->n_history = before_p->n_history;
        return true;
    }
    return stage_history(lists, sample, p);
}

void sampling_stage(struct cuda *cuda, const struct batch *batch) {
    struct sampling_device *s = cuda->sampling;
    struct sample_params *params = (struct sample_params *)(void *)s->stage;
    const uint32_t first = batch->n_samples * (uint32_t)PARAMS_WORDS;
    struct lists lists = {s->stage, first, first + s->list_words};
    CHECK(batch->n_samples <= s->max_samples);
    if (batch->n_samples == 0) return;
    for (uint32_t i = 0; i < batch->n_samples; i++) {
        const struct sample *sample = &batch->samples[i];
        const struct sampling *from = sample->sampling;
        CHECK(from->n_top <= SAMPLE_TOP_MAX && sample->target < (int64_t)s->n_vocab);
        struct sample_params p = {};
        p.temperature = from->temperature;
        p.top_p = from->top_p;
        p.min_p = from->min_p;
        p.top_k = from->top_k;
        p.repetition = from->repetition_penalty;
        p.presence = from->presence_penalty;
        p.frequency = from->frequency_penalty;
        p.u = (uint32_t)(random_unit(random_at(from->seed, 0, sample->choice, sample->token_index)) * 0x1p24f);
        p.target = sample->target;
        p.n_top = from->n_top;
        const uint32_t used = lists.used;
        if (sample->target < 0 && !stage_lists(&lists, sample, i ? sample - 1 : NULL, i ? &params[i - 1] : NULL, &p)) {
            lists.used = used;
            p.on_host = 1;
        }
        params[i] = p;
    }
    CUDA_CHECK(cudaMemcpyAsync(s->stage_device, s->stage, lists.used * sizeof(uint32_t), cudaMemcpyHostToDevice, cuda->stream));
}

void sampling_run(struct cuda *cuda, const struct step_shape *shape) {
    struct sampling_device *s = cuda->sampling;
    CHECK(shape->samples <= s->max_samples);
    if (shape->samples == 0) return;
    struct sampling_args args = {};
    args.n_samples = &cuda->dev.header->n_samples;
    args.sample_head_row = cuda->dev.sample_head_row;
    args.logits = cuda->logits;
    args.stage = s->stage_device;
    args.scratch = s->scratch;
    args.answers = s->answers;
    args.tops = s->tops;
    args.n_vocab = s->n_vocab;
    args.ranks = s->ranks;
    args.chunk = s->chunk;
    cudaLaunchConfig_t config;
    cudaLaunchAttribute cluster;
    configure(cuda, shape->samples, &config, &cluster);
    CUDA_CHECK(cudaLaunchKernelEx(&config, sample_kernel, args));
}

/* ---- results ---- */

static void sample_on_host(struct cuda *cuda, const struct sample *sample, uint32_t head_row, struct sample_result *result) {
    struct sampling_device *s = cuda->sampling;
    if (!s->host_row) {
        s->host_row = (float *)check_calloc(s->n_vocab, sizeof(float));
        s->host_scratch = (float *)check_calloc(sampler_scratch_floats(s->n_vocab), sizeof(float));
    }
    CUDA_CHECK(cudaMemcpyAsync(s->host_row, cuda->logits + (size_t)head_row * s->n_vocab, s->n_vocab * sizeof(float), cudaMemcpyDeviceToHost, cuda->stream));
    CUDA_CHECK(cudaStreamSynchronize(cuda->stream));
    sampler_sample(sample, s->host_row, s->n_vocab, s->host_scratch, result);
}

static void collect(const struct sample *sample, const struct sample_answer *answer, const struct sample_place *tops, struct sample_result *result) {
    memset(result, 0, sizeof *result);
    result->token = sample->target >= 0 ? sample->target : answer->token;
    if (answer->kind == ANSWER_NO_LOGITS) {
        result->logprob = -INFINITY;
        return;
    }
    const double log_total = sample->sampling->n_top >= 0 || sample->target >= 0 ? log((double)answer->mass * 0x1p-40) : 0;
    result->n_top = (int32_t)answer->n_top;
    for (uint32_t i = 0; i < answer->n_top; i++) {
        result->top[i].token = tops[i].token;
        result->top[i].logprob = (float)((double)tops[i].logit - (double)answer->best - log_total);
    }
    result->logprob = answer->kind == ANSWER_NO_TOKEN ? -INFINITY : (float)((double)answer->logit - (double)answer->best - log_total);
}

void sampling_collect(struct cuda *cuda, const struct batch *batch, struct sample_result *results) {
    const struct sampling_device *s = cuda->sampling;
    const struct sample_params *params = (const struct sample_params *)(const void *)s->stage;
    for (uint32_t i = 0; i < batch->n_samples; i++) {
        if (params[i].on_host)
            sample_on_host(cuda, &batch->samples[i], cuda->host.sample_head_row[i], &results[i]);
        else
            collect(&batch->samples[i], &s->answers[i], &s->tops[(size_t)i * SAMPLE_TOP_MAX], &results[i]);
    }
}

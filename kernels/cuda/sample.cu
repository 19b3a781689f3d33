/* From logits to tokens: parameters to the device, one launch, results back. Owns struct sampling_device: pinned memory on the host; on the device one
 * buffer of parameters and lists, and copies of rows where shared memory has no room for them. The engine's thread. How a row is sampled is in
 * sample_team.cuh (what a team of blocks is, and the host's arithmetic), sample_row.cuh and sample_draw.cuh. Random numbers and logarithms are the host's.
 *
 * Parameters and lists (biases, bans, histories) of a step lie in one pinned buffer, one behind the other, of which the step's first kernel takes just what
 * there is (step.cu), before the launches that a graph may contain. Kernels write results straight into pinned memory: 32 bytes a
 * sample, and alternatives where they are asked for. They are there when the step has been waited for, and a graph needs no copy. What is pinned is there for
 * each of the two steps that may be in flight; the token alone also stays on the device, for a step that was submitted without waiting for it.
 *
 * Only penalties need histories; without a repetition penalty, of a history only what was generated. Neighbouring samples of one request share its lists.
 * The buffer is bounded (LIST_WORDS_...), requests are not: a sample whose lists do not fit any more is sampled by the host, from its row, by the function
 * that the device follows to the bit; after the step, or before its row of `logits` is another's. That takes a millisecond instead of microseconds, and is
 * needed only where penalised histories of one step exceed some 16,000 tokens a sequence or 4 million together. */
#include "kernels/cuda/sample_draw.cuh"
#include "kernels/cuda/sample_row.cuh"

#include "kernels/cuda/cuda.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

extern "C" {
#include "base/random.h"
}

enum {
    CHUNK_MIN = 4096, /* tokens of a rank: below, a cluster's barriers cost more than the reading they divide */
    RANKS_PORTABLE = 8,
    WIDE_SAMPLES = 8, /* up to so many, larger clusters leave no multiprocessor without work */
    SCRATCH_TEAMS = 64,
    LIST_WORDS_MIN = 1 << 16, /* lists of a step */
    LIST_WORDS_SEQUENCE = 1 << 14,
    LIST_WORDS_MAX = 1 << 22,
};

struct team_size {
    uint32_t ranks, chunk;
    size_t shared_bytes;
};

/* Of each step that may be in flight. */
struct sampling_flight {
    uint32_t *stage; /* pinned */
    const struct batch *batch;
    const uint32_t *head_row; /* the step's sample_head_row */
    uint32_t n_on_host;
    struct sample_result *host_results; /* [max_samples] */
};

struct sampling_device {
    struct team_size size, wide; /* of many samples; of up to WIDE_SAMPLES */
    uint32_t max_samples, n_vocab;
    uint32_t list_words;    /* capacity */
    uint32_t *stage_device; /* parameters of a step's samples, then its lists */
    float *scratch;         /* [SCRATCH_TEAMS][n_vocab] or NULL */
    /* pinned */
    struct sample_answer *answers; /* [FLIGHTS][max_samples] */
    struct sample_place *tops;     /* [FLIGHTS][max_samples][SAMPLE_TOP_MAX] */
    struct sampling_flight flights[FLIGHTS];
    float *host_row, *host_scratch; /* as host_results, for samples whose lists do not fit; made when first needed */
};
enum { HOST_TO_DO = 1, HOST_DONE }; /* sample_params.on_host; 0: the device's */

static_assert(sizeof(struct sample_params) == 80 && sizeof(struct sample_answer) == 32 && sizeof(struct sample_place) == 8,
              "as kernels read and write them");
static_assert(PARAMS_WORDS % 4 == 0 && LIST_WORDS_MIN % 4 == 0 && LIST_WORDS_SEQUENCE % 4 == 0 && LIST_WORDS_MAX % 4 == 0, "stage_words");
static_assert(sizeof(struct team_shared) % 16 == 0 && offsetof(struct team_shared, list) == MARKS_MAX * sizeof(uint32_t),
              "marks take the place of the histograms");
static_assert(sizeof(struct team_shared) <= SHARED_BYTES_UNASKED, "where there are no copies of rows, more shared memory is not asked for");
static_assert(BINS % THREADS == 0 && BINS % RANKS_MAX == 0 && RANKS_MAX <= 32 && BINS == 1 << BIN_BITS, "histograms are divided evenly");

/* ---- one sample ---- */

template <bool COPIED>
static __device__ void answer(const struct team<COPIED> *t, enum answer_kind kind, uint32_t token, uint32_t n_top, struct sample_answer *out,
                              int32_t *drawn) {
    if (t->rank != 0 || threadIdx.x != 0) return;
    struct sample_answer a = {0, (int32_t)token, 0, 0, n_top, (uint32_t)kind, 0};
    if (kind != ANSWER_NO_LOGITS && (block_memory()->params.n_top >= 0 || block_memory()->params.target >= 0)) {
        a.mass = offered_sum(t, EXCHANGE_MASS, t->ranks);
        a.best = ranked_value(offered_max(t, EXCHANGE_BEST));
        a.logit = clean(__ldg(t->raw + token)); /* rank 0 begins at token 0 */
    }
    *out = a;
    *drawn = a.token;
}

/* `word`: this thread's of the parameters; `place`: of answers. */
template <bool COPIED>
static __device__ void sample_row(const struct sampling_args *a, uint32_t sample, uint32_t place, uint32_t head_row, uint32_t word) {
    struct team_shared *s = block_memory();
    struct sample_params *p = &s->params;
    struct team<COPIED> *t = (struct team<COPIED> *)&s->team, own = {};
    own.cut = NO_KEY;
    own.ranks = a->ranks;
    own.rank = blockIdx.x % a->ranks;
    own.first = own.rank * a->chunk;
    own.count = min(a->chunk, a->n_vocab - own.first);
    own.raw = a->logits + (size_t)head_row * a->n_vocab + own.first;
    if (threadIdx.x < PARAMS_WORDS) ((uint32_t *)p)[threadIdx.x] = word;
    if (threadIdx.x < SELECTIONS) s->list_used[threadIdx.x] = 0;
    __syncthreads();
    if (p->on_host) return;
    cluster_arrive();
    const bool report = p->n_top >= 0 || p->target >= 0, draws = p->target < 0, adjusted = draws && (p->n_bias || p->n_banned || p->n_history);
    own.own = adjusted || (COPIED && (report || (draws && p->temperature != 0))); /* else reading once, or again, is cheaper */
    own.values = own.own && !COPIED ? a->scratch + (size_t)(blockIdx.x / a->ranks) * a->n_vocab : (float *)own.raw;
    if (threadIdx.x == 0) *t = own;
    struct sample_answer *out = &a->answers[place];
    int32_t *drawn = &a->drawn[sample];

    const struct seen seen = read_row(&own, a->n_vocab % 4 == 0);
    uint64_t best = block_max(s, 0, ranked(seen.best, seen.token));
    const bool finite = __syncthreads_or(seen.finite);
    cluster_wait(); /* all ranks are there */
    offer(t, EXCHANGE_BEST, best);
    offer(t, EXCHANGE_FINITE, finite);
    team_sync();
    best = offered_max(t, EXCHANGE_BEST);
    if (offered_max(t, EXCHANGE_FINITE) == 0) {
        answer(t, ANSWER_NO_LOGITS, 0, 0, out, drawn);
        return;
    }
    uint32_t n_top = 0;
    if (report) {
        offer(t, EXCHANGE_MASS, block_sum(s, sum_of_exponentials(t, ranked_value(best))));
        if (p->n_top > 0) offer_tops(t, (uint32_t)p->n_top);
        team_sync();
        if (p->n_top > 0 && t->rank == 0) n_top = report_tops(t, (uint32_t)p->n_top, a->tops + (size_t)place * SAMPLE_TOP_MAX);
    }
    if (!draws) {
        answer(t, ANSWER_TOKEN, (uint32_t)p->target, n_top, out, drawn);
        return;
    }
    if (adjusted) {
        adjust(t, a->stage);
        best = block_max(s, 1, best_value(t));
        offer(t, EXCHANGE_ADJUSTED, best);
        team_sync();
        best = offered_max(t, EXCHANGE_ADJUSTED);
        if (ranked_value(best) == -INFINITY) {
            answer(t, ANSWER_NO_TOKEN, 0, n_top, out, drawn);
            return;
        }
    }
    const uint32_t token = p->temperature == 0 ? ranked_token(best) : draw(t, best);
    answer(t, ANSWER_TOKEN, token, n_top, out, drawn);
}

template <bool COPIED> static __global__ void __launch_bounds__(THREADS, 2) sample_kernel(const struct sampling_args args) {
    const struct sampling_args *a = &args;
    const uint32_t teams = gridDim.x / a->ranks;
    for (uint32_t sample = a->first_sample + blockIdx.x / a->ranks;; sample += teams) {
        /* All loads in flight at once, wanted or not: a grid may be larger than the step. */
        const uint32_t end = min(__ldg(a->n_samples), a->end_sample), at = min(sample, a->max_samples - 1), head_row = __ldg(a->sample_head_row + at);
        const uint32_t flight = __ldg(a->flight);
        const uint32_t word = threadIdx.x < PARAMS_WORDS ? __ldg(a->stage + at * PARAMS_WORDS + threadIdx.x) : 0;
        if (sample >= end) return;
        sample_row<COPIED>(a, sample, flight * a->max_samples + sample, head_row - a->first_head_row, word);
        if (sample + teams >= end) return;
        team_sync(); /* nobody reads this sample's exchange any more */
    }
}

/* ---- sizes ---- */

static uint32_t chunk_of(uint32_t n_vocab, uint32_t ranks) { return div_up(div_up(n_vocab, ranks), 4) * 4; }
static size_t shared_bytes_of(uint32_t chunk) { return sizeof(struct team_shared) + (size_t)chunk * sizeof(float); }

static struct team_size size_of(uint32_t n_vocab, uint32_t ranks) {
    const uint32_t chunk = chunk_of(n_vocab, ranks);
    return {ranks, chunk, shared_bytes_of(chunk)};
}

static uint32_t ranks_of(const struct cuda *cuda, uint32_t most) {
    uint32_t ranks = 1;
    if (cuda_code_of(&cuda->properties) < 90) return 1;
    while (ranks < most && cuda->program->n_vocab > ranks * CHUNK_MIN) ranks *= 2;
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

static uint32_t scratch_teams_of(const struct cuda *cuda) {
    return cuda->limits.max_samples < SCRATCH_TEAMS ? cuda->limits.max_samples : (uint32_t)SCRATCH_TEAMS;
}

static size_t stage_words(const struct cuda *cuda) { return (size_t)cuda->limits.max_samples * PARAMS_WORDS + list_words_of(cuda); } /* a multiple of 4: so many are delivered at once */

/* Reads program, limits and properties; while these are not known yet (all 0), it counts what any device would take. Counting makes nothing; with a base, what
 * it makes is sampling_close's to free. */
void sampling_lay_out(struct cuda *cuda, struct device_arena *arena) {
    const uint32_t ranks = ranks_of(cuda, RANKS_PORTABLE);
    const bool copied = is_copied_to_shared(cuda, ranks);
    uint32_t *stage = (uint32_t *)device_take(arena, stage_words(cuda), sizeof(uint32_t));
    float *scratch = copied ? NULL : (float *)device_take(arena, (size_t)scratch_teams_of(cuda) * cuda->program->n_vocab, sizeof(float));
    int32_t *drawn = (int32_t *)device_take(arena, cuda->limits.max_samples, sizeof(int32_t));
    if (!arena->base) return;
    cuda->drawn = drawn;
    CHECK(cuda->program->n_vocab > 0);
    if (!cuda->sampling) cuda->sampling = (struct sampling_device *)check_calloc(1, sizeof *cuda->sampling);
    struct sampling_device *s = cuda->sampling;
    s->size = size_of(cuda->program->n_vocab, copied ? ranks : 1);
    if (!copied) s->size.shared_bytes = sizeof(struct team_shared);
    s->wide = copied ? size_of(cuda->program->n_vocab, ranks_of(cuda, RANKS_MAX)) : s->size;
    s->max_samples = cuda->limits.max_samples;
    s->n_vocab = cuda->program->n_vocab;
    s->list_words = list_words_of(cuda);
    s->stage_device = stage;
    s->scratch = scratch;
}

/* Of one step. */
static size_t answers_bytes(const struct cuda *cuda) { return (size_t)cuda->limits.max_samples * sizeof(struct sample_answer); }
static size_t tops_bytes(const struct cuda *cuda) { return (size_t)cuda->limits.max_samples * SAMPLE_TOP_MAX * sizeof(struct sample_place); }

size_t sampling_pinned_bytes(const struct cuda *cuda) {
    return FLIGHTS * (stage_words(cuda) * sizeof(uint32_t) + answers_bytes(cuda) + tops_bytes(cuda));
}

static void configure(const struct cuda *cuda, const struct team_size *size, uint32_t teams, cudaLaunchConfig_t *config,
                      cudaLaunchAttribute *cluster) {
    *config = {};
    config->gridDim = dim3(teams * size->ranks);
    config->blockDim = dim3(THREADS);
    config->dynamicSmemBytes = size->shared_bytes;
    config->stream = cuda->stream;
    if (size->ranks == 1) return;
    cluster->id = cudaLaunchAttributeClusterDimension;
    cluster->val.clusterDim = {size->ranks, 1, 1};
    config->attrs = cluster;
    config->numAttrs = 1;
}

static bool has_room(const struct cuda *cuda, const struct team_size *size) {
    cudaLaunchConfig_t config;
    cudaLaunchAttribute cluster;
    int clusters = 0;
    if (size->ranks == 1) return true;
    configure(cuda, size, 1, &config, &cluster);
    if (cudaOccupancyMaxActiveClusters(&clusters, sample_kernel<true>, &config) == cudaSuccess) return clusters > 0;
    (void)cudaGetLastError(); /* a size that this device does not know is an answer too */
    return false;
}

/* Parts of a device may have no room for a cluster of 16, or 8. */
static enum status fit_clusters(struct cuda *cuda, struct error *error) {
    struct sampling_device *s = cuda->sampling;
    if (s->scratch) return STATUS_OK;
    CUDA_TRY(error,
             cudaFuncSetAttribute(sample_kernel<true>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)cuda->properties.sharedMemPerBlockOptin));
    if (s->wide.ranks > RANKS_PORTABLE) CUDA_TRY(error, cudaFuncSetAttribute(sample_kernel<true>, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
    while (!has_room(cuda, &s->size)) {
        if (!is_copied_to_shared(cuda, s->size.ranks / 2))
            return error_set(error, STATUS_DEVICE, "%s: no room for %u blocks that sample together from %u tokens", cuda->properties.name,
                             s->size.ranks, s->n_vocab);
        s->size = size_of(s->n_vocab, s->size.ranks / 2);
    }
    if (!has_room(cuda, &s->wide)) s->wide = s->size;
    return STATUS_OK;
}

enum status sampling_open(struct cuda *cuda, struct error *error) {
    struct sampling_device *s = cuda->sampling;
    const size_t words = stage_words(cuda);
    for (int i = 0; i < FLIGHTS; i++) CUDA_TRY(error, cudaHostAlloc((void **)&s->flights[i].stage, words * sizeof(uint32_t), cudaHostAllocMapped));
    CUDA_TRY(error, cudaHostAlloc((void **)&s->answers, FLIGHTS * answers_bytes(cuda), cudaHostAllocMapped));
    CUDA_TRY(error, cudaHostAlloc((void **)&s->tops, FLIGHTS * tops_bytes(cuda), cudaHostAllocMapped));
    return fit_clusters(cuda, error);
}

void sampling_close(struct cuda *cuda) {
    struct sampling_device *s = cuda->sampling;
    if (!s) return;
    for (int i = 0; i < FLIGHTS; i++) {
        if (s->flights[i].stage) cudaFreeHost(s->flights[i].stage);
        free(s->flights[i].host_results);
    }
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
static bool stage_lists(struct lists *lists, const struct sample *sample, const struct sample *before, const struct sample_params *before_p,
                        struct sample_params *p) {
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
    if (!sampling_penalizes(s)) return true;
    if (same && before->history == sample->history && before->n_prompt == sample->n_prompt && before->n_history == sample->n_history) {
        p->history_at = before_p->history_at;
        p->n_prompt = before_p->n_prompt;
        p->n_history = before_p->n_history;
        return true;
    }
    return stage_history(lists, sample, p);
}

static struct sample_params *params_of(const struct sampling_flight *flight) { return (struct sample_params *)(void *)flight->stage; }

void sampling_stage(struct cuda *cuda, const struct batch *batch, struct delivery *delivery) {
    struct sampling_device *s = cuda->sampling;
    struct sampling_flight *own = &s->flights[cuda->flight];
    struct sample_params *params = params_of(own);
    const uint32_t first = batch->n_samples * (uint32_t)PARAMS_WORDS;
    struct lists lists = {own->stage, first, first + s->list_words};
    CHECK(batch->n_samples <= s->max_samples);
    own->batch = batch;
    own->head_row = cuda->host.sample_head_row;
    own->n_on_host = 0;
    for (uint32_t i = 0; i < batch->n_samples; i++) {
        const struct sample *sample = &batch->samples[i];
        const struct sampling *asked = sample->sampling;
        CHECK(asked->n_top <= SAMPLE_TOP_MAX && sample->target < (int64_t)s->n_vocab);
        struct sample_params p = {};
        p.temperature = asked->temperature;
        p.top_p = asked->top_p;
        p.min_p = asked->min_p;
        p.top_k = asked->top_k;
        p.repetition = asked->repetition_penalty;
        p.presence = asked->presence_penalty;
        p.frequency = asked->frequency_penalty;
        p.u = (uint32_t)(random_unit(random_at(asked->seed, 0, sample->choice, sample->token_index)) * 0x1p24f);
        p.target = sample->target;
        p.n_top = asked->n_top;
        const uint32_t used = lists.used;
        if (sample->target < 0 && !stage_lists(&lists, sample, i ? sample - 1 : NULL, i ? &params[i - 1] : NULL, &p)) {
            lists.used = used;
            p.on_host = HOST_TO_DO;
            own->n_on_host++;
        }
        params[i] = p;
    }
    delivery->sampling = (const uint4 *)(const void *)own->stage;
    delivery->sampling_to = (uint4 *)(void *)s->stage_device;
    delivery->n_sampling = div_up(lists.used, 4);
}

static void sample_on_host(struct cuda *cuda, struct sampling_flight *own, uint32_t index, uint32_t first_head_row) {
    struct sampling_device *s = cuda->sampling;
    const float *row = cuda->logits + (size_t)(own->head_row[index] - first_head_row) * s->n_vocab;
    if (!s->host_row) {
        s->host_row = (float *)check_calloc(s->n_vocab, sizeof(float));
        s->host_scratch = (float *)check_calloc(sampler_scratch_floats(s->n_vocab), sizeof(float));
    }
    if (!own->host_results) own->host_results = (struct sample_result *)check_calloc(s->max_samples, sizeof *own->host_results);
    CUDA_CHECK(cudaMemcpyAsync(s->host_row, row, s->n_vocab * sizeof(float), cudaMemcpyDeviceToHost, cuda->stream));
    CUDA_CHECK(cudaStreamSynchronize(cuda->stream));
    sampler_sample(&own->batch->samples[index], s->host_row, s->n_vocab, s->host_scratch, &own->host_results[index]);
    params_of(own)[index].on_host = HOST_DONE;
}

/* Of samples [first_sample, end), those that are the host's; their rows are there still. */
static void sample_part_on_host(struct cuda *cuda, struct sampling_flight *own, uint32_t first_sample, uint32_t end, uint32_t first_head_row) {
    const struct sample_params *params = params_of(own);
    for (uint32_t i = first_sample; own->n_on_host > 0 && i < end && i < own->batch->n_samples; i++)
        if (params[i].on_host == HOST_TO_DO) sample_on_host(cuda, own, i, first_head_row);
}

void sampling_finish(struct cuda *cuda) {
    struct sampling_flight *own = &cuda->sampling->flights[cuda->flight];
    sample_part_on_host(cuda, own, 0, own->batch->n_samples, 0);
}

int32_t sampling_host_token(const struct cuda *cuda, uint32_t flight, uint32_t i) {
    const struct sampling_flight *own = &cuda->sampling->flights[flight];
    return params_of(own)[i].on_host == HOST_DONE ? own->host_results[i].token : -1;
}

void sampling_run(struct cuda *cuda, const struct step_shape *shape) {
    struct sampling_device *s = cuda->sampling;
    const uint32_t end = shape->first_sample + shape->samples;
    CHECK(shape->samples <= s->max_samples && end <= s->max_samples);
    if (shape->samples == 0) return;
    const struct team_size *size = shape->samples <= WIDE_SAMPLES ? &s->wide : &s->size;
    struct sampling_args args = {};
    args.n_samples = &cuda->dev.header->n_samples;
    args.flight = &cuda->dev.header->flight;
    args.sample_head_row = cuda->dev.sample_head_row;
    args.logits = cuda->logits;
    args.stage = s->stage_device;
    args.scratch = s->scratch;
    args.answers = s->answers;
    args.tops = s->tops;
    args.drawn = cuda->drawn;
    args.first_sample = shape->first_sample;
    args.end_sample = end;
    args.first_head_row = shape->first_head_row;
    args.n_vocab = s->n_vocab;
    args.max_samples = s->max_samples;
    args.ranks = size->ranks;
    args.chunk = size->chunk;
    cudaLaunchConfig_t config;
    cudaLaunchAttribute cluster;
    configure(cuda, size, s->scratch && shape->samples > SCRATCH_TEAMS ? (uint32_t)SCRATCH_TEAMS : shape->samples, &config, &cluster);
    CUDA_CHECK(cudaLaunchKernelEx(&config, s->scratch ? sample_kernel<false> : sample_kernel<true>, args));
    /* A step in parts; it is never captured. */
    if (cuda->host.header->n_head_rows > cuda->max_head_rows)
        sample_part_on_host(cuda, &s->flights[cuda->flight], shape->first_sample, end, shape->first_head_row);
}

/* ---- results ---- */

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

void sampling_collect(struct cuda *cuda, uint32_t flight, const struct batch *batch, struct sample_result *results) {
    struct sampling_device *s = cuda->sampling;
    struct sampling_flight *own = &s->flights[flight];
    const struct sample_answer *answers = s->answers + (size_t)flight * s->max_samples;
    const struct sample_place *tops = s->tops + (size_t)flight * s->max_samples * SAMPLE_TOP_MAX;
    sample_part_on_host(cuda, own, 0, batch->n_samples, 0); /* with another step in flight, done before that one's launch */
    for (uint32_t i = 0; i < batch->n_samples; i++) {
        if (params_of(own)[i].on_host)
            results[i] = own->host_results[i];
        else
            collect(&batch->samples[i], &answers[i], &tops[(size_t)i * SAMPLE_TOP_MAX], &results[i]);
    }
}

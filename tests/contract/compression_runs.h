/* Runs of compressed requests through the whole engine, for the tests of compression: the settings, the requests, what each answers, and which slots each compaction kept.
 * Include it in one file of a program. */
#pragma once

#include <stdio.h>

#include "base/half.h"
#include "engine/compression.h"
#include "tests/support/engine_client.h"
#include "tests/support/kv_wish.h"

enum {
    RUN_NEW_MAX = 160,
    RUN_CANDIDATES = 3,
    RUN_PROMPT_MAX = 400,
    RUN_JOBS_MAX = 128,
    RUN_MODEL_LEN = 640,
    RUN_LANES_MAX = 64,
    RUN_MOVES_MAX = 4096
};

static struct model *run_model;        /* model_dummy("tiny") */
static bool run_kivi4;                 /* KV is kept as kivi4; else as f32 by the reference, as f16 by others */
static uint32_t run_measured_each = 1; /* of so many requests one has its hits measured */
static uint32_t run_places_max = RANK_PLACES_MAX;
static bool
    run_unseen; /* nothing is remembered: lists and scores stay in the backend, and what it fills comes when it has settled, as without a test */

struct run_setting {
    const char *backend;
    uint32_t threads, max_rows, max_sequences;
    uint32_t pool_tokens;                /* slots a lane; 0: plenty */
    uint32_t model_len;                  /* 0: RUN_MODEL_LEN */
    bool prefix_cache, reading, in_turn; /* in_turn: nothing runs ahead of the host */
    const char *triggers;                /* NULL: each policy's own */
    double pressure_high, pressure_low;
    const char *policy; /* the operator's; NULL: none */
    uint32_t budget;    /* the operator's */
};

struct run_answer {
    uint32_t n_tokens;
    int32_t tokens[RUN_NEW_MAX];
    float logprobs[RUN_NEW_MAX];
};

struct run_answers {
    struct run_answer of[RUN_JOBS_MAX][RUN_CANDIDATES];
    struct kv_report reports[RUN_JOBS_MAX];
    struct head_hits head_hits[RUN_JOBS_MAX][RUN_LANES_MAX];
    uint32_t cached[RUN_JOBS_MAX];
};

/* ---- a backend that remembers what was kept: engine thread until the engine has stopped ---- */

static struct backend_ops run_ops;
static const struct backend_ops *run_below;
static uint64_t run_kept;                 /* a hash over all compactions, in order */
static uint64_t run_moves[RUN_MOVES_MAX]; /* a hash of each */
static uint32_t n_run_moves;
static uint64_t
    run_scores_after_prompt; /* a sum of hashes of accumulated attention, as asked for once a prompt of 200 tokens was read: in any order */

/* Of the last ranking in a place: where each lane's numbers begin, and the lists that were kept. */
static struct run_place {
    size_t first[RUN_LANES_MAX];
    uint32_t *lists, *listed;
} run_places[RANK_PLACES_MAX];

static void run_hash_scores(const struct rank_request *request, const float *scores, const size_t *first) {
    for (uint32_t lane = 0; lane < program_lanes(model_program(run_model)); lane++) {
        uint64_t hash = lane;
        for (uint32_t i = 0; i < request->score.lane_tokens[lane]; i++) hash = random_mix(hash ^ float_bits(scores[first[lane] + i]));
        run_scores_after_prompt += hash;
    }
}

static void run_rank(struct backend *backend, uint32_t at, const struct rank_request *request, uint32_t *n_protected, float *scores) {
    struct run_place *place = &run_places[at];
    uint32_t lanes = program_lanes(model_program(run_model));
    size_t slots = 0;
    CHECK(lanes <= RUN_LANES_MAX);
    for (uint32_t lane = 0; lane < lanes; slots += request->score.lane_tokens[lane++]) place->first[lane] = slots;
    place->lists = check_realloc(place->lists, slots + 1, sizeof *place->lists);
    if (run_unseen || scores || request->source != RANK_SCORES || request->score.kind != SCORE_ACCUMULATED || request->score.last_position < 200) {
        run_below->rank(backend, at, request, n_protected, scores);
        return;
    }
    float *own = check_calloc(slots + 1, sizeof *own);
    run_below->rank(backend, at, request, n_protected, own);
    run_below->settle(backend);
    run_hash_scores(request, own, place->first);
    free(own);
}

static void run_keep(struct backend *backend, uint32_t at, const uint32_t *evict, struct kept_lane *lanes, uint32_t *keep) {
    run_places[at].listed = keep || run_unseen ? keep : run_places[at].lists;
    run_below->keep(backend, at, evict, lanes, run_places[at].listed);
}

static void run_keep_units(struct backend *backend, uint32_t at, const struct unit_request *request, struct kept_lane *lanes, uint32_t *keep) {
    run_places[at].listed = keep || run_unseen ? keep : run_places[at].lists;
    run_below->keep_units(backend, at, request, lanes, run_places[at].listed);
}

static void run_compact(struct backend *backend, uint32_t count, const struct compaction *items) {
    uint64_t before = run_kept;
    run_kept = 0;
    for (uint32_t n = 0; n < count && !run_unseen; n++) {
        const struct run_place *place = &run_places[items[n].place];
        const uint32_t *keep = items[n].keep ? items[n].keep : place->listed + place->first[items[n].lane];
        run_kept = random_mix(run_kept ^ ((uint64_t)items[n].lane << 32 | items[n].n_slots)); /* small moves of different requests are alike but for the lane */
        for (uint32_t i = 0; i < items[n].n_keep; i++) run_kept = random_mix(run_kept ^ keep[i]);
    }
    CHECK(n_run_moves < RUN_MOVES_MAX);
    run_moves[n_run_moves++] = run_kept;
    run_kept = random_mix(before ^ run_kept);
    run_below->compact(backend, count, items);
}

static enum status run_prepare(const struct program *program, const struct backend_limits *limits, struct backend **backend, struct error *error) {
    struct backend_limits own = *limits;
    own.rank_places = own.rank_places < run_places_max ? own.rank_places : run_places_max;
    enum status status = run_below->prepare(program, &own, backend, error);
    if (status == STATUS_OK) (*backend)->ops = &run_ops;
    return status;
}

/* ---- the engine ---- */

static inline void run_config(const struct run_setting *setting, struct config *config) {
    config_defaults(config);
    (void)snprintf(config->backend, sizeof config->backend, "%s", setting->backend);
    const struct backend_ops *ops = backend_find(setting->backend);
    enum kv_dtype dtype = run_kivi4 ? KV_KIVI4 : strcmp(setting->backend, "reference") == 0 ? KV_F32 : KV_F16;
    (void)snprintf(config->kv_dtype, sizeof config->kv_dtype, "%s", kv_dtype_name(dtype));
    config->deterministic = true;
    config->run_ahead = !setting->in_turn;
    config->threads = setting->threads;
    config->max_model_len = setting->model_len ? setting->model_len : RUN_MODEL_LEN;
    config->max_sequences = setting->max_sequences;
    config->max_rows = setting->max_rows;
    config->prefix_cache = setting->prefix_cache;
    config->step_ms = 10000; /* chunks are cut by max_rows, not by what this machine can do in a while */
    config->recovery = 1;
    config->compress_while_reading = setting->reading;
    if (setting->triggers) (void)snprintf(config->compression_triggers, sizeof config->compression_triggers, "%s", setting->triggers);
    if (setting->policy) (void)snprintf(config->compression_policy, sizeof config->compression_policy, "%s", setting->policy);
    config->budget_tokens = setting->budget;
    if (setting->pressure_high > 0) config->pressure_high = setting->pressure_high, config->pressure_low = setting->pressure_low;
    const struct program *program = model_program(run_model);
    uint64_t tokens = setting->pool_tokens ? setting->pool_tokens : (uint64_t)config->max_model_len * (setting->max_sequences + 1);
    config->kv_memory =
        (uint64_t)backend_block_bytes(ops, program, dtype, true) * program_lanes(program) * ((tokens + BLOCK_TOKENS - 1) / BLOCK_TOKENS);
}

static inline uint32_t run_number(const struct job *job) { return (uint32_t)(job->request.arrival_ns - 1); }

static void run_record(void *context, struct job *job, const struct event *event) {
    struct run_answers *answers = context;
    uint32_t number = run_number(job);
    if (event->finish == FINISH_ERROR) {
        (void)fprintf(stderr, "request %u: %s\n", number, event->error);
        CHECK(!"an answer");
    }
    if (!event->has_token || !answers) return;
    struct run_answer *answer = &answers->of[number][event->choice];
    CHECK(answer->n_tokens < RUN_NEW_MAX);
    answer->tokens[answer->n_tokens] = event->sample.token;
    answer->logprobs[answer->n_tokens++] = event->sample.logprob;
}

static inline void run_open(struct client *client, const struct run_setting *setting, struct config *config, struct run_answers *answers) {
    struct error error = {0};
    run_config(setting, config);
    run_below = backend_find(setting->backend);
    run_ops = *run_below;
    run_ops.compact = run_compact;
    run_ops.rank = run_rank;
    run_ops.keep = run_keep;
    run_ops.keep_units = run_keep_units;
    run_ops.prepare = run_prepare;
    run_kept = run_scores_after_prompt = n_run_moves = 0;
    struct engine_hooks hooks = client_init(client);
    client->on_event = run_record;
    client->context = answers;
    if (engine_start_on(&run_ops, config, run_model, &hooks, &client->engine, &error) != STATUS_OK) {
        (void)fprintf(stderr, "%s: %s\n", setting->backend, error.text);
        CHECK(!"an engine");
    }
}

/* Between two steps of an engine that has nothing to do. */
static inline struct scheduler_stats run_scheduler_stats(struct client *client) {
    struct scheduler_stats stats;
    (void)client_settled(client);
    scheduler_stats(client->engine->scheduler, &stats);
    return stats;
}

/* ---- the requests ---- */

static struct head_hits run_hits[RUN_JOBS_MAX][RUN_LANES_MAX]; /* of the job with this number that was made last */

struct run_request {
    uint32_t number; /* its place among the answers */
    uint32_t text;   /* requests of one text begin alike, for `shared` tokens */
    uint32_t shared, n_prompt, n_new, n_candidates;
    const char *policy;
    uint32_t budget;
    double ratio;
    float temperature;
    bool stops; /* at token `stop` */
    int32_t stop;
};

static inline struct kv_plan run_plan(const struct run_setting *setting, const struct run_request *asked) {
    struct config config;
    run_config(setting, &config);
    return kv_wish_granted(&config, asked->policy, asked->budget, asked->ratio);
}

static inline struct job *run_job(const struct config *config, const struct run_request *asked) {
    int32_t prompt[RUN_PROMPT_MAX];
    struct random own = {7000 + asked->number}, text = {asked->text};
    CHECK(asked->n_prompt <= RUN_PROMPT_MAX && asked->n_new <= RUN_NEW_MAX && asked->number < RUN_JOBS_MAX);
    for (uint32_t t = 0; t < asked->n_prompt; t++) {
        int32_t common = (int32_t)random_below(&text, 256), mine = (int32_t)random_below(&own, 256);
        prompt[t] = t < asked->shared ? common : mine;
    }
    struct job *job = job_new(prompt, asked->n_prompt, asked->n_new, asked->n_candidates ? asked->n_candidates : 1);
    job->request.sampling.n_top = 1;
    if (asked->temperature > 0) job->request.sampling.temperature = asked->temperature, job->request.sampling.seed = 77 + asked->number;
    job->request.arrival_ns = 1 + asked->number;
    job->request.measure_hits = asked->number % run_measured_each == 0;
    job->request.head_hits = run_hits[asked->number];
    memset(run_hits[asked->number], 0, sizeof run_hits[asked->number]);
    if (asked->stops) job->stop[0] = asked->stop, job->request.n_stop_tokens = 1;
    job->request.kv = kv_wish_granted(config, asked->policy, asked->budget, asked->ratio);
    return job;
}

static inline void run_finish(struct job *job, struct run_answers *answers) {
    uint32_t number = run_number(job);
    answers->reports[number] = job->request.kv_report;
    answers->cached[number] = job->choices[0].cached;
    memcpy(answers->head_hits[number], run_hits[number], sizeof answers->head_hits[number]);
    job_free(job);
}

/* Each after the other, or all at once. */
static inline void run_each(struct client *client, const struct config *config, const struct run_request *asked, uint32_t n,
                            struct run_answers *answers) {
    for (uint32_t i = 0; i < n; i++) {
        struct job *job = run_job(config, &asked[i]);
        CHECK(client_submit(client, job));
        client_run(client, 0);
        run_finish(job, answers);
    }
}

static inline void run_all(struct client *client, const struct config *config, const struct run_request *asked, uint32_t n,
                           struct run_answers *answers) {
    struct job *jobs[RUN_JOBS_MAX];
    CHECK(n <= RUN_JOBS_MAX);
    for (uint32_t i = 0; i < n; i++) CHECK(client_submit(client, jobs[i] = run_job(config, &asked[i])));
    client_run(client, 0);
    for (uint32_t i = 0; i < n; i++) run_finish(jobs[i], answers);
}

/* Throughput of many requests sent at once, through the whole engine: admission, chunked prompts, continuous batches, preemption, compression. No HTTP, no text: prompts are random
 * token ids, answers as long as asked whatever they say. Arms that differ by their compression policy run one after the other, each in an engine of its own.
 * Main thread, which is the engine's loop thread. */
#include <errno.h>
#include <inttypes.h>
#include <semaphore.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/check.h"
#include "base/clock.h"
#include "base/random.h"
#include "cli/bench.h"
#include "cli/cli.h"
#include "engine/engine.h"

#define LOOK_S 5                          /* how long to wait for a sign before asking whether the engine lives */
#define STALL_NS (600ull * 1000000000ull) /* a step that takes longer will never end */
#define WARM_UP_PROMPT 512u
#define WARM_UP_SHORT 16u

struct one {
    struct request request;
    int32_t *tokens;
};

struct client {
    struct engine *engine;
    sem_t rung;
    struct one *all;
    uint32_t n, n_open;
    uint64_t n_tokens;
};

static void wake(void *context) {
    struct client *client = context;
    CHECK(sem_post(&client->rung) == 0 || errno == EOVERFLOW);
}

/* Until the engine has something to say, or for a while; an error if it will never say anything. */
static enum status wait_for_engine(struct client *client, struct error *error) {
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += LOOK_S;
    while (sem_timedwait(&client->rung, &until) != 0) {
        if (errno == EINTR) continue;
        if (engine_alive(client->engine, clock_now_ns(), STALL_NS)) return STATUS_OK;
        return error_set(error, STATUS_DEVICE, "bench: no step has ended for %u s", (unsigned)(STALL_NS / 1000000000u));
    }
    return STATUS_OK;
}

static void make_one(struct one *one, uint64_t id, uint32_t n_prompt, uint32_t max_new, const struct kv_plan *kv, uint32_t n_vocab) {
    one->tokens = check_calloc((size_t)n_prompt + max_new, sizeof *one->tokens);
    for (uint32_t t = 0; t < n_prompt; t++) one->tokens[t] = (int32_t)(random_at(id, t, 0, 0) % n_vocab);
    one->request = (struct request){.id = id,
                                    .n_candidates = 1,
                                    .n_prompt = n_prompt,
                                    .max_new = max_new,
                                    .tokens = &one->tokens,
                                    .sampling = {.top_p = 1, .repetition_penalty = 1, .n_top = -1},
                                    .arrival_ns = id,
                                    .kv = *kv};
}

static void begin(struct client *client, uint32_t n) {
    client->all = check_calloc(n, sizeof *client->all);
    client->n = client->n_open = n;
    client->n_tokens = 0;
}

static void unmake(struct client *client) {
    for (uint32_t i = 0; i < client->n; i++) free(client->all[i].tokens);
    free(client->all);
    client->all = NULL;
    client->n = 0;
}

static enum status take_events(struct client *client, struct error *error) {
    struct event event;
    while (client->n_open > 0 && engine_poll(client->engine, &event)) {
        client->n_tokens += event.has_token;
        if (event.finish == FINISH_ERROR)
            return error_set(error, STATUS_DEVICE, "bench: request %" PRIu64 ": %s", event.id & UINT32_MAX, event.error);
        if (event.finish != FINISH_NONE) client->n_open--;
    }
    return STATUS_OK;
}

/* All at once; *wall_ns from the first letter until the engine has nothing left to do, and has counted it. */
static enum status run_all(struct client *client, uint64_t *wall_ns, struct error *error) {
    enum status status = STATUS_OK;
    uint64_t begun = clock_now_ns();
    for (uint32_t i = 0; i < client->n; i++) CHECK(engine_submit(client->engine, &client->all[i].request)); /* the queue was made for them */
    while (status = take_events(client, error), status == STATUS_OK && client->n_open > 0) {
        status = wait_for_engine(client, error);
        if (status != STATUS_OK) break;
    }
    struct engine_stats stats;
    while (status == STATUS_OK && (engine_stats(client->engine, &stats), stats.running + stats.waiting > 0 || stats.blocks_used > 0))
        status = wait_for_engine(client, error);
    *wall_ns = clock_now_ns() - begun;
    return status;
}

/* The limit is on all that K and V cost on the device: what rings of queries take, the pool does not get. */
static enum status share_limit(struct config *config, const struct model *model, struct bench_run *run, struct error *error) {
    struct memory_plan plan;
    run->kv_limit = config->kv_memory;
    enum status status = engine_plan_memory(config, model, &plan, error);
    if (status != STATUS_OK) return status;
    for (uint32_t i = 0; i < plan.n_lines; i++)
        if (strcmp(plan.lines[i].what, "query rings") == 0) run->ring_bytes += plan.lines[i].count * plan.lines[i].bytes_each;
    if (config->kv_memory == 0) return STATUS_OK;
    if (run->ring_bytes >= config->kv_memory)
        return error_set(
            error, STATUS_INVALID,
            "engine.kv_memory: %.1f MiB do not hold the query rings of %u sequences under %s, %.1f MiB: a smaller --max-sequences or --window",
            (double)config->kv_memory / 0x1p20, plan.max_sequences, run->policy, (double)run->ring_bytes / 0x1p20);
    config->kv_memory -= run->ring_bytes;
    return STATUS_OK;
}

/* What this arm is served with: nothing but its own policy is provided for, nothing is shared, and no stream waits for anybody's prompt. */
static enum status arm_config(const struct config *config, const struct model *model, struct bench_run *run, struct config *own,
                              struct error *error) {
    uint64_t tokens = (uint64_t)run->n_prompt + run->n_gen;
    if (run->n_prompt == 0 || run->n_gen == 0) return error_set(error, STATUS_INVALID, "--requests: --prompt and --generate have to be 1 at least");
    if (tokens > model_program(model)->context_train)
        return error_set(error, STATUS_INVALID,
                         "--requests: a prompt of %" PRIu32 " and %" PRIu32 " tokens after it; the model was trained for %" PRIu32, run->n_prompt,
                         run->n_gen, model_program(model)->context_train);
    *own = *config;
    own->max_model_len = (uint32_t)tokens;
    own->max_queue = run->requests;
    if (own->max_sequences == 0) own->max_sequences = run->requests;
    own->prefix_cache = false;
    own->step_ms = 60000;
    (void)snprintf(own->compression_policy, sizeof own->compression_policy, "%s", run->policy);
    (void)snprintf(own->allowed_policies, sizeof own->allowed_policies, "%s", run->policy);
    own->budget_tokens = 0;
    if (run->keep > 0) own->keep_ratio = run->keep;
    enum status status = compression_check(own, error);
    return status == STATUS_OK ? share_limit(own, model, run, error) : status;
}

static double seconds(uint64_t ns) { return (double)ns / 1e9; }

static void take_stats(struct bench_run *run, const struct engine_stats *before, const struct engine_stats *after) {
    uint64_t busy = after->busy_ns - before->busy_ns, steps = after->steps - before->steps, decode_steps = after->decode_steps - before->decode_steps;
    run->reading_s = seconds(after->reading_ns - before->reading_ns);
    run->decode_s = seconds(after->decode_ns - before->decode_ns);
    run->compression_s = seconds(after->compression_ns - before->compression_ns);
    run->host_us = steps ? (double)(busy - (after->wait_ns - before->wait_ns)) / 1e3 / (double)steps : 0;
    run->decode_host_us =
        decode_steps ? (run->decode_s * 1e9 - (double)(after->decode_wait_ns - before->decode_wait_ns)) / 1e3 / (double)decode_steps : 0;
    run->steps = steps;
    run->steps_ahead = after->steps_ahead - before->steps_ahead;
    run->decode_steps = decode_steps;
    run->batch_mean = decode_steps ? (double)(after->decode_rows - before->decode_rows) / (double)decode_steps : 0;
    run->batch_max = after->decode_rows_max;
    run->preemptions = after->preemptions - before->preemptions;
    run->decode_blocks = after->decode_blocks - before->decode_blocks;
    run->compressions = 0;
    run->compressions_behind = after->compressions_behind - before->compressions_behind;
    for (uint32_t p = 0; p < ENGINE_POLICIES_MAX; p++)
        for (uint32_t t = 0; t < TRIGGER_KINDS; t++) run->compressions += after->compressions[p][t] - before->compressions[p][t];
}

/* Before the clock runs: one prompt of some length, and as many short ones as can run at once, which end one after the other. What happens once, at the first step of its kind and
 * batch, has happened then. */
static enum status warm_up(struct client *client, const struct bench_run *run, const struct kv_plan *kv, uint32_t n_vocab, struct error *error) {
    uint32_t n = run->requests < run->max_sequences ? run->requests : run->max_sequences;
    uint64_t wall_ns;
    begin(client, n);
    for (uint32_t i = 0; i < n; i++) {
        uint32_t most = i == 0 ? WARM_UP_PROMPT : WARM_UP_SHORT, n_prompt = run->n_prompt < most ? run->n_prompt : most;
        make_one(&client->all[i], i + 1, n_prompt, 1 + i % run->n_gen, kv, n_vocab);
    }
    enum status status = run_all(client, &wall_ns, error);
    if (status == STATUS_OK) unmake(client); /* else the engine may still hold them */
    return status;
}

static enum status run_in(struct engine *engine, const struct config *own, const struct model *model, const struct kv_plan *kv, struct client *client,
                          struct bench_run *run, struct error *error) {
    uint32_t n_vocab = model_program(model)->n_vocab;
    uint64_t wall_ns;
    struct engine_stats before, after;
    client->engine = engine;
    run->pool_bytes = engine_limits(engine)->n_blocks * (uint64_t)engine_limits(engine)->block_bytes;
    (void)snprintf(run->engine, sizeof run->engine, "%s", engine_describe(engine));
    run->max_sequences = engine_limits(engine)->max_sequences;
    if (!engine_can_hold(engine, kv, run->n_prompt, run->n_gen))
        return error_set(error, STATUS_INVALID, "engine.kv_memory: does not hold one request of %" PRIu32 " + %" PRIu32 " tokens under %s",
                         run->n_prompt, run->n_gen, own->compression_policy);
    enum status status = warm_up(client, run, kv, n_vocab, error);
    if (status != STATUS_OK) return status;
    engine_stats(engine, &before);
    begin(client, run->requests);
    for (uint32_t i = 0; i < run->requests; i++) make_one(&client->all[i], run->requests + i + 1, run->n_prompt, run->n_gen, kv, n_vocab);
    status = run_all(client, &wall_ns, error);
    if (status != STATUS_OK) return status;
    engine_stats(engine, &after);
    take_stats(run, &before, &after);
    run->wall_s = seconds(wall_ns);
    run->output_tokens = client->n_tokens;
    run->output_tok_s = (double)client->n_tokens / run->wall_s;
    uint64_t kept = 0, evicted = 0;
    for (uint32_t i = 0; i < client->n; i++) {
        kept += client->all[i].request.kv_report.slots_kept;
        evicted += client->all[i].request.kv_report.slots_evicted;
    }
    run->slots_kept = kept + evicted ? (double)kept / (double)(kept + evicted) : 1;
    return STATUS_OK;
}

enum status bench_requests_run(const struct config *config, const struct model *model, struct bench_run *run, struct error *error) {
    struct config own;
    struct kv_plan kv;
    const char *field;
    struct client client = {0};
    struct engine *engine = NULL;
    struct progress progress;
    enum status status = arm_config(config, model, run, &own, error);
    if (status != STATUS_OK) return status;
    if (!compression_plan(&own, &(struct kv_wish){.policy = ""}, &kv, &field, error)) return error_prefix(error, "%s", run->policy);
    CHECK(sem_init(&client.rung, 0, 0) == 0);
    progress_begin(&progress, "loading");
    struct engine_hooks hooks = {.wake = wake, .context = &client, .progress = progress_report, .progress_context = &progress};
    status = engine_start(&own, model, &hooks, &engine, error);
    progress_end(&progress);
    if (status == STATUS_OK) status = run_in(engine, &own, model, &kv, &client, run, error);
    engine_stop(engine);
    unmake(&client);
    (void)sem_destroy(&client.rung);
    return status;
}

/* ---- arms ---- */

static enum status read_keep(const char *text, double keep[BENCH_LIST_MAX], uint32_t *n, struct error *error) {
    *n = 0;
    for (const char *at = text; *at;) {
        char *end;
        double value = strtod(at, &end);
        if (end == at || !(value > 0 && value <= 1) || (*end != ',' && *end != '\0') || (*end == ',' && end[1] == '\0'))
            return error_set(error, STATUS_INVALID, "--keep: \"%.60s\": numbers above 0 and at most 1 with commas between belong here", text);
        if (*n == BENCH_LIST_MAX) return error_set(error, STATUS_INVALID, "--keep: more than %d numbers", BENCH_LIST_MAX);
        keep[(*n)++] = value;
        at = *end ? end + 1 : end;
    }
    return *n ? STATUS_OK : error_set(error, STATUS_INVALID, "--keep: no number given");
}

static enum status add_arm(struct bench_runs *runs, const struct bench_run *run, struct error *error) {
    if (runs->count == BENCH_RUNS_MAX)
        return error_set(error, STATUS_INVALID, "--requests: more than %d runs: fewer of --prompt, --policies, --keep", BENCH_RUNS_MAX);
    runs->runs[runs->count++] = *run;
    return STATUS_OK;
}

enum status bench_requests_arms(const struct config *config, const struct bench_list *prompts, struct bench_runs *runs, struct error *error) {
    double keep[BENCH_LIST_MAX];
    uint32_t n_keep;
    runs->count = 0;
    enum status status = read_keep(config->bench.keep, keep, &n_keep, error);
    for (uint32_t p = 0; p < prompts->count; p++) {
        uint32_t named = 0;
        for (const char *at = config->bench.policies; *at && status == STATUS_OK;) {
            at += strspn(at, ", ");
            size_t length = strcspn(at, ", ");
            if (length == 0) break;
            struct bench_run run = {.requests = config->bench.requests, .n_prompt = prompts->values[p], .n_gen = config->bench.generate};
            (void)snprintf(run.policy, sizeof run.policy, "%.*s", (int)length, at);
            const struct policy *policy = policy_find(run.policy);
            if (!policy) return error_set(error, STATUS_INVALID, "--policies: \"%s\" is none of %s", run.policy, policy_names());
            bool keeps_all = policy->scorer == SCORER_NONE;
            for (uint32_t k = 0; k < (keeps_all ? 1 : n_keep) && status == STATUS_OK; k++) {
                run.keep = keeps_all ? 0 : keep[k];
                status = add_arm(runs, &run, error);
            }
            named++;
            at += length;
        }
        if (status == STATUS_OK && named == 0) return error_set(error, STATUS_INVALID, "--policies: none given");
    }
    return status;
}

void bench_requests_compare(struct bench_runs *runs, uint32_t i, double copy_bandwidth, double weight_bytes, double slot_bytes) {
    struct bench_run *run = &runs->runs[i];
    double bytes = (double)run->decode_steps * weight_bytes + (double)run->decode_blocks * BLOCK_TOKENS * slot_bytes;
    run->decode_bound_s = copy_bandwidth > 0 ? bytes / copy_bandwidth : 0;
    for (uint32_t j = 0; j < i && run->keep > 0; j++) {
        const struct bench_run *none = &runs->runs[j];
        if (none->keep > 0 || none->n_prompt != run->n_prompt) continue;
        run->ratio = run->output_tok_s / none->output_tok_s;
        run->ratio_of_steps = (none->reading_s + none->decode_s) / (run->reading_s + run->decode_s);
        return;
    }
}

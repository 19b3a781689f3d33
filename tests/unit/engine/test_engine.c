/* The engine's life with requests: what is said, what ends how, what is counted, and that nobody is left over, whatever is aborted or fails. */
#include "tests/unit/engine/engine_gate.h"

/* What the choice must say, from the mock's definition alone. */
static void check_tokens(const struct job *job, uint32_t choice) {
    const struct program *program = model_program(model);
    float *logits = check_calloc(program->n_vocab, sizeof *logits),
          *scratch = check_calloc(sampler_scratch_floats(program->n_vocab), sizeof *scratch);
    const int32_t *tokens = job->tokens[choice];
    uint32_t n_prompt = job->request.n_prompt, n = n_prompt + job->choices[choice].n_tokens;
    uint64_t chain = 0;
    for (uint32_t i = 0; i + 1 < n; i++) {
        int32_t token = i < n_prompt ? job->tokens[0][i] : tokens[i];
        chain = mock_chain(chain, token, (int32_t)i);
        if (i + 1 < n_prompt) continue;
        uint32_t generated = i + 1 - n_prompt;
        struct sample sample = {.sampling = &job->request.sampling,
                                .choice = choice,
                                .token_index = generated,
                                .ban = generated < job->request.min_new,
                                .target = -1,
                                .history = tokens,
                                .n_prompt = n_prompt,
                                .n_history = i + 1};
        struct sample_result result;
        mock_logits(chain, program->n_vocab, logits);
        sampler_sample(&sample, logits, program->n_vocab, scratch, &result);
        assert_int_equal(result.token, tokens[i + 1]);
    }
    free(logits);
    free(scratch);
}

static void check_job(const struct job *job) {
    for (uint32_t c = 0; c < job->request.n_candidates; c++) {
        assert_int_equal(job->choices[c].n_terminal, 1);
        check_tokens(job, c);
    }
}

/* ---- tests ---- */

static void test_many_requests(void **state) {
    (void)state;
    struct client client;
    struct random random = {7};
    enum { JOBS = 160 };
    struct job *jobs[JOBS];
    start(&client, (struct shape){.sequences = 12, .queue = 600, .rows = 64, .len = 512, .pool = 3});
    uint32_t n_tokens = 0;
    for (uint32_t i = 0; i < JOBS; i++) {
        jobs[i] = random_job(&random, 300, 60, 1 + (i % 5 == 0) * random_below(&random, 4));
        assert_true(client_submit(&client, jobs[i]));
        if (i % 7 == 0) client_drain(&client);
    }
    client_run(&client, 0);
    uint32_t preemptions = 0;
    for (uint32_t i = 0; i < JOBS; i++) {
        check_job(jobs[i]);
        for (uint32_t c = 0; c < jobs[i]->request.n_candidates; c++) {
            assert_int_equal(jobs[i]->choices[c].finish, FINISH_LENGTH);
            assert_int_equal(jobs[i]->choices[c].n_tokens, jobs[i]->request.max_new);
            n_tokens += jobs[i]->choices[c].n_tokens;
            preemptions += jobs[i]->choices[c].preemptions;
        }
        assert_true(jobs[i]->scheduled_ns > 0);
        job_free(jobs[i]);
    }
    struct engine_stats stats = client_settled(&client);
    assert_int_equal(stats.generation_tokens, n_tokens);
    assert_int_equal(preemptions, stats.preemptions);
    assert_true(stats.preemptions > 0 && stats.forks > 0 && stats.prefix_partial_hits > 0 && stats.chunks > 0);
    assert_int_equal(stats.steps_ahead > 0, runs_ahead);
    assert_int_equal(stats.rows_for_nothing, 0); /* nobody ends unforeseen */
    assert_true(stats.busy_ns >= stats.schedule_ns && stats.schedule_ns > stats.schedule_ns_max && stats.schedule_ns_max > 0);
    uint64_t steps = 0;
    for (uint32_t b = 0; b < 14; b++) steps += stats.step_rows_bucket[b];
    assert_int_equal(steps, stats.steps);
    client_done(&client);
}

/* Ten tokens of a prompt in steps of eight rows, then four that only decode: the first token of an answer comes with its prompt's end, the last one is not computed. */
static void test_steps_are_counted_by_kind(void **state) {
    (void)state;
    struct client client;
    const int32_t prompt[10] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10};
    start(&client, (struct shape){.sequences = 2, .queue = 2, .rows = 8, .len = 64, .pool = 2});
    struct job *job = job_new(prompt, 10, 5, 1);
    assert_true(client_submit(&client, job));
    client_run(&client, 0);
    struct engine_stats stats = client_settled(&client);
    assert_int_equal(stats.reading_steps, 2);
    assert_int_equal(stats.decode_steps, 4);
    assert_int_equal(stats.steps_ahead, runs_ahead ? 3 : 0); /* all that follow a step which only decodes */
    assert_int_equal(stats.decode_rows, 4);
    assert_int_equal(stats.decode_rows_max, 1);
    assert_int_equal(stats.decode_blocks, 4 * program_lanes(model_program(model))); /* 15 tokens: one block a lane */
    assert_true(stats.decode_ns > 0 && stats.reading_ns > 0);
    assert_int_equal(stats.decode_ns + stats.reading_ns, stats.busy_ns);
    assert_int_equal(stats.wait_ns, 6 * WAITED);
    assert_int_equal(stats.decode_wait_ns, 4 * WAITED);
    check_job(job);
    job_free(job);
    client_done(&client);
}

static void test_aborts_in_every_state(void **state) {
    (void)state;
    struct client client;
    struct random random = {11};
    start(&client, (struct shape){.sequences = 2, .queue = 60, .rows = 32, .len = 256, .pool = 2});
    gate_hold();
    struct job *reading = random_job(&random, 1, 8, 1), *forks = random_job(&random, 1, 8, 3), *waiting = random_job(&random, 20, 8, 2),
               *leader = random_job(&random, 1, 40, 4);
    assert_true(client_submit(&client, reading));
    gate_wait(); /* its first step is under way */
    assert_true(client_submit(&client, forks) && client_submit(&client, waiting) && client_submit(&client, leader));
    struct job *unknown = random_job(&random, 1, 8, 1);
    engine_abort(client.engine, &unknown->request, ENGINE_ALL_CHOICES);
    job_free(unknown);
    engine_abort(client.engine, &forks->request, 7);                    /* no such choice */
    engine_abort(client.engine, &reading->request, ENGINE_ALL_CHOICES); /* running, in a step */
    engine_abort(client.engine, &forks->request, 1);                    /* not yet forked */
    engine_abort(client.engine, &waiting->request, ENGINE_ALL_CHOICES); /* waiting */
    engine_abort(client.engine, &waiting->request, 1);                  /* ended */
    engine_abort(client.engine, &leader->request, 0);                   /* reads the prompt for the others */
    gate_open();
    client_run(&client, 0);
    assert_true(reading->choices[0].finish == FINISH_ABORTED || reading->request.max_new == 1);
    assert_int_equal(forks->choices[1].finish, FINISH_ABORTED);
    assert_int_equal(forks->choices[0].finish, FINISH_LENGTH);
    assert_int_equal(forks->choices[2].finish, FINISH_LENGTH);
    assert_int_equal(waiting->choices[0].finish, FINISH_ABORTED);
    assert_int_equal(waiting->choices[0].n_events, 1);
    assert_int_equal(leader->choices[0].finish, FINISH_ABORTED);
    for (uint32_t c = 1; c < 4; c++) assert_int_equal(leader->choices[c].finish, FINISH_LENGTH);
    struct job *all[] = {reading, forks, waiting, leader};
    for (uint32_t i = 0; i < 4; i++) check_job(all[i]), job_free(all[i]);
    (void)client_settled(&client);
    client_done(&client);
}

static void test_aborts_at_random(void **state) {
    (void)state;
    struct client client;
    struct random random = {5};
    enum { JOBS = 200 };
    struct job *jobs[JOBS];
    start(&client, (struct shape){.sequences = 8, .queue = 900, .rows = 48, .len = 256, .pool = 3});
    uint32_t aborted = 0;
    for (uint32_t i = 0; i < JOBS; i++) {
        jobs[i] = random_job(&random, 120, 40, 1 + random_below(&random, 4));
        assert_true(client_submit(&client, jobs[i]));
        if (random_below(&random, 2)) client_drain(&client);
        struct job *victim = jobs[random_below(&random, i + 1)];
        engine_abort(client.engine, &victim->request, random_below(&random, 2) ? ENGINE_ALL_CHOICES : random_below(&random, 4));
    }
    client_run(&client, 0);
    for (uint32_t i = 0; i < JOBS; i++) {
        check_job(jobs[i]);
        for (uint32_t c = 0; c < jobs[i]->request.n_candidates; c++) aborted += jobs[i]->choices[c].finish == FINISH_ABORTED;
        job_free(jobs[i]);
    }
    assert_true(aborted > 20);
    (void)client_settled(&client);
    client_done(&client);
}

static void no_later_writes(void *context, struct job *job, const struct event *event) {
    (void)event;
    struct sample_result *copy = context; /* as they stand with the first event */
    if (job->request.prompt_results && job->choices[0].n_events == 1) memcpy(copy, job->request.prompt_results, job->request.n_prompt * sizeof *copy);
}

static void test_prompt_logprobs(void **state) {
    (void)state;
    const struct program *program = model_program(model);
    float *logits = check_calloc(program->n_vocab, sizeof *logits),
          *scratch = check_calloc(sampler_scratch_floats(program->n_vocab), sizeof *scratch);
    for (uint32_t max_new = 0; max_new < 40; max_new += 13) {
        struct client client;
        struct random random = {max_new};
        start(&client, (struct shape){.sequences = 4, .queue = 20, .rows = 40, .len = 512, .pool = 1});
        struct job *others[3], *job = random_job(&random, 300, 1, 2);
        while (job->request.n_prompt < 200) job_free(job), job = random_job(&random, 300, 1, 2);
        struct job *wanted = job_new(job->tokens[0], job->request.n_prompt, max_new, 2);
        job_free(job);
        wanted->request.sampling.n_top = 3;
        wanted->request.prompt_results = check_calloc(wanted->request.n_prompt, sizeof(struct sample_result));
        wanted->request.prompt_results[0].token = -77;
        struct sample_result *copy = check_calloc(wanted->request.n_prompt, sizeof *copy);
        client.on_event = no_later_writes;
        client.context = copy;
        for (uint32_t i = 0; i < 3; i++) {
            others[i] = random_job(&random, 200, 60, 1);
            assert_true(client_submit(&client, others[i]));
        }
        assert_true(client_submit(&client, wanted));
        client_run(&client, 0);
        uint64_t chain = 0;
        assert_int_equal(wanted->request.prompt_results[0].token, -77);
        for (uint32_t i = 1; i < wanted->request.n_prompt; i++) {
            struct sample_result expected;
            struct sample sample = {.sampling = &wanted->request.sampling,
                                    .target = wanted->tokens[0][i],
                                    .history = wanted->tokens[0],
                                    .n_prompt = wanted->request.n_prompt,
                                    .n_history = i};
            chain = mock_chain(chain, wanted->tokens[0][i - 1], (int32_t)i - 1);
            mock_logits(chain, program->n_vocab, logits);
            sampler_sample(&sample, logits, program->n_vocab, scratch, &expected);
            const struct sample_result *got = &copy[i];
            assert_int_equal(got->token, wanted->tokens[0][i]);
            assert_true(got->logprob == expected.logprob && got->n_top == 3 && got->top[2].token == expected.top[2].token);
        }
        assert_memory_equal(copy, wanted->request.prompt_results, wanted->request.n_prompt * sizeof *copy);
        for (uint32_t c = 0; c < 2; c++) {
            assert_int_equal(wanted->choices[c].finish, FINISH_LENGTH);
            assert_int_equal(wanted->choices[c].n_tokens, max_new);
            assert_int_equal(wanted->choices[c].n_events, max_new ? max_new : 1);
        }
        for (uint32_t i = 0; i < 3; i++) job_free(others[i]);
        check_job(wanted);
        job_free(wanted);
        free(copy);
        (void)client_settled(&client);
        client_done(&client);
    }
    free(logits);
    free(scratch);
}

static void test_queue_full(void **state) {
    (void)state;
    struct client client;
    struct random random = {3};
    start(&client, (struct shape){.sequences = 2, .queue = 3, .rows = 64, .len = 128, .pool = 2});
    gate_hold();
    struct job *jobs[6];
    for (uint32_t i = 0; i < 6; i++) jobs[i] = random_job(&random, 20, 4, i == 4 ? 2 : 1);
    for (uint32_t i = 0; i < 4; i++) assert_true(client_submit(&client, jobs[i]));
    assert_false(client_submit(&client, jobs[4])); /* two choices, one place */
    assert_true(client_submit(&client, jobs[5]));
    struct job *late = random_job(&random, 20, 4, 1);
    assert_false(client_submit(&client, late));
    gate_open();
    client_run(&client, 0);
    assert_true(client_submit(&client, late) && client_submit(&client, jobs[4]));
    client_run(&client, 0);
    for (uint32_t i = 0; i < 6; i++) check_job(jobs[i]), job_free(jobs[i]);
    check_job(late);
    job_free(late);
    client_done(&client);
}

/* What is told to end has left the queue at once, though the engine hears of it a step later: one who asks again when his answer is over is never one too many. */
static void test_who_leaves_makes_room(void **state) {
    (void)state;
    enum { SEQUENCES = 2, QUEUE = 1, ROUNDS = 200 };
    struct client client;
    struct random random = {13};
    start(&client, (struct shape){.sequences = SEQUENCES, .queue = QUEUE, .rows = 64, .len = 128, .pool = 2});
    const uint32_t most = engine_limits(client.engine)->max_choices;
    struct job *jobs[ROUNDS];
    gate_hold();
    jobs[0] = random_job(&random, 20, 40, 3);
    assert_true(client_submit(&client, jobs[0]));
    gate_wait(); /* its first step is under way: nobody reads letters */
    jobs[1] = random_job(&random, 20, 4, 1);
    assert_false(client_submit(&client, jobs[1]));
    engine_abort(client.engine, &jobs[0]->request, 1); /* its others stay, and its places with them */
    engine_abort(client.engine, &jobs[0]->request, 7);
    assert_false(client_submit(&client, jobs[1]));
    engine_abort(client.engine, &jobs[0]->request, ENGINE_ALL_CHOICES);
    engine_abort(client.engine, &jobs[0]->request, ENGINE_ALL_CHOICES); /* once is enough */
    assert_true(client_submit(&client, jobs[1]));
    engine_abort(client.engine, &jobs[1]->request, 3);
    uint32_t n = 2;
    for (; client.n_open < 3 + SEQUENCES + QUEUE; n++) assert_true(client_submit(&client, jobs[n] = random_job(&random, 20, 4, 1)));
    assert_false(client_submit(&client, jobs[n] = random_job(&random, 20, 4, 1))); /* who stays counts as ever */
    job_free(jobs[n]);
    for (bool took = true; took; n += took) { /* and who leaves does not without end */
        engine_abort(client.engine, &jobs[n - 1]->request, 0);
        jobs[n] = random_job(&random, 20, 4, 1);
        took = client_submit(&client, jobs[n]);
        if (!took) job_free(jobs[n]);
        assert_true(client.n_open <= most && n + 1 < ROUNDS);
    }
    assert_int_equal(client.n_open, most);
    gate_open();
    client_run(&client, 0);
    for (uint32_t i = 0; i < n; i++) check_job(jobs[i]), job_free(jobs[i]);
    assert_int_equal(client.engine->live_choices, 0);
    assert_int_equal(client.engine->leaving_choices, 0);
    (void)client_settled(&client);
    client_done(&client);
}

/* Choices 0 and 1 end by an abort, after 5 and 15 tokens, choice 2 at its length. */
static void end_by_number(void *context, struct job *job, const struct event *event) {
    struct client *client = context;
    uint32_t n = job->choices[event->choice].n_tokens;
    if (event->finish == FINISH_NONE && ((event->choice == 0 && n == 5) || (event->choice == 1 && n == 15)))
        engine_abort(client->engine, &job->request, event->choice);
}

/* What a report says of each head: of every choice, as it stood at its end. */
static void test_report_of_every_choice(void **state) {
    (void)state;
    struct client client;
    const int32_t prompt[4] = {1, 2, 3, 4};
    start(&client, (struct shape){.sequences = 4, .queue = 2, .rows = 64, .len = 128, .pool = 4});
    uint32_t lanes = program_lanes(model_program(model));
    client.on_event = end_by_number;
    client.context = &client;
    struct job *job = job_new(prompt, 4, 100, 3);
    job->request.head_slots = check_calloc(3 * lanes, sizeof(uint32_t));
    gate_hold();
    assert_true(client_submit(&client, job));
    for (uint32_t step = 0; step < 30; step++) { /* nobody gets far ahead of who reads */
        gate_wait();
        client_drain(&client);
        gate_step();
    }
    gate_open();
    client_run(&client, 0);
    const struct kv_report *report = &job->request.kv_report;
    const uint32_t *slots = job->request.head_slots;
    assert_int_equal(report->n_choices, 3);
    uint64_t sum = 0;
    for (uint32_t i = 0; i < 3 * lanes; i++) sum += slots[i];
    assert_int_equal(sum, report->slots_kept);
    assert_int_equal(slots[0], report->head_min);
    assert_int_equal(slots[2 * lanes], 4 + 100 - 1);
    assert_int_equal(report->head_max, 4 + 100 - 1);
    assert_true(slots[0] < slots[lanes] && slots[lanes] < slots[2 * lanes]);
    for (uint32_t i = 0; i < 3 * lanes; i++)
        assert_int_equal(slots[i], slots[i / lanes * lanes]); /* nothing is evicted: the heads of a choice are alike */
    free(job->request.head_slots);
    check_job(job);
    job_free(job);
    (void)client_settled(&client);
    client_done(&client);
}

/* While engine_stop waits, the engine thread itself takes the events that it posts: there is one taker at a time. */
struct stopping {
    struct client *client;
    _Atomic bool stopping;
};
static void wake_or_take(void *context) {
    struct stopping *stopping = context;
    if (atomic_load(&stopping->stopping))
        client_drain(stopping->client);
    else
        client_wake(stopping->client);
}

static void test_stop_while_running(void **state) {
    (void)state;
    struct client client;
    struct random random = {9};
    struct stopping stopping = {.client = &client};
    start(&client, (struct shape){.sequences = 4, .queue = 60, .rows = 32, .len = 256, .pool = 2});
    gate_hold();
    struct job *jobs[12];
    jobs[0] = random_job(&random, 40, 50, 1);
    assert_true(client_submit(&client, jobs[0]));
    gate_wait();
    client.engine->hooks.wake = wake_or_take; /* read next when the step that is held has ended */
    client.engine->hooks.context = &stopping;
    for (uint32_t i = 1; i < 12; i++) {
        jobs[i] = random_job(&random, 100, 50, 1 + i % 3);
        assert_true(client_submit(&client, jobs[i]));
    }
    atomic_store(&stopping.stopping, true);
    atomic_store(&client.engine->stop, true); /* before the step goes on: as if engine_stop had come first */
    gate_open();
    client_done(&client);
    assert_int_equal(client.n_open, 0);
    for (uint32_t i = 0; i < 12; i++) {
        check_job(jobs[i]);
        for (uint32_t c = 0; i > 0 && c < jobs[i]->request.n_candidates; c++) assert_int_equal(jobs[i]->choices[c].finish, FINISH_ABORTED);
        job_free(jobs[i]);
    }
}

/* A consumer that does not poll: the engine stops stepping, still takes aborts, and has a place for every terminal event. */
static void test_outbox_full(void **state) {
    (void)state;
    struct client client;
    struct random random = {21};
    enum { JOBS = 24 };
    struct job *jobs[JOBS];
    start(&client, (struct shape){.sequences = 24, .queue = 0, .rows = 64, .len = 512, .pool = 24});
    for (uint32_t i = 0; i < JOBS; i++) {
        jobs[i] = random_job(&random, 8, 1, 1);
        struct job *longer = job_new(jobs[i]->tokens[0], jobs[i]->request.n_prompt, 400, 1);
        job_free(jobs[i]);
        jobs[i] = longer;
        assert_true(client_submit(&client, jobs[i]));
    }
    uint64_t limit = clock_now_ns() + CLIENT_WAIT_S * 1000000000ull;
    /* In this order: with letters in the inbox it would not fall asleep, only look. */
    while (mailbox_waiting(&client.engine->inbox) > 0 || !(atomic_load(&client.engine->bell.word) & BELL_WANTS_ROOM))
        assert_true(clock_now_ns() < limit);
    assert_true(mailbox_room(&client.engine->outbox) >= JOBS);
    assert_true(engine_alive(client.engine, clock_now_ns() + 3600000000000ull, 1));
    for (uint32_t i = 0; i < JOBS; i += 2) /* more letters than there are places: nothing is lost, nothing doubled */
        for (uint32_t k = 0; k < 40; k++) engine_abort(client.engine, &jobs[i]->request, k % 2 ? 0 : ENGINE_ALL_CHOICES);
    client_run(&client, 0);
    for (uint32_t i = 0; i < JOBS; i++) {
        assert_int_equal(jobs[i]->choices[0].finish, i % 2 ? FINISH_LENGTH : FINISH_ABORTED);
        check_job(jobs[i]);
        job_free(jobs[i]);
    }
    (void)client_settled(&client);
    client_done(&client);
}

static void test_priorities(void **state) {
    (void)state;
    struct client client;
    struct random random = {2};
    start(&client, (struct shape){.sequences = 1, .queue = 10, .rows = 64, .len = 128, .pool = 1});
    gate_hold();
    static const int32_t priority[] = {0, 5, 1, 5, -1};
    static const uint64_t expected[] = {1, 4, 3, 5, 2};
    struct job *jobs[5];
    for (uint32_t i = 0; i < 5; i++) {
        jobs[i] = random_job(&random, 4, 4, 1);
        jobs[i]->request.priority = priority[i];
        jobs[i]->request.arrival_ns = clock_now_ns();
        assert_true(client_submit(&client, jobs[i]));
        if (i == 0) gate_wait();
    }
    gate_open();
    client_run(&client, 0);
    for (uint32_t i = 0; i < 5; i++) {
        assert_int_equal(jobs[i]->order, expected[i]);
        job_free(jobs[i]);
    }
    client_done(&client);
}

static void test_backend_failures(void **state) {
    (void)state;
    uint64_t n_ahead = 0;
    for (int when = 0; when < 24; when++) {
        struct client client;
        struct random random = {31};
        start(&client, (struct shape){.sequences = 4, .queue = 40, .rows = 64, .len = 256, .pool = 4});
        gate_hold();
        struct job *jobs[6], *again[6];
        for (uint32_t i = 0; i < 6; i++) {
            jobs[i] = random_job(&random, 150, 30, 1 + i % 3);
            again[i] = job_new(jobs[i]->tokens[0], jobs[i]->request.n_prompt, jobs[i]->request.max_new, jobs[i]->request.n_candidates);
            again[i]->request.sampling = jobs[i]->request.sampling;
            assert_true(client_submit(&client, jobs[i]));
        }
        atomic_store(when % 2 ? &gate.fail_sync : &gate.fail_submit, 1 + when);
        gate_open();
        client_run(&client, 0);
        uint32_t failed = 0;
        for (uint32_t i = 0; i < 6; i++) {
            check_job(jobs[i]);
            for (uint32_t c = 0; c < jobs[i]->request.n_candidates; c++) {
                if (jobs[i]->choices[c].finish != FINISH_ERROR) continue;
                failed++;
                assert_string_equal(jobs[i]->choices[c].error, when % 2 ? "mock: sync failed" : "mock: submit failed");
            }
            job_free(jobs[i]);
            assert_true(client_submit(&client, again[i]));
        }
        assert_true(failed > 0);
        client_run(&client, 0);
        for (uint32_t i = 0; i < 6; i++) {
            check_job(again[i]);
            for (uint32_t c = 0; c < again[i]->request.n_candidates; c++) assert_int_equal(again[i]->choices[c].finish, FINISH_LENGTH);
            job_free(again[i]);
        }
        n_ahead += client_settled(&client).steps_ahead;
        client_done(&client);
    }
    assert_int_equal(n_ahead > 0, runs_ahead);
}

static struct job *decoding(const int32_t *prompt, uint32_t max_new) { return job_new(prompt, 4, max_new, 1); }

/* While a second step is under way: the first one fails, or the second is refused, or fails when it is waited for. Nobody is told twice, nothing is left over, and what comes later is served. */
static void test_failures_with_two_under_way(void **state) {
    (void)state;
    const int32_t prompts[3][4] = {{1, 2, 3, 4}, {5, 6, 7, 8}, {9, 10, 11, 12}};
    for (int kind = 0; kind < 3 && runs_ahead; kind++) {
        struct client client;
        struct job *jobs[3], *again;
        start(&client, (struct shape){.sequences = 3, .queue = 10, .rows = 64, .len = 256, .pool = 3});
        gate_hold();
        jobs[0] = decoding(prompts[0], 100);
        assert_true(client_submit(&client, jobs[0]));
        gate_wait();
        for (uint32_t i = 1; i < 3; i++) jobs[i] = decoding(prompts[i], 100), assert_true(client_submit(&client, jobs[i]));
        gate_step();
        gate_wait(); /* jobs 1 and 2 are read */
        gate_step();
        gate_wait(); /* all decode */
        gate_step();
        gate_wait(); /* the one ahead is submitted */
        assert_int_equal(gate.n_flights, 1);
        atomic_store(kind == 1 ? &gate.fail_submit : &gate.fail_sync, kind == 2 ? 2 : 1);
        gate_open();
        client_run(&client, 0);
        for (uint32_t i = 0; i < 3; i++) {
            assert_int_equal(jobs[i]->choices[0].finish, FINISH_ERROR);
            assert_int_equal(jobs[i]->choices[0].n_tokens, (i == 0 ? 2 : 1) + (kind > 0)); /* the first step's results were there */
            check_job(jobs[i]);
            job_free(jobs[i]);
        }
        again = decoding(prompts[0], 100);
        assert_true(client_submit(&client, again));
        client_run(&client, 0);
        assert_int_equal(again->choices[0].finish, FINISH_LENGTH);
        check_job(again);
        job_free(again);
        struct engine_stats stats = client_settled(&client);
        assert_int_equal(stats.rows_for_nothing, kind == 1 ? 0 : 3); /* those of the step behind the one that failed */
        client_done(&client);
    }
}

/* An abort comes while two steps are under way: both end, then it is done. */
static void test_abort_with_two_under_way(void **state) {
    (void)state;
    const int32_t prompt[4] = {1, 2, 3, 4};
    struct client client;
    start(&client, (struct shape){.sequences = 2, .queue = 10, .rows = 64, .len = 256, .pool = 3});
    gate_hold();
    struct job *job = decoding(prompt, 100);
    assert_true(client_submit(&client, job));
    gate_wait(); /* it is read */
    gate_step();
    gate_wait(); /* it decodes; alone, or with the next step ahead */
    if (runs_ahead) {
        gate_step();
        gate_wait();
        assert_int_equal(gate.n_flights, 1);
    }
    engine_abort(client.engine, &job->request, 0);
    gate_open();
    client_run(&client, 0);
    assert_int_equal(job->choices[0].finish, FINISH_ABORTED);
    assert_int_equal(job->choices[0].n_tokens, runs_ahead ? 3 : 2);
    check_job(job);
    job_free(job);
    (void)client_settled(&client);
    client_done(&client);
}

/* Sequences that end by stop tokens, at any step, among others that go on: each says what it says alone, and stops where it should. */
static void test_stops_at_random(void **state) {
    (void)state;
    struct client client;
    struct random random = {41};
    enum { JOBS = 120 };
    struct job *jobs[JOBS];
    start(&client, (struct shape){.sequences = 6, .queue = 600, .rows = 64, .len = 256, .pool = 4});
    for (uint32_t i = 0; i < JOBS; i++) {
        jobs[i] = random_job(&random, 40, 60, 1 + (i % 9 == 0) * random_below(&random, 3));
        jobs[i]->request.n_stop_tokens = 4;
        for (uint32_t k = 0; k < 4; k++) jobs[i]->stop[k] = (int32_t)random_below(&random, 256);
        assert_true(client_submit(&client, jobs[i]));
        if (i % 3 == 0) client_run(&client, random_below(&random, 12));
    }
    client_run(&client, 0);
    uint32_t n_stopped = 0, n_tokens = 0;
    for (uint32_t i = 0; i < JOBS; i++) {
        check_job(jobs[i]);
        for (uint32_t c = 0; c < jobs[i]->request.n_candidates; c++) {
            const struct job_choice *choice = &jobs[i]->choices[c];
            uint32_t first = 0;
            bool stops = false;
            for (; first < choice->n_tokens && !stops; first++)
                for (uint32_t k = 0; k < 4; k++) stops = stops || jobs[i]->tokens[c][jobs[i]->request.n_prompt + first] == jobs[i]->stop[k];
            assert_int_equal(first, choice->n_tokens); /* not a token more */
            assert_int_equal(choice->finish, stops ? FINISH_STOP : FINISH_LENGTH);
            n_stopped += stops;
            n_tokens += choice->n_tokens;
        }
        job_free(jobs[i]);
    }
    struct engine_stats stats = client_settled(&client);
    assert_true(n_stopped > 20);
    assert_int_equal(stats.generation_tokens, n_tokens);
    assert_int_equal(stats.rows_for_nothing > 0, runs_ahead);
    client_done(&client);
}

/* What is drawn by the tokens drawn before waits for them. */
static void test_penalties(void **state) {
    (void)state;
    struct client client;
    struct random random = {43};
    start(&client, (struct shape){.sequences = 4, .queue = 40, .rows = 64, .len = 256, .pool = 4});
    struct job *jobs[4];
    for (uint32_t i = 0; i < 4; i++) {
        jobs[i] = random_job(&random, 40, 40, 1);
        jobs[i]->request.sampling.repetition_penalty = i == 0 ? 1.3f : 1;
        jobs[i]->request.sampling.presence_penalty = i == 1 ? 0.5f : 0;
        jobs[i]->request.sampling.frequency_penalty = i >= 2 ? 0.5f : 0;
        assert_true(client_submit(&client, jobs[i]));
    }
    client_run(&client, 0);
    for (uint32_t i = 0; i < 4; i++) check_job(jobs[i]), job_free(jobs[i]);
    assert_int_equal(client_settled(&client).steps_ahead, 0);
    client_done(&client);
}

static void test_stop_tokens_and_bad_prompts(void **state) {
    (void)state;
    struct client client;
    struct random random = {17};
    start(&client, (struct shape){.sequences = 4, .queue = 40, .rows = 64, .len = 256, .pool = 4});
    struct job *plain = random_job(&random, 30, 1, 1), *job;
    job = job_new(plain->tokens[0], plain->request.n_prompt, 40, 1);
    assert_true(client_submit(&client, job));
    client_run(&client, 0);
    int32_t fifth = job->tokens[0][job->request.n_prompt + 4];
    uint32_t first = 0;
    while (job->tokens[0][job->request.n_prompt + first] != fifth) first++;
    struct job *stopped = job_new(plain->tokens[0], plain->request.n_prompt, 40, 2),
               *later = job_new(plain->tokens[0], plain->request.n_prompt, 40, 1);
    stopped->stop[0] = 257, stopped->stop[1] = fifth, stopped->request.n_stop_tokens = 2;
    later->stop[0] = fifth, later->request.n_stop_tokens = 1, later->request.min_new = 10;
    later->request.sampling.banned = later->stop, later->request.sampling.n_banned = 1;
    int32_t bad_prompt[] = {1, (int32_t)model_program(model)->n_vocab, 2};
    struct job *bad = job_new(bad_prompt, 3, 4, 3);
    assert_true(client_submit(&client, stopped) && client_submit(&client, later) && client_submit(&client, bad));
    client_run(&client, 0);
    for (uint32_t c = 0; c < 2; c++) {
        assert_int_equal(stopped->choices[c].finish, FINISH_STOP);
        assert_int_equal(stopped->choices[c].n_tokens, first + 1);
    }
    assert_true(later->choices[0].n_tokens >= 10);
    for (uint32_t i = 0; i < 10; i++) assert_int_not_equal(later->tokens[0][later->request.n_prompt + i], fifth);
    for (uint32_t c = 0; c < 3; c++) assert_int_equal(bad->choices[c].finish, FINISH_ERROR);
    struct job *all[] = {plain, job, stopped, later, bad};
    for (uint32_t i = 1; i < 4; i++) check_job(all[i]);
    for (uint32_t i = 0; i < 5; i++) job_free(all[i]);
    (void)client_settled(&client);
    client_done(&client);
}

static void test_alive(void **state) {
    (void)state;
    struct client client;
    struct random random = {1};
    start(&client, (struct shape){.sequences = 1, .queue = 4, .rows = 64, .len = 128, .pool = 1});
    uint64_t far = clock_now_ns() + 3600000000000ull, limit = clock_now_ns() + CLIENT_WAIT_S * 1000000000ull;
    while (!engine_alive(client.engine, far, 1)) assert_true(clock_now_ns() < limit); /* falls asleep */
    gate_hold();
    struct job *job = random_job(&random, 4, 4, 1);
    assert_true(client_submit(&client, job));
    gate_wait();
    assert_false(engine_alive(client.engine, far, 1000000000)); /* a step that does not end */
    assert_true(engine_alive(client.engine, clock_now_ns(), CLIENT_WAIT_S * 1000000000ull));
    gate_step();
    gate_open();
    client_run(&client, 0);
    job_free(job);
    client_done(&client);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_many_requests),
        cmocka_unit_test(test_steps_are_counted_by_kind),
        cmocka_unit_test(test_aborts_in_every_state),
        cmocka_unit_test(test_aborts_at_random),
        cmocka_unit_test(test_prompt_logprobs),
        cmocka_unit_test(test_queue_full),
        cmocka_unit_test(test_who_leaves_makes_room),
        cmocka_unit_test(test_report_of_every_choice),
        cmocka_unit_test(test_stop_while_running),
        cmocka_unit_test(test_outbox_full),
        cmocka_unit_test(test_priorities),
        cmocka_unit_test(test_backend_failures),
        cmocka_unit_test(test_failures_with_two_under_way),
        cmocka_unit_test(test_abort_with_two_under_way),
        cmocka_unit_test(test_stops_at_random),
        cmocka_unit_test(test_penalties),
        cmocka_unit_test(test_stop_tokens_and_bad_prompts),
        cmocka_unit_test(test_alive),
    };
    int failed = cmocka_run_group_tests_name("one step at a time", tests, open_model, close_model);
    return failed + cmocka_run_group_tests_name("one step ahead", tests, ahead, close_model);
}

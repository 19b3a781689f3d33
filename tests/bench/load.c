/* load: a load client for servers with OpenAI's /v1/completions, kvasir and llama-server among them. One thread, epoll; prompts of random token ids, each its own.
 *
 * Closed loop: --streams requests at once, the next begins where one ends, --requests in all. Open loop: --rate requests a second, at random times (Poisson).
 * --arrive P:T:K: once each stream has had K pieces of text, a request with a prompt of P tokens that wants T tokens comes beside them; what the others notice of it
 * between its submission and its first token is told apart, and the run ends once it is done and each of the others has been heard of again.
 *
 * Prints one JSON object. Times are those at which read() returned. It says how much CPU it took itself: on a small machine that is part of the result. Exit status 0:
 * every request got a whole answer; 1: not, or cut short by --timeout or a signal, and the object tells of what there was; 2: usage. */
#include <arpa/inet.h>
#include <errno.h>
#include <getopt.h>
#include <inttypes.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <unistd.h>

#include "base/check.h"
#include "base/clock.h"
#include "base/json_writer.h"
#include "base/random.h"
#include "tests/bench/stream.h"

enum { REQUESTS_MAX = 65536, EVENTS = 64 };

struct options {
    struct stream_settings settings;
    uint32_t n_streams, n_requests, n_prompt, n_new;
    double rate; /* 0: closed loop */
    double timeout_s;
    bool arrives;
    uint32_t arrive_prompt, arrive_new, arrive_after;
};

struct load {
    struct options options;
    int epoll;
    struct stream *streams; /* [n_requests], and the one that arrives */
    uint32_t n_started, n_live, n_ended;
    uint64_t begin_ns, next_ns; /* open loop: of the next arrival */
    struct random random;
    struct stream *arrival; /* NULL until it is submitted */
};

static volatile sig_atomic_t interrupted;

static void on_signal(int number) {
    (void)number;
    interrupted = 1;
}

/* ---- options ---- */

static _Noreturn void usage(const char *problem) {
    (void)fprintf(stderr,
                  "load: %s\n"
                  "load --port N [--host ADDRESS] [--streams N] [--requests N] [--rate R] [--prompt TOKENS] [--tokens N] [--ids LOW-HIGH]\n"
                  "     [--seed N] [--model NAME] [--extra JSON-OBJECT] [--arrive PROMPT:TOKENS:AFTER] [--timeout SECONDS]\n",
                  problem);
    exit(2);
}

static uint32_t whole(const char *text, const char *flag, uint32_t min, uint32_t max) {
    char words[128], *end;
    errno = 0;
    unsigned long value = strtoul(text, &end, 10);
    if (*text >= '0' && *text <= '9' && *end == '\0' && errno == 0 && value >= min && value <= max) return (uint32_t)value;
    (void)snprintf(words, sizeof words, "--%s: \"%.40s\" is not a whole number from %" PRIu32 " to %" PRIu32, flag, text, min, max);
    usage(words);
}

static double positive(const char *text, const char *flag) {
    char words[128], *end;
    double value = strtod(text, &end);
    if (end != text && *end == '\0' && value > 0 && isfinite(value)) return value;
    (void)snprintf(words, sizeof words, "--%s: \"%.40s\" is not a number above 0", flag, text);
    usage(words);
}

/* "{...}" without its braces, in place; what is inside is the server's to judge. */
static const char *members(char *text) {
    size_t length = strlen(text);
    if (length < 2 || text[0] != '{' || text[length - 1] != '}') usage("--extra: a JSON object belongs here");
    text[length - 1] = '\0';
    return text[1 + strspn(text + 1, " ")] ? text + 1 : NULL;
}

static void read_options(int argc, char **argv, struct options *options) {
    static const struct option flags[] = {{"port", 1, NULL, 'p'},    {"host", 1, NULL, 'h'},
                                          {"streams", 1, NULL, 's'}, {"requests", 1, NULL, 'n'},
                                          {"rate", 1, NULL, 'r'},    {"prompt", 1, NULL, 'l'},
                                          {"tokens", 1, NULL, 't'},  {"ids", 1, NULL, 'i'},
                                          {"seed", 1, NULL, 'e'},    {"model", 1, NULL, 'm'},
                                          {"extra", 1, NULL, 'x'},   {"arrive", 1, NULL, 'a'},
                                          {"timeout", 1, NULL, 'o'}, {0}};
    const char *host = "127.0.0.1";
    uint32_t port = 0;
    *options =
        (struct options){.n_streams = 1, .n_prompt = 128, .n_new = 128, .timeout_s = 600, .settings = {.id_low = 1000, .id_high = 30000, .seed = 1}};
    for (int flag; (flag = getopt_long(argc, argv, "", flags, NULL)) != -1;) switch (flag) {
        case 'p': port = whole(optarg, "port", 1, 65535); break;
        case 'h': host = optarg; break;
        case 's': options->n_streams = whole(optarg, "streams", 1, 4096); break;
        case 'n': options->n_requests = whole(optarg, "requests", 1, REQUESTS_MAX); break;
        case 'r': options->rate = positive(optarg, "rate"); break;
        case 'l': options->n_prompt = whole(optarg, "prompt", 1, 1u << 20); break;
        case 't': options->n_new = whole(optarg, "tokens", 1, 1u << 20); break;
        case 'i':
            if (sscanf(optarg, "%" SCNu32 "-%" SCNu32, &options->settings.id_low, &options->settings.id_high) != 2 ||
                options->settings.id_low >= options->settings.id_high)
                usage("--ids: LOW-HIGH belongs here");
            break;
        case 'e': options->settings.seed = whole(optarg, "seed", 0, UINT32_MAX); break;
        case 'm':
            if (strpbrk(optarg, "\"\\")) usage("--model: no quotes and backslashes, please");
            options->settings.model = optarg;
            break;
        case 'x': options->settings.extra = members(optarg); break;
        case 'a':
            options->arrives = true;
            if (sscanf(optarg, "%" SCNu32 ":%" SCNu32 ":%" SCNu32, &options->arrive_prompt, &options->arrive_new, &options->arrive_after) != 3 ||
                options->arrive_prompt == 0 || options->arrive_prompt > 1u << 20 || options->arrive_new == 0)
                usage("--arrive: PROMPT:TOKENS:AFTER belongs here");
            break;
        case 'o': options->timeout_s = positive(optarg, "timeout"); break;
        default: usage("these are the options:");
        }
    if (optind < argc) usage("no arguments beside options, please");
    if (port == 0) usage("--port: none given");
    if (options->n_requests < options->n_streams) options->n_requests = options->n_streams;
    if (options->arrives && (options->rate > 0 || options->n_requests != options->n_streams)) usage("--arrive: with --streams alone");
    options->settings.address = (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    if (inet_pton(AF_INET, host, &options->settings.address.sin_addr) != 1) usage("--host: an IPv4 address belongs here");
}

/* ---- the run ---- */

static void settle(struct load *load, struct stream *stream) {
    if (stream->state != STREAM_DONE && stream->state != STREAM_FAILED) return;
    stream_close(stream);
    load->n_live--;
    load->n_ended++;
}

static void start(struct load *load, struct stream *stream) {
    stream_start(stream, &load->options.settings);
    load->n_live++;
    if (stream->state == STREAM_SENDS) {
        struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLET, .data.ptr = stream};
        CHECK(epoll_ctl(load->epoll, EPOLL_CTL_ADD, stream->socket, &event) == 0);
    }
    settle(load, stream);
}

/* Closed loop: as many as may run at once. Open loop: those whose time has come. */
static void start_due(struct load *load) {
    const struct options *options = &load->options;
    while (load->n_started < options->n_requests) {
        if (options->rate > 0) {
            if (clock_now_ns() < load->next_ns) return;
            double wait_s = -log(1 - (double)random_below(&load->random, 1u << 30) / (1u << 30)) / options->rate;
            load->next_ns += (uint64_t)(wait_s * 1e9);
        } else if (load->n_live >= options->n_streams) {
            return;
        }
        start(load, &load->streams[load->n_started++]);
    }
}

static void start_arrival(struct load *load) {
    if (!load->options.arrives || load->arrival) return;
    for (uint32_t i = 0; i < load->options.n_requests; i++)
        if (load->streams[i].n_events < load->options.arrive_after) return;
    load->arrival = &load->streams[load->options.n_requests];
    start(load, load->arrival);
}

/* The longest gap of a stream may be the one that the first token of what arrived lies in: it must end before the run does. */
static bool all_heard_since(const struct load *load, uint64_t since_ns) {
    for (uint32_t i = 0; i < load->options.n_requests; i++) {
        const struct stream *stream = &load->streams[i];
        bool live = stream->state == STREAM_SENDS || stream->state == STREAM_READS;
        if (live && (stream->n_events == 0 || stream->event_ns[stream->n_events - 1] <= since_ns)) return false;
    }
    return true;
}

static bool over(const struct load *load) {
    const struct stream *arrival = load->arrival;
    if (interrupted || load->n_ended == load->options.n_requests + load->options.arrives) return true;
    if (load->options.arrives && !arrival && load->n_live == 0) return true; /* they all ended before it came */
    if (!arrival || arrival->state == STREAM_FAILED) return arrival != NULL;
    return arrival->state == STREAM_DONE && (arrival->n_events == 0 || all_heard_since(load, arrival->event_ns[0]));
}

static int wait_ms(const struct load *load, uint64_t deadline_ns) {
    uint64_t now = clock_now_ns(), until = deadline_ns;
    if (load->options.rate > 0 && load->n_started < load->options.n_requests && load->next_ns < until) until = load->next_ns;
    return until <= now ? 0 : (int)((until - now) / 1000000 + 1);
}

static void run(struct load *load) {
    uint64_t deadline_ns = load->begin_ns + (uint64_t)(load->options.timeout_s * 1e9);
    struct epoll_event events[EVENTS];
    start_due(load);
    while (!over(load) && clock_now_ns() < deadline_ns) {
        int n = epoll_wait(load->epoll, events, EVENTS, wait_ms(load, deadline_ns));
        for (int i = 0; i < n; i++) {
            struct stream *stream = events[i].data.ptr;
            stream_continue(stream);
            settle(load, stream);
        }
        start_due(load);
        start_arrival(load);
    }
}

/* ---- the report ---- */

struct sample_list {
    double *values;
    size_t count, room;
};

static void add(struct sample_list *list, double value) {
    if (list->count == list->room) {
        list->room = list->room ? 2 * list->room : 256;
        list->values = check_realloc(list->values, list->room, sizeof *list->values);
    }
    list->values[list->count++] = value;
}

static int ascending(const void *a, const void *b) {
    const double *x = a, *y = b;
    return (*x > *y) - (*x < *y);
}

/* Nearest rank. */
static double percentile(const struct sample_list *sorted, double share) {
    size_t rank = (size_t)ceil(share * (double)sorted->count);
    return sorted->values[rank ? rank - 1 : 0];
}

static void key_double(struct json_writer *json, const char *key, double value) {
    json_key(json, key);
    json_double(json, value);
}

static void key_unsigned(struct json_writer *json, const char *key, uint64_t value) {
    json_key(json, key);
    json_unsigned(json, value);
}

static void write_samples(struct json_writer *json, const char *key, struct sample_list *list) {
    json_key(json, key);
    json_object(json);
    key_unsigned(json, "count", list->count);
    if (list->count) {
        qsort(list->values, list->count, sizeof *list->values, ascending);
        key_double(json, "p50", percentile(list, 0.5));
        key_double(json, "p99", percentile(list, 0.99));
        key_double(json, "max", list->values[list->count - 1]);
    }
    json_object_end(json);
    free(list->values);
    *list = (struct sample_list){0};
}

static double seconds(uint64_t from_ns, uint64_t to_ns) { return ((double)to_ns - (double)from_ns) / 1e9; }

static uint32_t tokens_of(const struct stream *stream) { return stream->n_tokens ? stream->n_tokens : stream->n_events; }

/* Gaps between pieces of text that overlap with [from_ns, to_ns). */
static void add_gaps(struct sample_list *gaps, const struct stream *stream, uint64_t from_ns, uint64_t to_ns) {
    for (uint32_t i = 1; i < stream->n_events; i++)
        if (stream->event_ns[i] > from_ns && stream->event_ns[i - 1] < to_ns) add(gaps, seconds(stream->event_ns[i - 1], stream->event_ns[i]));
}

/* An answer of fewer tokens than asked for is a failure, too: throughput would be of something else. */
static bool whole_answer(const struct stream *stream) {
    return stream->state == STREAM_DONE && (stream->n_tokens == 0 || stream->n_tokens == stream->n_new);
}

static void write_arrival(struct json_writer *json, const struct load *load) {
    const struct stream *arrival = load->arrival;
    struct sample_list gaps = {0};
    uint32_t n_over = 0;
    json_key(json, "arrival");
    if (!arrival || arrival->n_events == 0) {
        json_null(json);
        return;
    }
    for (uint32_t i = 0; i < load->options.n_requests; i++) {
        const struct stream *stream = &load->streams[i];
        add_gaps(&gaps, stream, arrival->submit_ns, arrival->event_ns[0]);
        n_over += stream->state == STREAM_DONE && stream->end_ns < arrival->event_ns[0];
    }
    json_object(json);
    key_double(json, "ttft_s", seconds(arrival->submit_ns, arrival->event_ns[0]));
    write_samples(json, "others_gap_s", &gaps);
    key_unsigned(json, "others_over_before", n_over); /* not 0: --tokens was too small */
    json_object_end(json);
}

/* [submit, first text, last text, end, tokens, pieces of text]; times in seconds of the monotonic clock, 0 where there was none. */
static void write_each(struct json_writer *json, const struct load *load, uint32_t n) {
    json_key(json, "each");
    json_array(json);
    for (uint32_t i = 0; i < n; i++) {
        const struct stream *stream = &load->streams[i];
        uint32_t n_events = stream->n_events;
        json_array(json);
        json_double(json, (double)stream->submit_ns / 1e9);
        json_double(json, n_events ? (double)stream->event_ns[0] / 1e9 : 0);
        json_double(json, n_events ? (double)stream->event_ns[n_events - 1] / 1e9 : 0);
        json_double(json, (double)stream->end_ns / 1e9);
        json_unsigned(json, tokens_of(stream));
        json_unsigned(json, n_events);
        json_array_end(json);
    }
    json_array_end(json);
}

/* Returns whether all went well. */
static bool report(const struct load *load) {
    uint32_t n = load->n_started + (load->arrival != NULL), n_whole = 0, n_failed = 0;
    uint64_t last_ns = load->begin_ns, n_tokens = 0, n_events = 0;
    struct sample_list ttft = {0}, gaps = {0};
    struct rusage used;
    struct buffer text = {0};
    struct json_writer json;
    const char *problem = "";
    for (uint32_t i = 0; i < n; i++) {
        const struct stream *stream = &load->streams[i];
        n_whole += whole_answer(stream);
        n_failed += stream->state == STREAM_FAILED || (stream->state == STREAM_DONE && !whole_answer(stream));
        if (stream->state == STREAM_FAILED && !*problem) problem = stream->error;
        n_tokens += tokens_of(stream);
        n_events += stream->n_events;
        if (stream->n_events) {
            add(&ttft, seconds(stream->submit_ns, stream->event_ns[0]));
            if (stream->event_ns[stream->n_events - 1] > last_ns) last_ns = stream->event_ns[stream->n_events - 1];
        }
        add_gaps(&gaps, stream, 0, UINT64_MAX);
    }
    (void)getrusage(RUSAGE_SELF, &used);
    double wall_s = seconds(load->begin_ns, last_ns),
           cpu_s = (double)(used.ru_utime.tv_sec + used.ru_stime.tv_sec) + (double)(used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6;
    json_begin(&json, &text);
    json_object(&json);
    key_unsigned(&json, "requests", n);
    key_unsigned(&json, "whole", n_whole);
    key_unsigned(&json, "failed", n_failed);
    json_key(&json, "problem");
    json_text(&json, problem);
    key_double(&json, "wall_s", wall_s);
    key_unsigned(&json, "output_tokens", n_tokens);
    key_unsigned(&json, "pieces", n_events);
    key_double(&json, "output_tok_s", wall_s > 0 ? (double)n_tokens / wall_s : 0);
    write_samples(&json, "ttft_s", &ttft);
    write_samples(&json, "gap_s", &gaps);
    key_double(&json, "client_cpu_s", cpu_s);
    key_double(&json, "client_cpu_share", wall_s > 0 ? cpu_s / wall_s : 0);
    if (load->options.arrives) write_arrival(&json, load);
    write_each(&json, load, n);
    json_object_end(&json);
    buffer_append_byte(&text, '\n');
    (void)fwrite(text.bytes, 1, text.length, stdout);
    buffer_done(&text);
    if (load->options.arrives) return load->arrival && whole_answer(load->arrival) && n_failed == 0;
    return n_whole == load->options.n_requests;
}

int main(int argc, char **argv) {
    struct load load = {0};
    read_options(argc, argv, &load.options);
    const struct options *options = &load.options;
    struct sigaction action = {.sa_handler = on_signal};
    (void)sigaction(SIGINT, &action, NULL);
    (void)sigaction(SIGTERM, &action, NULL);
    load.epoll = epoll_create1(EPOLL_CLOEXEC);
    CHECK(load.epoll >= 0);
    load.streams = check_calloc(options->n_requests + 1, sizeof *load.streams);
    for (uint32_t i = 0; i < options->n_requests; i++) stream_prepare(&load.streams[i], &options->settings, i, options->n_prompt, options->n_new);
    if (options->arrives)
        stream_prepare(&load.streams[options->n_requests], &options->settings, options->n_requests, options->arrive_prompt, options->arrive_new);
    load.random.state = options->settings.seed;
    load.begin_ns = load.next_ns = clock_now_ns();
    run(&load);
    bool well = report(&load);
    for (uint32_t i = 0; i <= options->n_requests; i++) stream_free(&load.streams[i]);
    free(load.streams);
    (void)close(load.epoll);
    return well ? 0 : 1;
}

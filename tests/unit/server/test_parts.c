/* The small parts: stop strings, one choice's text, offsets and finishes, keys, SHA-256, metrics text, notify. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cmocka.h>

#include "base/check.h"
#include "base/random.h"
#include "model/tokenizer_load.h"
#include "server/choice.h"
#include "server/keys.h"
#include "server/metrics.h"
#include "server/notify.h"

/* ---- stop strings ---- */

/* The oracle: the whole text, every position, every string; the match that ends first, of those the longest. */
static size_t search(const char *text, size_t length, const struct stop_string *strings, uint32_t n, size_t *start) {
    for (size_t end = 1; end <= length; end++) {
        size_t best = 0;
        for (uint32_t i = 0; i < n; i++)
            if (strings[i].length <= end && strings[i].length > best &&
                memcmp(text + end - strings[i].length, strings[i].bytes, strings[i].length) == 0)
                best = strings[i].length;
        if (best) {
            *start = end - best;
            return end;
        }
    }
    return SIZE_MAX;
}

static void test_stop_in_pieces(void **state) {
    (void)state;
    struct random random = {7};
    uint32_t matches = 0, misses = 0;
    for (int round = 0; round < 50000; round++) {
        char text[40], words[4][8];
        struct stop_string strings[4];
        size_t length = random_below(&random, sizeof text);
        uint32_t n = random_below(&random, 5);
        for (size_t i = 0; i < length; i++) text[i] = (char)('a' + random_below(&random, 3));
        for (uint32_t i = 0; i < n; i++) {
            strings[i] = (struct stop_string){words[i], 1 + random_below(&random, 6)};
            for (size_t j = 0; j < strings[i].length; j++) words[i][j] = (char)('a' + random_below(&random, 3));
        }
        bool keep = random_below(&random, 2);
        size_t start = 0, end = search(text, length, strings, n, &start);
        struct stop_match stop;
        struct buffer out = {0};
        bool stopped = false;
        stop_match_init(&stop, strings, n, keep);
        for (size_t at = 0; at < length && !stopped;) {
            size_t piece = 1 + random_below(&random, 5);
            if (piece > length - at) piece = length - at;
            stopped = stop_match_put(&stop, text + at, piece, &out);
            at += piece;
            /* What is out can never be taken back */
            assert_true(out.length <= (end == SIZE_MAX ? length : keep ? end : start));
        }
        if (!stopped) stop_match_flush(&stop, &out);
        assert_int_equal(stopped, end != SIZE_MAX);
        assert_int_equal(out.length, end == SIZE_MAX ? length : keep ? end : start);
        if (out.length) assert_memory_equal(out.bytes, text, out.length);
        stopped ? matches++ : misses++;
        stop_match_done(&stop);
        buffer_done(&out);
    }
    assert_true(matches > 5000 && misses > 5000);
}

/* ---- a choice ---- */

struct played {
    struct choice choice;
    struct piece piece;
};

static struct tokenizer *tokenizer;

static void take(struct choice *choice, int32_t token, enum finish finish) {
    struct event event = {.has_token = token >= 0, .finish = finish, .sample = {.token = token, .logprob = -1, .n_top = -1}};
    choice_take(choice, &event);
}

/* All bytes of `text` as tokens, with `finish` on the last; rendered token by token or at the end. */
static void play(struct played *played, struct completion *completion, const char *text, enum finish finish, bool streamed) {
    size_t length = strlen(text);
    *played = (struct played){0};
    choice_init(&played->choice, completion, tokenizer, 0, 0);
    for (size_t i = 0; i < length; i++) {
        take(&played->choice, (unsigned char)text[i], i + 1 == length ? finish : FINISH_NONE);
        while (streamed && choice_ready(&played->choice)) choice_next(&played->choice, &played->piece);
    }
    while (choice_ready(&played->choice)) choice_next(&played->choice, &played->piece);
}

static void played_done(struct played *played) {
    choice_done(&played->choice);
    piece_done(&played->piece);
}

static void assert_text(const struct played *played, const char *text, const char *reason, uint32_t tokens) {
    assert_int_equal(played->piece.text.length, strlen(text));
    if (*text) assert_memory_equal(played->piece.text.bytes, text, strlen(text));
    assert_true(played->choice.closed);
    assert_string_equal(played->choice.finish_reason, reason);
    assert_int_equal(played->choice.n_tokens, tokens);
}

static void test_choice(void **state) {
    (void)state;
    for (int streamed = 0; streamed < 2; streamed++) {
        struct completion completion = {.logprobs = 0, .skip_special = true, .n_stops = 1, .stops = {{"cd", 2}}};
        struct played played;
        play(&played, &completion, "abcx", FINISH_LENGTH, streamed);
        assert_text(&played, "abcx", "length", 4);
        played_done(&played);
        play(&played, &completion, "abcdef", FINISH_LENGTH, streamed);
        assert_text(&played, "ab", "stop", 4);
        assert_int_equal(played.choice.stop.matched, 0);
        assert_int_equal(played.piece.n_records, 4); /* up to the token that completed it */
        played_done(&played);
        play(&played, &completion, "abc", FINISH_LENGTH, streamed); /* held back at the end: goes out */
        assert_text(&played, "abc", "length", 3);
        played_done(&played);
        completion.keep_stop = true;
        play(&played, &completion, "abcdef", FINISH_LENGTH, streamed);
        assert_text(&played, "abcd", "stop", 4);
        played_done(&played);
        completion.keep_stop = false;
        completion.min_tokens = 3; /* c is muted, d alone is no stop; the second one counts */
        play(&played, &completion, "abcdcdx", FINISH_LENGTH, streamed);
        assert_text(&played, "abcd", "stop", 6);
        played_done(&played);
        completion.min_tokens = 0;
        /* The token that ended it is counted and not shown; its id is the reason if it was asked for */
        completion.n_stop_tokens = 1;
        completion.stop_tokens[0] = 'e';
        play(&played, &completion, "abe", FINISH_STOP, streamed);
        assert_text(&played, "ab", "stop", 3);
        assert_int_equal(played.choice.stop_token, 'e');
        played_done(&played);
        play(&played, &completion, "abz", FINISH_STOP, streamed);
        assert_int_equal(played.choice.stop_token, TOKEN_NONE);
        played_done(&played);
    }
}

static void test_offsets(void **state) {
    (void)state;
    /* a, two bytes of an accent, four of an emoji, b: characters before each token */
    static const uint64_t offsets[] = {0, 1, 1, 2, 2, 2, 2, 3};
    struct completion completion = {.logprobs = 0, .skip_special = true};
    struct played played;
    for (int streamed = 0; streamed < 2; streamed++) {
        play(&played, &completion,
             "a\xc3\xa9\xf0\x9f\x98\x80"
             "b",
             FINISH_LENGTH, streamed);
        size_t at = 0, i = 0;
        const struct record *record;
        while ((record = piece_next(&played.piece.records, &at))) assert_int_equal(record->offset, offsets[i++]);
        assert_int_equal(i, sizeof offsets / sizeof *offsets);
        played_done(&played);
    }
    assert_int_equal(count_characters("a\xc3\xa9\xff\xe2\x82", 6), 5); /* a byte of no character is shown as one */
}

/* ---- keys ---- */

static void test_sha256(void **state) {
    (void)state;
    /* FIPS 180-4's examples, and lengths around the padding */
    static const struct {
        const char *text, *hex;
    } known[] = {
        {"", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"},
        {"abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"},
        {"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq", "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1"},
        {"abcdefghbcdefghicdefghijdefghijkefghijklfghijklmghijklmnhijklmnoijklmnopjklmnopqklmnopqrlmnopqrsmnopqrstnopqrstu",
         "cf5b16a778af8380036ce59e7b0492370b249b11e8f07a51afac45037afee9d1"},
    };
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        uint8_t digest[SHA256_BYTES];
        char hex[2 * SHA256_BYTES + 1];
        sha256(known[i].text, strlen(known[i].text), digest);
        for (int j = 0; j < SHA256_BYTES; j++) (void)snprintf(hex + 2 * j, 3, "%02x", digest[j]);
        assert_string_equal(hex, known[i].hex);
    }
}

static void write_file(const char *path, const char *text) {
    FILE *file = fopen(path, "w");
    assert_non_null(file);
    assert_true(fputs(text, file) >= 0);
    assert_int_equal(fclose(file), 0);
}

static void test_keys(void **state) {
    (void)state;
    char path[] = "/tmp/kvasir-test-keys-XXXXXX";
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    (void)close(fd);
    struct keys keys = {0};
    struct error error;
    assert_int_equal(keys_load(&keys, "", &error), STATUS_OK);
    assert_false(keys.required);
    write_file(path, "# one\n\n  alpha\t\r\nbeta\nbeta\ngamma");
    assert_int_equal(keys_load(&keys, path, &error), STATUS_OK);
    assert_true(keys.required);
    assert_int_equal(keys.n_valid, 3);
    uint32_t alpha = keys_find(&keys, "alpha", 5), beta = keys_find(&keys, "beta", 4);
    assert_true(alpha != KEY_NONE && beta != KEY_NONE && alpha != beta);
    assert_int_equal(keys_find(&keys, "alph", 4), KEY_NONE);
    assert_int_equal(keys_find(&keys, "alphaa", 6), KEY_NONE);
    assert_int_equal(keys_find(&keys, "", 0), KEY_NONE);
    /* A reload keeps the entry of a key whose requests live, and its count */
    keys.keys[alpha].live = 2;
    write_file(path, "delta\nbeta\n");
    assert_int_equal(keys_load(&keys, path, &error), STATUS_OK);
    assert_int_equal(keys_find(&keys, "alpha", 5), KEY_NONE);
    assert_int_equal(keys_find(&keys, "beta", 4), beta);
    assert_int_not_equal(keys_find(&keys, "delta", 5), KEY_NONE);
    assert_int_not_equal(keys_find(&keys, "delta", 5), alpha);
    assert_int_equal(keys.keys[alpha].live, 2);
    /* What cannot be read changes nothing */
    static const char *const broken[] = {"", "# only this\n", "two words\n", "caf\xc3\xa9\n"};
    for (size_t i = 0; i < sizeof broken / sizeof *broken; i++) {
        write_file(path, broken[i]);
        assert_int_equal(keys_load(&keys, path, &error), STATUS_INVALID);
        assert_non_null(strstr(error.text, path));
        assert_int_equal(keys_find(&keys, "beta", 4), beta);
    }
    assert_int_equal(unlink(path), 0);
    assert_int_equal(keys_load(&keys, path, &error), STATUS_INVALID);
    assert_int_equal(keys_find(&keys, "beta", 4), beta);
    keys_done(&keys);
    size_t length;
    assert_string_equal(keys_from_headers("Bearer  k1", NULL, &length), "k1");
    assert_string_equal(keys_from_headers("bearer k1", "k2", &length), "k1");
    assert_string_equal(keys_from_headers("Basic eDp5", "k2", &length), "k2");
    assert_null(keys_from_headers("Bearer ", NULL, &length));
    assert_null(keys_from_headers(NULL, NULL, &length));
}

/* ---- metrics ---- */

/* Every line is a comment or `name{labels} number`; HELP and TYPE come once and before their samples; buckets ascend and end in the count. */
static void check_page(char *page, bool colons) {
    char family[128] = "", type[32] = "", seen[8192] = "";
    double last = 0;
    unsigned lines = 0;
    for (char *line = strtok(page, "\n"); line; line = strtok(NULL, "\n")) {
        lines++;
        if (sscanf(line, "# HELP %127s", family) == 1) {
            char mark[140];
            (void)snprintf(mark, sizeof mark, "|%s|", family);
            if (strstr(seen, mark)) fail_msg("%s stands twice", family);
            assert_true(strlen(seen) + strlen(mark) < sizeof seen);
            strcat(seen, mark);
            last = 0;
            continue;
        }
        char name[128];
        if (sscanf(line, "# TYPE %127s %31s", name, type) == 2) {
            assert_string_equal(name, family);
            size_t n = strlen(name);
            if (strcmp(type, "counter") == 0) assert_string_equal(name + n - 6, "_total");
            continue;
        }
        size_t length = strcspn(line, "{ ");
        if (strncmp(line, family, strlen(family)) != 0) fail_msg("outside its family %s: %s", family, line);
        if (!colons) assert_null(memchr(line, ':', length));
        const char *value = strrchr(line, ' ');
        char *end;
        assert_non_null(value);
        double number = strtod(value + 1, &end);
        if (*end || end == value + 1) fail_msg("no number: %s", line);
        if (strncmp(line + strlen(family), "_bucket", 7) == 0) {
            if (number < last) fail_msg("buckets fall: %s", line);
            last = number;
        } else if (strncmp(line + strlen(family), "_count", 6) == 0) {
            assert_true(number == last);
        }
    }
    assert_true(lines > 300);
}

static void test_metrics(void **state) {
    (void)state;
    static const char *const routes[] = {"/a", "other"};
    struct metrics metrics;
    struct metrics_view view = {.model_name = "x\"y\\z\n",
                                .version = "1",
                                .backend = "cpu \"q\"",
                                .architecture = "a",
                                .kv_dtype = "f16",
                                .route_names = routes,
                                .n_routes = 1};
    metrics_init(&metrics);
    metrics_set_context(&metrics, 5000);
    metrics_answer(&metrics, 0, 200);
    metrics_answer(&metrics, UINT32_MAX, 404);
    metrics_answer(&metrics, 0, 299);
    histogram_observe(&metrics.histograms[METRIC_TIME_TO_FIRST_TOKEN], 0.005); /* le: the bound is inside */
    histogram_observe(&metrics.histograms[METRIC_TIME_TO_FIRST_TOKEN], 0.0051);
    histogram_observe(&metrics.histograms[METRIC_TIME_TO_FIRST_TOKEN], 1e9);
    view.engine.blocks_total = 200;
    view.engine.blocks_used = 50;
    for (int vllm = 0; vllm < 2; vllm++) {
        struct buffer page = {0};
        view.vllm_names = vllm;
        metrics_page(&page, &metrics, &view);
        buffer_append_byte(&page, '\0');
        assert_non_null(strstr(page.bytes, "kvasir_kv_cache_usage_ratio{model_name=\"x\\\"y\\\\z\\n\"} 0.25\n"));
        assert_non_null(strstr(page.bytes, "kvasir_requests_total{model_name=\"x\\\"y\\\\z\\n\",endpoint=\"/a\",code=\"200\"} 1\n"));
        assert_non_null(strstr(page.bytes, ",endpoint=\"other\",code=\"404\"} 1\n"));
        assert_non_null(strstr(page.bytes, "kvasir_time_to_first_token_seconds_bucket{model_name=\"x\\\"y\\\\z\\n\",le=\"0.005\"} 1\n"));
        assert_non_null(strstr(page.bytes, "kvasir_time_to_first_token_seconds_bucket{model_name=\"x\\\"y\\\\z\\n\",le=\"0.01\"} 2\n"));
        assert_non_null(strstr(page.bytes, "kvasir_time_to_first_token_seconds_bucket{model_name=\"x\\\"y\\\\z\\n\",le=\"+Inf\"} 3\n"));
        assert_non_null(strstr(page.bytes, ",le=\"5000\"} 0\n"));
        assert_int_equal(strstr(page.bytes, "vllm:num_requests_running{") != NULL, vllm);
        if (!vllm) check_page(page.bytes, false);
        buffer_done(&page);
    }
}

/* ---- notify ---- */

static void test_notify(void **state) {
    (void)state;
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct notify notify;
    char message[256];
    notify_open(&notify); /* nobody asked */
    assert_int_equal(notify.socket, -1);
    notify_send(&notify, "READY=1");
    int listener = socket(AF_UNIX, SOCK_DGRAM, 0), n;
    assert_true(listener >= 0);
    (void)snprintf(address.sun_path + 1, sizeof address.sun_path - 1, "kvasir-test-%d", (int)getpid());
    assert_int_equal(
        bind(listener, (struct sockaddr *)&address, (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + strlen(address.sun_path + 1))), 0);
    (void)snprintf(message, sizeof message, "@%s", address.sun_path + 1);
    assert_int_equal(setenv("NOTIFY_SOCKET", message, 1), 0);
    assert_int_equal(setenv("WATCHDOG_USEC", "30000000", 1), 0);
    notify_open(&notify);
    assert_true(notify.socket >= 0 && notify.watchdog_ns == 30000000000ull);
    assert_null(getenv("NOTIFY_SOCKET"));
    notify_send(&notify, "READY=1\nSTATUS=%s", "serving");
    n = (int)recv(listener, message, sizeof message - 1, 0);
    assert_true(n > 0);
    message[n] = '\0';
    assert_string_equal(message, "READY=1\nSTATUS=serving");
    notify_close(&notify);
    (void)close(listener);
}

static int setup(void **state) {
    (void)state;
    tokenizer = tokenizer_byte_level(300);
    return 0;
}
static int teardown(void **state) {
    (void)state;
    tokenizer_close(tokenizer);
    return 0;
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_stop_in_pieces), cmocka_unit_test(test_choice),  cmocka_unit_test(test_offsets), cmocka_unit_test(test_sha256),
        cmocka_unit_test(test_keys),           cmocka_unit_test(test_metrics), cmocka_unit_test(test_notify),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}

/* Options end to end: defaults, file, environment, flags; errors; reload; the rules between options; what is printed reads back. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <sys/ioctl.h>
#include <sys/stat.h>

#include "config/options.h"

static char path[64];

static void write_file(const char *text) {
    FILE *file = fopen(path, "w");
    assert_non_null(file);
    assert_true(fputs(text, file) >= 0);
    assert_int_equal(fclose(file), 0);
}

static int setup(void **state) {
    (void)state;
    (void)snprintf(path, sizeof path, "/tmp/kvasir-config-XXXXXX");
    int fd = mkstemp(path);
    if (fd < 0) return -1;
    close(fd);
    return clearenv();
}

static int teardown(void **state) {
    (void)state;
    unlink(path);
    return clearenv();
}

/* A command line of at most 15 arguments, NULL at its end. */
static enum status load(struct config *config, struct error *error, ...) {
    char words[16][128] = {"serve"};
    char *argv[17] = {words[0]};
    int argc = 1, first;
    bool help;
    va_list args;
    va_start(args, error);
    for (const char *word; (word = va_arg(args, const char *)) != NULL; argc++) {
        assert_true(argc < 16);
        (void)snprintf(words[argc], sizeof words[argc], "%s", word);
        argv[argc] = words[argc];
    }
    va_end(args);
    *error = (struct error){.text = ""};
    return config_load(config, argc, argv, &first, &help, error);
}

static void test_defaults(void **state) {
    (void)state;
    struct config config;
    config_defaults(&config);
    assert_string_equal(config.host, "127.0.0.1");
    assert_int_equal(config.port, 8080);
    assert_int_equal(config.header_timeout_s, 10);
    assert_int_equal(config.body_timeout_s, 30);
    assert_int_equal(config.idle_timeout_s, 75);
    assert_int_equal(config.first_byte_timeout_s, 15);
    assert_int_equal(config.request_timeout_s, 600);
    assert_int_equal(config.max_logprobs, 20);
    assert_string_equal(config.backend, "auto");
    assert_int_equal(config.threads, 0);
    assert_int_equal(config.kv_memory, 0);
    assert_true(config.prefix_cache);
    assert_int_equal(config_check(&config, NULL), STATUS_OK);
}

static void test_precedence(void **state) {
    (void)state;
    struct config config;
    struct error error;
    write_file("[server]\nport = 1111\nmax_queue = 7\nmax_body = \"2MiB\"\n");
    assert_int_equal(load(&config, &error, "--config", path, NULL), STATUS_OK);
    assert_int_equal(config.port, 1111);
    setenv("KVASIR_PORT", "2222", 1);
    setenv("KVASIR_MAX_QUEUE", "", 1); /* empty: not there */
    assert_int_equal(load(&config, &error, "--config", path, NULL), STATUS_OK);
    assert_int_equal(config.port, 2222);
    assert_int_equal(config.max_queue, 7);
    assert_int_equal(config.max_body, 2 << 20);
    assert_int_equal(load(&config, &error, "--port", "3333", "--config", path, NULL), STATUS_OK);
    assert_int_equal(config.port, 3333);
    setenv("KVASIR_CONFIG", path, 1);
    assert_int_equal(load(&config, &error, NULL), STATUS_OK);
    assert_int_equal(config.port, 2222);
    assert_int_equal(config.max_queue, 7);
}

static void test_flags(void **state) {
    (void)state;
    struct config config;
    char words[][24] = {"inspect", "first", "--port=81", "-mM.gguf", "-t", "4", "--no-prefix-cache", "second", "--vllm-names", "--", "--third"};
    char *argv[11];
    for (int i = 0; i < 11; i++) argv[i] = words[i];
    int first = 0;
    bool help = true;
    struct error error = {.text = ""};
    assert_int_equal(config_load(&config, 11, argv, &first, &help, &error), STATUS_OK);
    assert_false(help);
    assert_int_equal(config.port, 81);
    assert_string_equal(config.model, "M.gguf");
    assert_int_equal(config.threads, 4);
    assert_false(config.prefix_cache);
    assert_true(config.vllm_names);
    assert_int_equal(first, 8);
    assert_string_equal(argv[8], "first");
    assert_string_equal(argv[9], "second");
    assert_string_equal(argv[10], "--third");
    char ask[] = "--help", *two[] = {words[0], ask};
    setenv("KVASIR_PORT", "nonsense", 1); /* help is given all the same */
    assert_int_equal(config_load(&config, 2, two, &first, &help, &error), STATUS_OK);
    assert_true(help);
}

static void test_flag_errors(void **state) {
    (void)state;
    static const struct {
        const char *flag, *value, *says;
    } cases[] = {
        {"--rounds", "5", "option --rounds belongs to kvasir bench"},
        {"--rouns", "5", "unknown option --rouns (did you mean \"--rounds\"?)"},
        {"--prot", "80", "unknown option --prot (did you mean \"--port\"?)"},
        {"--port", "80000", "--port: \"80000\" is out of range (0 to 65535)"},
        {"--port", "-1", "--port: \"-1\" is out of range (0 to 65535)"},
        {"--port", "8o", "--port: \"8o\" is not a whole number (0 to 65535)"},
        {"--port", "", "--port: \"\" is not a whole number"},
        {"--port", "18446744073709551617", "is not a whole number"},
        {"--threads", "0x4", "is not a whole number (auto or 1 to 1024)"},
        {"--max-body", "10", "out of range (1KiB to 1GiB)"},
        {"--max-body", "99999999999999TiB", "is not a size"},
        {"--header-timeout", "1m30", "is not a duration"},
        {"--header-timeout", "2d", "out of range (1s to 60m)"},
        {"--step-ms", "nan", "is not a number"},
        {"--step-ms", "1e999", "is not a number"},
        {"--kv-dtype", "fp16", "--kv-dtype: \"fp16\" is none of auto, f32, f16, bf16, q8"},
        {"--kv-dtype", "", "is none of"},
        {"--kv-dtype", "f32, f16", "--kv-dtype: \"f32, f16\" is none of"}, /* a piece of the list of choices is no choice */
        {"--backend", "cpu, reference, mock", "is none of"},
        {"--log-level", "warn,", "is none of"},
        {"--prefix-cache=perhaps", NULL, "is neither true nor false"},
        {"--no-port", NULL, "unknown option --no-port"},
        {"--host", "a\nb", "control character"},
        {"--model", NULL, "--model: a value must follow"},
        {"-x", NULL, "unknown option -x"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct config config;
        struct error error;
        assert_int_equal(load(&config, &error, cases[i].flag, cases[i].value, NULL), STATUS_INVALID);
        if (!strstr(error.text, cases[i].says)) fail_msg("case %zu says: %s", i, error.text);
        assert_null(strchr(error.text, '\n'));
    }
    struct config config;
    struct error error;
    char longest[600];
    memset(longest, 'x', sizeof longest - 1);
    longest[sizeof longest - 1] = '\0';
    setenv("KVASIR_MODEL", longest, 1);
    assert_int_equal(load(&config, &error, NULL), STATUS_INVALID);
    assert_non_null(strstr(error.text, "KVASIR_MODEL: longer than 511 bytes"));
    setenv("KVASIR_MODEL", "", 1);
    setenv("KVASIR_MAX_QUEUE", "many", 1);
    assert_int_equal(load(&config, &error, NULL), STATUS_INVALID);
    assert_non_null(strstr(error.text, "KVASIR_MAX_QUEUE: \"many\" is not a whole number (0 to 65536)"));
}

static void test_file_errors(void **state) {
    (void)state;
    static const struct {
        const char *text, *place, *says;
    } cases[] = {
        {"[server]\nprot = 80\n", ":2:1: ", "unknown key \"server.prot\" (did you mean \"server.port\"?)"},
        {"port = 80\n", ":1:1: ", "unknown key \"port\" (did you mean \"server.port\"?)"},
        {"[servr]\nport = 80\n", ":1:2: ", "unknown key \"servr\" (did you mean \"server\"?)"},
        {"[compresion]\npolicy = \"h2o\"\n", ":1:2: ", "unknown key \"compresion\" (did you mean \"compression\"?)"},
        {"[engin]\nthreads = 2\n", ":1:2: ", "unknown key \"engin\""},
        {"[empty]\n", ":1:2: ", "unknown key \"empty\""},
        {"[[server]]\nport = 1\n", ":1:3: ", "server: an array where a table belongs: [server]"},
        {"\"server.port\" = 1\n", ":1:1: ", "unknown key"},
        {"[server]\n\nport = 70000\n", ":3:8: ", "server.port: \"70000\" is out of range (0 to 65535)"},
        {"[server]\nport = \"80\"\n", ":2:8: ", "server.port: a string where a whole number belongs (0 to 65535)"},
        {"[server]\nport = 80.5\n", ":2:8: ", "a number with a fraction where a whole number belongs"},
        {"[server]\nhost = 127\n", ":2:8: ", "server.host: a whole number where a string belongs"},
        {"[server.port]\nx = 1\n", ":1:", "server.port: a table where a whole number belongs"},
        {"[engine]\nprefix_cache = 1\n", ":2:16: ", "where true or false belongs"},
        {"[engine]\nstep_ms = inf\n", ":2:11: ", "engine.step_ms: \"inf\" is not a number"},
        {"[server]\nallowed_hosts = [1]\n", ":2:17: ", "an array where a string or an array of strings belongs"},
        {"[server]\nport = 1\nport = 2\n", ":3:", "redefine"},
        {"[server]\nhost = \"\xc3\x28\"\n", ":2:", "utf-8"},
        {"[server]\nhost = \"a\\u0000b\"\n", ":2:8: ", "control character"},
        {"[[server]]\nport = 1\n", ":1:", "server"},
        {"server = 1\n", ":1:1: ", "server: a whole number where a table belongs: [server]"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct config config, before;
        struct error error = {.text = ""};
        config_defaults(&config);
        before = config;
        write_file(cases[i].text);
        assert_int_equal(config_load_file(&config, path, &error), STATUS_INVALID);
        if (strncmp(error.text, path, strlen(path)) != 0 || !strstr(error.text, cases[i].place) || !strstr(error.text, cases[i].says))
            fail_msg("case %zu says: %s", i, error.text);
        assert_null(strchr(error.text, '\n'));
        assert_memory_equal(&config, &before, sizeof config);
    }
    struct config config;
    struct error error = {.text = ""};
    config_defaults(&config);
    assert_int_equal(config_load_file(&config, "/nonexistent/k.toml", &error), STATUS_IO);
    assert_non_null(strstr(error.text, "/nonexistent/k.toml: No such file"));
    assert_int_equal(config_load_file(&config, "/tmp", &error), STATUS_IO);
    assert_non_null(strstr(error.text, "directory"));
}

struct later {
    int end;
    atomic_bool given_up;
};

/* Has this process' first thread gone to sleep? */
static bool main_thread_sleeps(void) {
    char line[256] = "", name[64];
    (void)snprintf(name, sizeof name, "/proc/self/task/%d/stat", (int)getpid());
    FILE *file = fopen(name, "r");
    bool read = file && fgets(line, sizeof line, file);
    if (file) (void)fclose(file);
    const char *state = strrchr(line, ')');
    return read && state && state[1] == ' ' && state[2] == 'S';
}

/* Writes the rest of the file once the first half has been read and the reader waits, or has given up waiting. */
static void *write_later(void *context) {
    struct later *later = context;
    static const char rest[] = "port = 8123\n";
    int unread;
    while (ioctl(later->end, FIONREAD, &unread) == 0 && !atomic_load(&later->given_up) && (unread > 0 || !main_thread_sleeps())) (void)sched_yield();
    bool wrote = write(later->end, rest, sizeof rest - 1) == (ssize_t)sizeof rest - 1;
    return close(later->end) == 0 && wrote ? context : NULL;
}

static void test_a_pipe_is_read_to_its_end(void **state) {
    (void)state;
    int ends[2];
    char name[32];
    struct later later = {0};
    pthread_t writer;
    void *done;
    struct config config;
    struct error error = {0};
    config_defaults(&config);
    assert_int_equal(pipe(ends), 0);
    assert_int_equal(write(ends[1], "[server]\n", 9), 9);
    (void)snprintf(name, sizeof name, "/dev/fd/%d", ends[0]);
    later.end = ends[1];
    assert_int_equal(pthread_create(&writer, NULL, write_later, &later), 0);
    enum status status = config_load_file(&config, name, &error);
    atomic_store(&later.given_up, true);
    assert_int_equal(pthread_join(writer, &done), 0);
    if (status != STATUS_OK) fail_msg("%s", error.text);
    assert_non_null(done);
    close(ends[0]);
    assert_int_equal(config.port, 8123);
}

static void test_values_as_users_write_them(void **state) {
    (void)state;
    struct config config;
    struct error error;
    write_file("model = 'a b.gguf'\n[server]\nmax_body = 2048\nrequest_timeout = \"1h30m\"\nbody_timeout = 7\nheartbeat = \"off\"\nallowed_hosts = "
               "['a.example', 'b']\n"
               "[engine]\nkv_memory = \"1.5GiB\"\nthreads = \"auto\"\nstep_ms = 10\nseed = 42\n[metrics]\nvllm_names = true\n");
    assert_int_equal(load(&config, &error, "-c", path, NULL), STATUS_OK);
    assert_string_equal(config.model, "a b.gguf");
    assert_int_equal(config.max_body, 2048);
    assert_int_equal(config.request_timeout_s, 5400);
    assert_int_equal(config.body_timeout_s, 7);
    assert_int_equal(config.heartbeat_s, 0);
    assert_string_equal(config.allowed_hosts, "a.example,b");
    assert_int_equal(config.kv_memory, 3ull << 29);
    assert_int_equal(config.threads, 0);
    assert_float_equal(config.step_ms, 10, 0);
    assert_int_equal(config.seed, 42);
    assert_true(config.vllm_names);
    assert_int_equal(load(&config, &error, "--kv-memory", "4GB", "--max-body=512k", NULL), STATUS_OK);
    assert_int_equal(config.kv_memory, 4000000000ull);
    assert_int_equal(config.max_body, 512 << 10);
}

static void test_reload(void **state) {
    (void)state;
    struct config now, next;
    struct error error;
    char refused[128];
    write_file("[server]\nport = 1\nmax_logprobs = 3\nlog_level = \"debug\"\nidle_timeout = 5\n");
    assert_int_equal(load(&now, &error, "-c", path, "--idle-timeout", "9", NULL), STATUS_OK);
    write_file("[server]\nport = 2\nlog_level = \"warn\"\nidle_timeout = 6\n[engine]\nthreads = 2\n");
    assert_int_equal(config_reload(&now, &next, refused, sizeof refused, &error), STATUS_OK);
    assert_string_equal(next.log_level, "warn");
    assert_int_equal(next.max_logprobs, 20);  /* no longer in the file: the default again */
    assert_int_equal(next.idle_timeout_s, 9); /* the flag still wins */
    assert_int_equal(next.port, 1);
    assert_int_equal(next.threads, 0);
    assert_string_equal(refused, "server.port, engine.threads");
    struct config before = next;
    write_file("[server]\nlog_level = \"wran\"\n");
    assert_int_equal(config_reload(&before, &next, refused, sizeof refused, &error), STATUS_INVALID);
    assert_memory_equal(&before, &next, sizeof next);
    write_file("[server]\nrequest_timeout = 1\n"); /* against first_byte_timeout */
    assert_int_equal(config_reload(&before, &next, refused, sizeof refused, &error), STATUS_INVALID);
    assert_memory_equal(&before, &next, sizeof next);
    unlink(path);
    assert_int_equal(config_reload(&before, &next, refused, sizeof refused, &error), STATUS_IO);
    assert_memory_equal(&before, &next, sizeof next);
}

/* `--config <(command)`: what it said once stays. */
static void test_reload_of_a_pipe(void **state) {
    (void)state;
    struct config now, next;
    struct error error;
    char refused[256];
    write_file("[server]\nlog_level = \"warn\"\nmax_logprobs = 3\n");
    assert_int_equal(load(&now, &error, "-c", path, NULL), STATUS_OK);
    unlink(path);
    assert_int_equal(mkfifo(path, 0600), 0);
    assert_int_equal(config_reload(&now, &next, refused, sizeof refused, &error), STATUS_OK);
    assert_memory_equal(&now, &next, sizeof next);
    assert_non_null(strstr(refused, path));
    unlink(path);
}

/* A rule between keys is broken where the first of them that the error names stands in the file. */
static void test_rules_have_lines(void **state) {
    (void)state;
    static const struct {
        const char *text, *flag, *place;
    } cases[] = {
        {"[server]\nport = 1\nhost = \"0.0.0.0\"\n", NULL, ":3: server.host"},
        {"[server]\nrequest_timeout = 1\n", NULL, ":2: server.first_byte_timeout"}, /* the other one has its default */
        {"[server]\nrequest_timeout = 1\nfirst_byte_timeout = 2\n", NULL, ":3: server.first_byte_timeout"},
        {"\n\n[compression]\nbudget_tokens = 8\n", NULL, ":4: compression.budget_tokens"},
        {"[compression]\nrecent_tokens = 400\n", "--budget-tokens=300", ":2: compression.budget_tokens"},
        {"[compression]\npooling_kernel = 4\n", NULL, ":2: compression.pooling_kernel"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct config config;
        struct error error;
        char words[256];
        write_file(cases[i].text);
        assert_int_equal(load(&config, &error, "-c", path, cases[i].flag, NULL), STATUS_OK);
        assert_int_equal(config_check(&config, &error), STATUS_INVALID);
        (void)snprintf(words, sizeof words, "%s%s:", path, cases[i].place);
        if (strncmp(error.text, words, strlen(words)) != 0) fail_msg("\"%s\" does not begin with \"%s\"", error.text, words);
    }
    struct config config;
    struct error error;
    assert_int_equal(load(&config, &error, "--host", "0.0.0.0", NULL), STATUS_OK);
    assert_int_equal(config_check(&config, &error), STATUS_INVALID);
    assert_memory_equal(error.text, "server.host:", 12); /* no file has it */
}

/* JSON and the metrics page carry it: no client could ask for what is no text. Paths may hold anything. */
static void test_the_served_name_is_text(void **state) {
    (void)state;
    struct config config;
    struct error error;
    static const char *const names[] = {"\xff", "caf\xe9", "a\xc3", "\xed\xa0\x80"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        assert_int_equal(load(&config, &error, "--served-name", names[i], NULL), STATUS_OK);
        assert_int_equal(config_check(&config, &error), STATUS_INVALID);
        assert_non_null(strstr(error.text, "served_name: not valid UTF-8"));
    }
    assert_int_equal(load(&config, &error, "--served-name", "caf\xc3\xa9 \xf0\x9f\x99\x82", "--model", "\xff.gguf", NULL), STATUS_OK);
    assert_int_equal(config_check(&config, &error), STATUS_OK);
}

static void test_public_bind_needs_keys(void **state) {
    (void)state;
    static const char *const private[] = {"127.0.0.1", "127.8.9.10", "localhost", "::1", "[::1]", "::ffff:127.0.0.1"};
    static const char *const public[] = {"0.0.0.0",       "::", "[::]", "192.168.1.4", "example.org", "127.0.0.1.example.org", "::ffff:10.0.0.1",
                                         "localhost.evil"};
    struct config config;
    struct error error;
    for (size_t i = 0; i < sizeof private / sizeof *private; i++) {
        assert_int_equal(load(&config, &error, "--host", private[i], NULL), STATUS_OK);
        assert_int_equal(config_check(&config, &error), STATUS_OK);
    }
    for (size_t i = 0; i < sizeof public / sizeof *public; i++) {
        assert_int_equal(load(&config, &error, "--host", public[i], NULL), STATUS_OK);
        assert_int_equal(config_check(&config, &error), STATUS_INVALID);
        assert_non_null(strstr(error.text, "api_key_file"));
        assert_int_equal(load(&config, &error, "--host", public[i], "--api-key-file", "keys", NULL), STATUS_OK);
        assert_int_equal(config_check(&config, &error), STATUS_OK);
        assert_int_equal(load(&config, &error, "--host", public[i], "--insecure-public", NULL), STATUS_OK);
        assert_int_equal(config_check(&config, &error), STATUS_OK);
    }
    assert_int_equal(load(&config, &error, "--host", "", NULL), STATUS_OK);
    assert_int_equal(config_check(&config, &error), STATUS_INVALID);
}

static void test_unknown_environment(void **state) {
    (void)state;
    char names[128];
    setenv("KVASIR_PORT", "1", 1);
    setenv("KVASIR_CONFIG", "x", 1);
    assert_int_equal(config_unknown_environment(names, sizeof names), 0);
    setenv("KVASIR_PROT", "1", 1);
    assert_int_equal(config_unknown_environment(names, sizeof names), 1);
    assert_string_equal(names, "KVASIR_PROT");
}

/* Every row: its default parses, stands in the example, and what is printed reads back as the same values. */
static void test_what_is_printed_reads_back(void **state) {
    (void)state;
    struct config config, again;
    struct error error;
    assert_int_equal(load(&config, &error, "--host", "::1", "--model", "q\"uo\\te.gguf", "--kv-memory", "3GiB", "--step-ms", "12.5",
                          "--no-prefix-cache", "--threads", "3", "--seed", "7", NULL),
                     STATUS_OK);
    FILE *file = fopen(path, "w");
    config_print(&config, file);
    fclose(file);
    config_defaults(&again);
    if (config_load_file(&again, path, &error) != STATUS_OK) fail_msg("%s", error.text);
    for (size_t i = 0; i < options_count(); i++)
        assert_memory_equal((char *)&config + options[i].offset, (char *)&again + options[i].offset, options[i].size);

    char *example = NULL;
    size_t length = 0;
    FILE *stream = open_memstream(&example, &length);
    config_print_example(stream);
    fclose(stream);
    for (size_t i = 0; i < options_count(); i++) {
        char line[128];
        (void)snprintf(line, sizeof line, "\n# %s = ", option_leaf(&options[i]));
        if (!strstr(example, line)) fail_msg("the example lacks %s", options[i].key);
    }
    /* With every key live it is still a valid file, and changes nothing. */
    file = fopen(path, "w");
    for (char *at = example, *end; (end = strchr(at, '\n')) != NULL; at = end + 1) {
        *end = '\0';
        bool setting = at[0] == '#' && strstr(at, " = ") && !strchr(at + 2, '(') && strcspn(at + 2, " ") == (size_t)(strstr(at, " = ") - at - 2);
        fprintf(file, "%s\n", setting ? at + 2 : at);
    }
    fclose(file);
    free(example);
    config_defaults(&config);
    again = config;
    if (config_load_file(&again, path, &error) != STATUS_OK) fail_msg("%s", error.text);
    size_t from_file = 0;
    for (size_t i = 0; i < options_count(); i++) {
        assert_memory_equal((char *)&config + options[i].offset, (char *)&again + options[i].offset, options[i].size);
        from_file += again.source[i] == CONFIG_SOURCE_FILE;
    }
    assert_int_equal(from_file, options_count());
}

/* Flags of one command: that command takes them, the file and the environment do not know them. */
static void test_flags_of_one_command(void **state) {
    (void)state;
    struct config config;
    struct error error;
    char words[][16] = {"bench", "-p", "1,2", "-n0", "-b", "3", "--json", "-d9", "--rounds=7"};
    char *argv[9];
    for (int i = 0; i < 9; i++) argv[i] = words[i];
    int first = 0;
    bool help = false;
    setenv("KVASIR_CONTEXT", "77", 1);
    if (config_load(&config, 9, argv, &first, &help, &error) != STATUS_OK) fail_msg("%s", error.text);
    assert_string_equal(config.bench.prompts, "1,2");
    assert_string_equal(config.bench.batches, "3");
    assert_int_equal(config.bench.generate, 0);
    assert_int_equal(config.bench.context, 9);
    assert_int_equal(config.bench.rounds, 7);
    assert_true(config.bench.json);
    assert_false(config.bench.phases);
    write_file("[bench]\nrounds = 3\n");
    assert_int_equal(load(&config, &error, "--config", path, NULL), STATUS_INVALID);
    assert_non_null(strstr(error.text, "unknown key \"bench\""));
    char names[64];
    assert_int_equal(config_unknown_environment(names, sizeof names), 1);
    assert_string_equal(names, "KVASIR_CONTEXT");
    for (size_t i = 0; i < command_options_count(); i++) {
        const struct option_info *option = &command_options[i];
        assert_null(option_by_key(option->key));
        char command[32];
        (void)snprintf(command, sizeof command, "%.*s", (int)strcspn(option->key, "."), option->key);
        assert_int_equal(option_command(command), option->commands);
        for (size_t j = 0; j < options_count(); j++) {
            assert_string_not_equal(option_leaf(option), option_leaf(&options[j]));
            assert_true(option->flag == 0 || option->flag != options[j].flag);
        }
        for (size_t j = 0; j < i; j++) {
            if (!(option->commands & command_options[j].commands)) continue; /* --prompt of bench is not --prompt of eval */
            assert_string_not_equal(option_leaf(option), option_leaf(&command_options[j]));
            assert_true(option->flag == 0 || option->flag != command_options[j].flag);
        }
        assert_ptr_equal(option_by_flag(option_leaf(option), strlen(option_leaf(option)), option->commands),
                         strchr(option_leaf(option), '_') ? NULL : option);
        assert_true(option->flag != 'c' && option->flag != 'h');
    }
}

static void test_table_is_consistent(void **state) {
    (void)state;
    for (size_t i = 0; i < options_count(); i++) {
        assert_ptr_equal(option_by_key(options[i].key), &options[i]);
        for (size_t j = 0; j < i; j++) {
            assert_string_not_equal(option_leaf(&options[i]), option_leaf(&options[j])); /* flags and environment names have no table in them */
            assert_true(options[i].flag == 0 || options[i].flag != options[j].flag);
            assert_true(options[i].offset != options[j].offset);
        }
        assert_true(strlen(options[i].key) < 48);
        assert_true(options[i].commands != 0);
        assert_true(options[i].type == OPTION_BOOL || options[i].argument);
    }
}

/* Against the textbook recursion. */
static unsigned slow_distance(const char *a, size_t n, const char *b, size_t m) {
    if (n == 0 || m == 0) return (unsigned)(n + m);
    unsigned best = slow_distance(a, n - 1, b, m - 1) + (a[n - 1] != b[m - 1]);
    unsigned other = slow_distance(a, n - 1, b, m) + 1;
    if (other < best) best = other;
    other = slow_distance(a, n, b, m - 1) + 1;
    if (other < best) best = other;
    if (n > 1 && m > 1 && a[n - 1] == b[m - 2] && a[n - 2] == b[m - 1]) {
        other = slow_distance(a, n - 2, b, m - 2) + 1;
        if (other < best) best = other;
    }
    return best;
}

static void test_edit_distance(void **state) {
    (void)state;
    static const char *const words[] = {"", "a", "ab", "ba", "port", "prot", "pot", "prefix", "xiferp", "abcab", "bacba"};
    for (size_t i = 0; i < sizeof words / sizeof *words; i++)
        for (size_t j = 0; j < sizeof words / sizeof *words; j++)
            assert_int_equal(edit_distance(words[i], words[j]), slow_distance(words[i], strlen(words[i]), words[j], strlen(words[j])));
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(test_defaults),
        TEST(test_precedence),
        TEST(test_flags),
        TEST(test_flag_errors),
        TEST(test_file_errors),
        TEST(test_a_pipe_is_read_to_its_end),
        TEST(test_values_as_users_write_them),
        TEST(test_reload),
        TEST(test_reload_of_a_pipe),
        TEST(test_rules_have_lines),
        TEST(test_the_served_name_is_text),
        TEST(test_public_bind_needs_keys),
        TEST(test_unknown_environment),
        TEST(test_what_is_printed_reads_back),
        TEST(test_flags_of_one_command),
        TEST(test_table_is_consistent),
        TEST(test_edit_distance),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

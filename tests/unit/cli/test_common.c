/* What the commands share, where it is more than a call: whether random weights fit into memory, and whether there is what they are made for. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <string.h>

#include "cli/cli.h"

/* Weights and the backend's copy of them, and the sum is said. */
static void test_weights_that_fit(void **state) {
    (void)state;
    const uint64_t mib = 1 << 20;
    struct error error = {0};
    assert_int_equal(cli_dummy_fits("shape", 100 * mib, 200 * mib, &error), STATUS_OK);
    assert_int_equal(cli_dummy_fits("shape", 100 * mib, 200 * mib - 1, &error), STATUS_NO_MEMORY);
    assert_int_equal(cli_dummy_fits("shape", 4308 * mib, 6000 * mib, &error), STATUS_NO_MEMORY);
    assert_string_equal(error.text, "--dummy shape: 4308.0 MiB of random weights and as much for the backend's copy of them are 8616.0 MiB; "
                                    "6000.0 MiB are available");
    assert_int_equal(cli_dummy_fits("shape", UINT64_MAX, UINT64_MAX, &error), STATUS_NO_MEMORY);
    assert_int_equal(cli_dummy_fits("shape", 1, 0, &error), STATUS_NO_MEMORY);
}

/* Of 8B's shape it would take a quarter of a minute to say so afterwards. */
static void test_no_weights_for_a_device_that_is_not_there(void **state) {
    (void)state;
    struct config config;
    struct model *model = NULL;
    struct error error = {0};
    config_defaults(&config);
    strcpy(config.backend, "cuda");
    config.device = 63;
    assert_int_equal(cli_open_dummy(&config, "tiny", &model, &error), STATUS_UNSUPPORTED);
    assert_null(model);
    assert_non_null(strstr(error.text, backend_find("cuda") ? "engine.backend: cuda: no CUDA device" : "engine.backend: this build has no \"cuda\""));
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_weights_that_fit), cmocka_unit_test(test_no_weights_for_a_device_that_is_not_there)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}

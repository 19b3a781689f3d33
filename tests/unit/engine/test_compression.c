/* Operator's settings x request's wishes: what is granted, what is refused and under which name. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>

#include <cmocka.h>

#include "config/options.h"
#include "engine/compression.h"

static struct config defaults(void) {
    struct config config;
    config_defaults(&config);
    return config;
}

static void refused(const struct config *config, struct kv_wish wish, const char *expected_field, const char *words) {
    struct kv_plan plan;
    const char *field = NULL;
    struct error error = {0};
    assert_false(compression_plan(config, &wish, &plan, &field, &error));
    assert_string_equal(field, expected_field);
    if (!strstr(error.text, words)) fail_msg("\"%s\" does not say \"%s\"", error.text, words);
}

static struct kv_plan granted(const struct config *config, struct kv_wish wish) {
    struct kv_plan plan;
    const char *field = NULL;
    struct error error = {0};
    if (!compression_plan(config, &wish, &plan, &field, &error)) fail_msg("%s: %s", field, error.text);
    return plan;
}

static void test_without_a_table_every_policy_may_be_asked_for(void **state) {
    (void)state;
    struct config config = defaults();
    struct error error;
    assert_int_equal(compression_check(&config, &error), STATUS_OK);
    assert_string_equal(granted(&config, (struct kv_wish){0}).policy->name, "none");
    for (uint32_t i = 0; i < policy_count(); i++) {
        struct kv_wish wish = {.budget_tokens = 64};
        strcpy(wish.policy, policies[i]->name);
        struct kv_plan plan = granted(&config, wish);
        assert_ptr_equal(plan.policy, policies[i]);
        if (i > 0) assert_int_not_equal(plan.triggers & ~(unsigned)TRIGGER_PRESSURE, 0);
    }
    refused(&config, (struct kv_wish){.policy = "snap"}, "kv.policy", "snapkv");
    refused(&config, (struct kv_wish){.budget_tokens = 64}, "kv.budget_tokens", "name a policy");
    refused(&config, (struct kv_wish){.keep_ratio = 0.5}, "kv.keep_ratio", "name a policy");
    refused(&config, (struct kv_wish){.policy = "snapkv", .budget_tokens = 35}, "kv.budget_tokens", "36");
    granted(&config, (struct kv_wish){.policy = "snapkv", .budget_tokens = 36});
    refused(&config, (struct kv_wish){.policy = "snapkv", .keep_ratio = 1.5}, "kv.keep_ratio", "at most 1");
    refused(&config, (struct kv_wish){.policy = "snapkv", .keep_ratio = 0.5, .budget_tokens = 64}, "kv.keep_ratio", "exclude");
    refused(&config, (struct kv_wish){.policy = "snapkv", .budget_tokens = 64, .protect_tokens = 40}, "kv.protect_tokens", "64");
    assert_true(granted(&config, (struct kv_wish){.policy = "fastgen"}).target.keep_ratio == 1);
}

/* A budget alone is refused where nothing is evicted, in words that name what could be asked for; with "none" by name it is the baseline of a comparison. */
static void test_budgets_of_none(void **state) {
    (void)state;
    struct config config = defaults();
    refused(&config, (struct kv_wish){.policy = "none", .keep_ratio = 0.5, .budget_tokens = 64}, "kv.keep_ratio", "exclude");
    granted(&config, (struct kv_wish){.policy = "none", .budget_tokens = 64});
    granted(&config, (struct kv_wish){.policy = "none", .keep_ratio = 0.5, .protect_tokens = 8});
    granted(&config, (struct kv_wish){.policy = "none"});
    granted(&config, (struct kv_wish){.protect_tokens = 8});
    strcpy(config.allowed_policies, "tova, snapkv");
    refused(&config, (struct kv_wish){.budget_tokens = 64}, "kv.budget_tokens",
            "compresses nothing by itself: name a policy (kv.policy): snapkv, tova");
    refused(&config, (struct kv_wish){.keep_ratio = 0.5}, "kv.keep_ratio", "compresses nothing by itself");
    strcpy(config.allowed_policies, "none");
    refused(&config, (struct kv_wish){.budget_tokens = 64}, "kv.budget_tokens", "compresses nothing, and allows no request to ask for it");
    strcpy(config.compression_policy, "keydiff");
    granted(&config, (struct kv_wish){.budget_tokens = 64, .protect_tokens = 8});
}

static void test_operators_limits(void **state) {
    (void)state;
    struct config config = defaults();
    strcpy(config.compression_policy, "kv_compress");
    strcpy(config.allowed_policies, "snapkv, tova");
    config.budget_tokens = 256;
    config.min_budget = 128;
    config.may_disable = false;
    struct error error;
    assert_int_equal(compression_check(&config, &error), STATUS_OK);
    struct kv_plan plan = granted(&config, (struct kv_wish){0});
    assert_string_equal(plan.policy->name, "kv_compress");
    assert_int_equal(plan.target.budget_tokens, 256);
    assert_int_equal(compression_tokens_max(&plan), 256 + 32);
    granted(&config, (struct kv_wish){.policy = "tova"});
    granted(&config, (struct kv_wish){.policy = "kv_compress"});
    refused(&config, (struct kv_wish){.policy = "h2o"}, "kv.policy", "allowed: snapkv, tova");
    refused(&config, (struct kv_wish){.policy = "none"}, "kv.policy", "may_disable");
    refused(&config, (struct kv_wish){.budget_tokens = 127}, "kv.budget_tokens", "128");
}

static void test_settings_that_make_no_sense(void **state) {
    (void)state;
    static const struct {
        const char *policy, *triggers, *allowed, *words;
        bool reading;
    } cases[] = {
        {"snap", "", "", "compression.policy", false},
        {"snapkv", "budget", "", "compression.triggers: budget", false},
        {"streaming_llm", "prompt_end", "", "compression.triggers: prompt_end", false},
        {"h2o", "sometimes", "", "\"sometimes\"", false},
        {"snapkv", "", "tova, nova", "\"nova\"", false},
        {"snapkv", "", "", "later queries", true},
        {"keydiff", "pressure", "", "compress_while_reading", true},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct config config = defaults();
        struct error error = {0};
        strcpy(config.compression_policy, cases[i].policy);
        strcpy(config.compression_triggers, cases[i].triggers);
        strcpy(config.allowed_policies, cases[i].allowed);
        config.compress_while_reading = cases[i].reading;
        assert_int_equal(compression_check(&config, &error), STATUS_INVALID);
        if (!strstr(error.text, cases[i].words)) fail_msg("\"%s\" does not say \"%s\"", error.text, cases[i].words);
    }
}

/* What the operator names is all there is, where the policy knows it; pressure alone has no points of its own, and nothing that follows from them. */
static void test_triggers(void **state) {
    (void)state;
    struct config config = defaults();
    strcpy(config.compression_triggers, "pressure");
    struct error error;
    assert_int_equal(compression_check(&config, &error), STATUS_OK);
    for (uint32_t i = 1; i < policy_count(); i++) {
        struct kv_wish wish = {.budget_tokens = 64};
        strcpy(wish.policy, policies[i]->name);
        struct kv_plan plan = granted(&config, wish);
        struct scheduler_points points = compression_points(&plan);
        bool may = policies[i]->triggers & TRIGGER_PRESSURE;
        assert_int_equal(plan.triggers, may ? TRIGGER_PRESSURE : policies[i]->triggers);
        assert_int_equal(points.prompt_end, !may);
        assert_int_equal(points.growing > 0, !may);
        assert_int_equal(compression_tokens_max(&plan) == UINT32_MAX, may);
        if (may) assert_false(compression_is_endless(&plan, 1u << 20));
        /* Pressed right after its prompt, its last rows score. */
        if (policies[i]->rows == POLICY_ROWS_WINDOW) assert_int_equal(compression_first_row(&plan, 1000), 1000 - plan.options.window);
    }
    strcpy(config.compression_triggers, "budget, pressure");
    config.compress_while_reading = true;
    struct kv_plan plan = granted(&config, (struct kv_wish){.policy = "keydiff", .budget_tokens = 64});
    assert_int_equal(plan.triggers, TRIGGER_BUDGET | TRIGGER_PRESSURE);
    assert_true(plan.while_reading);
    strcpy(config.compression_triggers, "pressure");
    plan = granted(&config, (struct kv_wish){.policy = "keydiff", .budget_tokens = 64});
    assert_false(plan.while_reading); /* nor does admission count on it */
}

static void test_what_may_go_on_for_ever(void **state) {
    (void)state;
    struct config config = defaults();
    struct kv_plan plan = granted(&config, (struct kv_wish){.policy = "streaming_llm", .budget_tokens = 416});
    assert_true(compression_is_endless(&plan, 512));
    assert_false(compression_is_endless(&plan, 511)); /* 416 and 32 until the next point, and what rounding to blocks adds */
    plan = granted(&config, (struct kv_wish){.policy = "streaming_llm", .budget_tokens = INT32_MAX});
    assert_false(compression_is_endless(&plan, 8192));
    plan = granted(&config, (struct kv_wish){.policy = "streaming_llm", .keep_ratio = 0.1});
    assert_false(compression_is_endless(&plan, 8192));
    plan = granted(&config, (struct kv_wish){.policy = "keydiff", .budget_tokens = 64});
    assert_false(compression_is_endless(&plan, 8192));
    plan = granted(&config, (struct kv_wish){0});
    assert_false(compression_is_endless(&plan, 8192));
}

static void expect_points(struct kv_plan plan, uint32_t reading, bool prompt_end, uint32_t growing) {
    struct scheduler_points points = compression_points(&plan);
    assert_int_equal(points.reading, reading);
    assert_int_equal(points.prompt_end, prompt_end);
    assert_int_equal(points.growing, growing);
}

static void test_points(void **state) {
    (void)state;
    struct config config = defaults();
    expect_points(granted(&config, (struct kv_wish){.policy = "snapkv", .budget_tokens = 64}), 0, true, 32);
    expect_points(granted(&config, (struct kv_wish){.policy = "snapkv", .keep_ratio = 0.5}), 0, true, 0);
    expect_points(granted(&config, (struct kv_wish){.policy = "h2o", .keep_ratio = 0.5}), 0, true, 32);
    expect_points(granted(&config, (struct kv_wish){.policy = "none"}), 0, false, 0);
    config.compress_while_reading = true;
    expect_points(granted(&config, (struct kv_wish){.policy = "keydiff", .budget_tokens = 64}), COMPRESSION_READING, true, 32);
    expect_points(granted(&config, (struct kv_wish){.policy = "snapkv", .budget_tokens = 64}), 0, true, 32);
}

static void test_rows(void **state) {
    (void)state;
    struct config config = defaults();
    struct kv_plan plan = granted(&config, (struct kv_wish){.policy = "snapkv"});
    assert_int_equal(compression_first_row(&plan, 100), 68);
    assert_int_equal(compression_first_row(&plan, 10), 0);
    assert_int_equal(compression_window(&plan, 100, 100), 32);
    assert_int_equal(compression_window(&plan, 10, 10), 10);
    assert_int_equal(compression_window(&plan, 116, 100), 16);
    assert_int_equal(compression_window(&plan, 164, 100), 32);
    plan = granted(&config, (struct kv_wish){.policy = "h2o"});
    assert_int_equal(compression_first_row(&plan, 100), 0);
    plan = granted(&config, (struct kv_wish){.policy = "keydiff"});
    assert_int_equal(compression_first_row(&plan, 100), UINT32_MAX);
    strcpy(config.allowed_policies, "tova");
    assert_true(compression_may_use(&config, policy_find("tova")));
    assert_false(compression_may_use(&config, policy_find("h2o")));
    assert_false(compression_may_use(&config, policy_find("none")));
}

static void test_the_help_names_every_policy(void **state) {
    (void)state;
    const char *help = option_by_key("compression.policy")->help;
    if (!strstr(help, policy_names())) fail_msg("\"%s\" does not list %s", help, policy_names());
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_without_a_table_every_policy_may_be_asked_for),
        cmocka_unit_test(test_the_help_names_every_policy),
        cmocka_unit_test(test_budgets_of_none),
        cmocka_unit_test(test_operators_limits),
        cmocka_unit_test(test_settings_that_make_no_sense),
        cmocka_unit_test(test_triggers),
        cmocka_unit_test(test_what_may_go_on_for_ever),
        cmocka_unit_test(test_points),
        cmocka_unit_test(test_rows),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

/* See compression.h. Owns nothing. */
#include "engine/compression.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "config/options.h"

#define TRIGGERS_BY_INDEX (TRIGGER_PROMPT_END | TRIGGER_BUDGET) /* at token indices known beforehand */

/* Is `name` in a comma-separated list? */
static bool list_has(const char *list, const char *name) {
    size_t length = strlen(name);
    for (const char *at = list; *at;) {
        at += strspn(at, ", ");
        size_t word = strcspn(at, ", ");
        if (word == length && memcmp(at, name, word) == 0) return true;
        at += word;
    }
    return false;
}

static unsigned trigger_of(const char *word, size_t length) {
    for (unsigned bit = 0; bit < TRIGGER_KINDS; bit++) {
        const char *name = policy_trigger_name((enum policy_trigger)(1u << bit));
        if (strlen(name) == length && memcmp(name, word, length) == 0) return 1u << bit;
    }
    return 0;
}

/* Triggers named in the list; *unknown: the first word that is none. */
static unsigned list_triggers(const char *list, char *unknown, size_t size) {
    unsigned triggers = 0;
    unknown[0] = '\0';
    for (const char *at = list; *at;) {
        at += strspn(at, ", ");
        size_t word = strcspn(at, ", ");
        unsigned trigger = word ? trigger_of(at, word) : 0;
        if (word && !trigger && !unknown[0]) (void)snprintf(unknown, size, "%.*s", (int)word, at);
        triggers |= trigger;
        at += word;
    }
    return triggers;
}

static const char *triggers_text(unsigned triggers, char *text, size_t size) {
    size_t used = 0;
    text[0] = '\0';
    for (unsigned bit = 0; bit < TRIGGER_KINDS; bit++)
        if (triggers & 1u << bit)
            used += (size_t)snprintf(text + used, size - used, "%s%s", used ? ", " : "", policy_trigger_name((enum policy_trigger)(1u << bit)));
    return text;
}

/* ' (did you mean "snapkv"?)', or nothing. */
static const char *nearest_policy(const char *name, char *words, size_t size) {
    unsigned nearest = UINT32_MAX;
    words[0] = '\0';
    for (const struct policy *const *policy = policies; *policy; policy++) {
        unsigned distance = edit_distance(name, (*policy)->name);
        if (distance >= nearest || distance > 1 + strlen(name) / 3) continue;
        nearest = distance;
        (void)snprintf(words, size, " (did you mean \"%s\"?)", (*policy)->name);
    }
    return words;
}

static enum status check_allowed(const struct config *config, struct error *error) {
    for (const char *at = config->allowed_policies; *at;) {
        at += strspn(at, ", ");
        size_t word = strcspn(at, ", ");
        char name[64], words[64];
        (void)snprintf(name, sizeof name, "%.*s", (int)word, at);
        if (word && !policy_find(name))
            return error_set(error, STATUS_INVALID, "compression.allowed_policies: \"%s\" is none of %s%s", name, policy_names(),
                             nearest_policy(name, words, sizeof words));
        at += word;
    }
    return STATUS_OK;
}

static enum status check(const struct config *config, struct error *error) {
    const struct policy *policy = policy_find(config->compression_policy);
    char words[64], allowed[64];
    if (!policy)
        return error_set(error, STATUS_INVALID, "compression.policy: \"%s\" is none of %s%s", config->compression_policy, policy_names(),
                         nearest_policy(config->compression_policy, words, sizeof words));
    unsigned triggers = list_triggers(config->compression_triggers, words, sizeof words);
    if (words[0]) return error_set(error, STATUS_INVALID, "compression.triggers: \"%s\" is none of prompt_end, budget, pressure", words);
    if (policy->scorer != SCORER_NONE && triggers & ~policy->triggers)
        return error_set(error, STATUS_INVALID, "compression.triggers: %s makes no sense with policy %s, which has %s",
                         triggers_text(triggers & ~policy->triggers, words, sizeof words), policy->name,
                         triggers_text(policy->triggers, allowed, sizeof allowed));
    if (config->compress_while_reading && policy->scorer != SCORER_NONE && policy->rows != POLICY_ROWS_NONE)
        return error_set(error, STATUS_INVALID,
                         "compression.compress_while_reading: policy %s looks at later queries; random, streaming_llm and keydiff do not",
                         policy->name);
    if (config->compress_while_reading && triggers == TRIGGER_PRESSURE)
        return error_set(
            error, STATUS_INVALID,
            "compression.compress_while_reading: with compression.triggers = \"pressure\" alone nothing is compressed while it is read; add "
            "prompt_end or budget");
    uint32_t least = config->sink_tokens + config->recent_tokens;
    if (config->min_budget && config->min_budget < least)
        return error_set(error, STATUS_INVALID,
                         "compression.min_budget: %u is less than compression.sink_tokens + compression.recent_tokens, %u, which always stay",
                         config->min_budget, least);
    return check_allowed(config, error);
}

enum status compression_check(const struct config *config, struct error *error) {
    enum status status = check(config, error);
    if (status != STATUS_OK) config_locate(config, error);
    return status;
}

/* The operator's triggers where the policy has one of them, else its own: the end of the prompt where that makes sense, and the budget. */
static unsigned plan_triggers(const struct config *config, const struct policy *policy) {
    char unknown[16];
    unsigned triggers = list_triggers(config->compression_triggers, unknown, sizeof unknown) & policy->triggers;
    return triggers ? triggers : policy->triggers & ~(unsigned)TRIGGER_PRESSURE;
}

static bool choose_policy(const struct config *config, const struct kv_wish *wish, const struct policy **policy, const char **field,
                          struct error *error) {
    *field = "kv.policy";
    const struct policy *operators = policy_find(config->compression_policy);
    *policy = wish->policy[0] ? policy_find(wish->policy) : operators;
    if (!*policy) {
        char words[64];
        (void)error_set(error, STATUS_INVALID, "\"%s\" is no policy; there are %s%s", wish->policy, policy_names(),
                        nearest_policy(wish->policy, words, sizeof words));
        return false;
    }
    if (*policy == operators) return true;
    if ((*policy)->scorer == SCORER_NONE && !config->may_disable) {
        (void)error_set(error, STATUS_INVALID, "this server does not allow a request to disable compression (compression.may_disable)");
        return false;
    }
    if ((*policy)->scorer != SCORER_NONE && config->allowed_policies[0] && !list_has(config->allowed_policies, (*policy)->name)) {
        (void)error_set(error, STATUS_INVALID, "this server does not allow policy %s; allowed: %.200s", (*policy)->name, config->allowed_policies);
        return false;
    }
    return true;
}

/* Those that a request may name and that evict something: ": random, tova"; nothing if there is none. */
static const char *useful_policies(const struct config *config, char *text, size_t size) {
    size_t used = 0;
    text[0] = '\0';
    for (const struct policy *const *policy = policies; *policy; policy++)
        if (compression_may_use(config, *policy) && used < size)
            used += (size_t)snprintf(text + used, size - used, "%s%s", used ? ", " : ": ", (*policy)->name);
    return text;
}

/* A budget alone, where the server's policy is none: who asks for it expects that something is evicted. (With "none" by name it is the baseline beside other policies, and means nothing.) */
static void refuse_budget_alone(const struct config *config, const struct kv_wish *wish, const char **field, struct error *error) {
    char others[256];
    const char *list = useful_policies(config, others, sizeof others);
    *field = wish->budget_tokens ? "kv.budget_tokens" : "kv.keep_ratio";
    if (*list)
        (void)error_set(error, STATUS_INVALID, "this server compresses nothing by itself: name a policy (kv.policy)%s", list);
    else
        (void)error_set(error, STATUS_INVALID, "this server compresses nothing, and allows no request to ask for it");
}

static bool choose_target(const struct config *config, const struct kv_wish *wish, struct kv_plan *plan, const char **field, struct error *error) {
    if (wish->budget_tokens && wish->keep_ratio > 0) {
        *field = "kv.keep_ratio";
        (void)error_set(error, STATUS_INVALID, "budget_tokens and keep_ratio exclude each other");
        return false;
    }
    if (plan->policy->scorer == SCORER_NONE && !wish->policy[0] && (wish->budget_tokens || wish->keep_ratio > 0)) {
        refuse_budget_alone(config, wish, field, error);
        return false;
    }
    uint32_t least = config->sink_tokens + config->recent_tokens;
    uint32_t allowed = config->min_budget > least ? config->min_budget : least;
    if (wish->budget_tokens) {
        *field = "kv.budget_tokens";
        if (wish->budget_tokens < allowed) {
            (void)error_set(error, STATUS_INVALID, "%u is less than %u, %s", wish->budget_tokens, allowed,
                            allowed == least ? "the sinks and recent tokens that always stay" : "the least that this server allows");
            return false;
        }
        plan->target = (struct policy_target){.budget_tokens = wish->budget_tokens};
    } else if (wish->keep_ratio > 0) {
        *field = "kv.keep_ratio";
        if (!(wish->keep_ratio <= 1)) {
            (void)error_set(error, STATUS_INVALID, "%g is not above 0 and at most 1", wish->keep_ratio);
            return false;
        }
        plan->target = (struct policy_target){.keep_ratio = wish->keep_ratio};
    } else if (config->budget_tokens) {
        plan->target = (struct policy_target){.budget_tokens = config->budget_tokens};
    } else {
        /* FastGen finds its own length: without a budget that someone asked for there is no upper bound. */
        plan->target = (struct policy_target){.keep_ratio = plan->policy->budget == BUDGET_LADDER ? 1 : config->keep_ratio};
    }
    return true;
}

static enum pooling pooling_of(const char *name) {
    return strcmp(name, "max") == 0 ? POOLING_MAX : strcmp(name, "average") == 0 ? POOLING_AVERAGE : POOLING_NONE;
}

bool compression_plan(const struct config *config, const struct kv_wish *wish, struct kv_plan *plan, const char **field, struct error *error) {
    *plan = (struct kv_plan){.policy = policies[0], .interval = config->interval};
    if (!choose_policy(config, wish, &plan->policy, field, error)) return false;
    if (!choose_target(config, wish, plan, field, error)) return false;
    policy_options_default(&plan->options);
    plan->options.sink_tokens = config->sink_tokens;
    plan->options.recent_tokens = config->recent_tokens;
    plan->options.protect_tokens = wish->protect_tokens;
    plan->options.window = plan->policy->rows == POLICY_ROWS_LAST ? 1 : config->window;
    plan->options.pooling = pooling_of(config->pooling);
    plan->options.pooling_kernel = config->pooling_kernel;
    plan->options.floor = config->floor;
    plan->options.recovery = config->recovery;
    plan->options.value_aware = config->value_aware;
    plan->options.seed = config->seed;
    if (plan->policy->scorer == SCORER_NONE) return true;
    plan->triggers = plan_triggers(config, plan->policy);
    plan->while_reading = config->compress_while_reading && plan->policy->rows == POLICY_ROWS_NONE && plan->triggers & TRIGGERS_BY_INDEX;
    if (plan->target.budget_tokens && wish->protect_tokens + config->recent_tokens > plan->target.budget_tokens) {
        *field = "kv.protect_tokens";
        (void)error_set(error, STATUS_INVALID, "%u protected and %u recent tokens do not fit a budget of %u", wish->protect_tokens,
                        config->recent_tokens, plan->target.budget_tokens);
        return false;
    }
    return true;
}

uint32_t compression_tokens_max(const struct kv_plan *plan) {
    if (!compression_is_on(plan) || !plan->target.budget_tokens) return UINT32_MAX;
    if (!(plan->triggers & TRIGGERS_BY_INDEX)) return UINT32_MAX;
    uint64_t most = (uint64_t)plan->target.budget_tokens + plan->interval;
    return most > UINT32_MAX ? UINT32_MAX : (uint32_t)most;
}

/* Whole blocks leave: pinned tokens round up to a block, and what is over the budget by less than one stays. */
bool compression_is_endless(const struct kv_plan *plan, uint32_t max_model_len) {
    uint32_t most = compression_tokens_max(plan);
    return most != UINT32_MAX && plan->policy->shifts_sinks && (uint64_t)most + 2 * BLOCK_TOKENS <= max_model_len;
}

struct scheduler_points compression_points(const struct kv_plan *plan) {
    struct scheduler_points points = {0};
    if (!compression_is_on(plan) || !(plan->triggers & TRIGGERS_BY_INDEX)) return points;
    points.prompt_end = true;
    if (plan->while_reading) points.reading = COMPRESSION_READING;
    /* A policy of the prompt's end alone goes on with its own score once a budget is reached again; a ratio asks for nothing more. */
    if (plan->triggers & TRIGGER_BUDGET || plan->target.budget_tokens) points.growing = plan->interval;
    return points;
}

uint32_t compression_first_row(const struct kv_plan *plan, uint32_t n_prompt) {
    if (!compression_is_on(plan)) return UINT32_MAX;
    if (plan->policy->rows == POLICY_ROWS_ALL) return 0;
    if (plan->policy->rows == POLICY_ROWS_WINDOW) return n_prompt > plan->options.window ? n_prompt - plan->options.window : 0;
    return UINT32_MAX;
}

uint32_t compression_window(const struct kv_plan *plan, uint32_t n_computed, uint32_t n_prompt) {
    uint32_t rows = n_computed > n_prompt ? n_computed - n_prompt : n_computed;
    return rows < plan->options.window ? rows : plan->options.window;
}

bool compression_may_use(const struct config *config, const struct policy *policy) {
    if (policy->scorer == SCORER_NONE) return false;
    return policy == policy_find(config->compression_policy) || !config->allowed_policies[0] || list_has(config->allowed_policies, policy->name);
}

/* Rules between options, which no single row of the table can say. Pure. */
#include <arpa/inet.h>
#include <string.h>
#include <strings.h>

#include "base/json_writer.h"
#include "config/config.h"
#include "config/options.h"

/* Names other than localhost may resolve to anything: they count as public. */
static bool loopback(const char *host) {
    struct in_addr four;
    struct in6_addr six;
    char bare[CONFIG_TEXT];
    size_t length = strlen(host);
    bool bracketed = length > 2 && host[0] == '[' && host[length - 1] == ']';
    memset(bare, 0, sizeof bare);
    memcpy(bare, host + bracketed, length - 2 * (size_t)bracketed);
    if (strcasecmp(bare, "localhost") == 0) return true;
    if (inet_pton(AF_INET, bare, &four) == 1) return (ntohl(four.s_addr) >> 24) == 127;
    if (inet_pton(AF_INET6, bare, &six) == 1) {
        if (IN6_IS_ADDR_V4MAPPED(&six)) return six.s6_addr[12] == 127;
        return IN6_IS_ADDR_LOOPBACK(&six);
    }
    return false;
}

static enum status check(const struct config *config, struct error *error) {
    if (!utf8_valid(config->served_name, strlen(config->served_name)))
        return error_set(error, STATUS_INVALID, "served_name: not valid UTF-8: no client could ask for it");
    if (!config->host[0]) return error_set(error, STATUS_INVALID, "server.host: empty; 127.0.0.1 is this machine alone, 0.0.0.0 every network");
    if (!loopback(config->host) && !config->api_key_file[0] && !config->insecure_public)
        return error_set(error, STATUS_INVALID,
                         "server.host: %.200s is reachable from other machines and there are no API keys: set server.api_key_file, or "
                         "server.insecure_public = true "
                         "if a proxy asks for them",
                         config->host);
    if (config->first_byte_timeout_s > config->request_timeout_s)
        return error_set(error, STATUS_INVALID, "server.first_byte_timeout: %us is longer than server.request_timeout, %us",
                         config->first_byte_timeout_s, config->request_timeout_s);
    if (config->header_timeout_s > config->request_timeout_s)
        return error_set(error, STATUS_INVALID, "server.header_timeout: %us is longer than server.request_timeout, %us", config->header_timeout_s,
                         config->request_timeout_s);
    if (config->pooling_kernel % 2 == 0)
        return error_set(error, STATUS_INVALID, "compression.pooling_kernel: %u is even; a token stands in the middle of an odd number",
                         config->pooling_kernel);
    if (config->pressure_low >= config->pressure_high)
        return error_set(error, STATUS_INVALID, "compression.pressure_low: %g is not below compression.pressure_high, %g", config->pressure_low,
                         config->pressure_high);
    if (config->budget_tokens && config->budget_tokens < config->sink_tokens + config->recent_tokens)
        return error_set(error, STATUS_INVALID,
                         "compression.budget_tokens: %u is less than compression.sink_tokens + compression.recent_tokens, %u, which always stay",
                         config->budget_tokens, config->sink_tokens + config->recent_tokens);
    return STATUS_OK;
}

/* Where the text names the key, and no longer one that begins so; NULL: nowhere. A key without a section is a word of the language too: it is named where the text begins. */
static const char *named(const char *text, const char *key) {
    size_t length = strlen(key);
    if (!strchr(key, '.')) return strncmp(text, key, length) == 0 && text[length] == ':' ? text : NULL;
    for (const char *at = text; (at = strstr(at, key)); at += length)
        if (!strchr("abcdefghijklmnopqrstuvwxyz_", at[length]) || at[length] == '\0') return at;
    return NULL;
}

void config_locate(const struct config *config, struct error *error) {
    const char *first = NULL;
    uint32_t line = 0;
    if (!error || !config->config_file[0] || strncmp(error->text, config->config_file, strlen(config->config_file)) == 0) return;
    for (size_t i = 0; i < options_count(); i++) {
        const char *at = config->source[i] == CONFIG_SOURCE_FILE ? named(error->text, options[i].key) : NULL;
        if (at && (!first || at < first)) first = at, line = config->line[i];
    }
    if (first) (void)error_prefix(error, "%.200s:%u", config->config_file, line);
}

void config_locate_value(const struct config *config, const char *key, struct error *error) {
    const struct option_info *option = option_by_key(key);
    char name[64];
    (void)snprintf(name, sizeof name, "%s", key);
    if (config->source[option - options] == CONFIG_SOURCE_ENVIRONMENT) option_environment_name(option, name, sizeof name);
    if (config->source[option - options] == CONFIG_SOURCE_FLAG) option_flag_name(option, name, sizeof name);
    (void)error_prefix(error, "%s", name);
    config_locate(config, error);
}

enum status config_check(const struct config *config, struct error *error) {
    enum status status = check(config, error);
    if (status != STATUS_OK) config_locate(config, error);
    return status;
}

/* The small endpoints: /health, /version, /v1/models, /tokenize, /detokenize, /metrics. Loop thread, but for the tokenizing of long texts. */
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "base/clock.h"
#include "server/internal.h"

void utility_health(struct server *server, struct exchange *exchange) {
    struct api_error error = {0};
    struct buffer body = {0};
    if (server_takes_requests(server, &error) && !engine_alive(server->model.engine, clock_now_ns(), ENGINE_STALL_NS))
        api_error_set(&error, 503, "server_error", "engine_stalled", NULL, "The engine makes no progress.");
    if (error.status) {
        reply_error(exchange, &error);
        return;
    }
    buffer_append_text(&body, "{\"status\":\"ok\"}");
    reply_json(exchange, 200, &body);
}

void utility_version(struct server *server, struct exchange *exchange) {
    struct buffer body = {0};
    (void)server;
    buffer_append_text(&body, "{\"version\":\"" KVASIR_VERSION "\"}");
    reply_json(exchange, 200, &body);
}

/* ---- models ---- */

static void write_model(struct json_writer *json, const struct server *server) {
    json_object(json);
    json_key(json, "id");
    json_text(json, server->model.served_name);
    json_key(json, "object");
    json_text(json, "model");
    json_key(json, "created");
    json_integer(json, server->started_at);
    json_key(json, "owned_by");
    json_text(json, "kvasir");
    json_key(json, "root");
    json_text(json, server->model.root);
    json_key(json, "parent");
    json_null(json);
    json_key(json, "max_model_len");
    json_unsigned(json, engine_limits(server->model.engine)->max_model_len);
    json_key(json, "permission");
    json_array(json);
    json_object(json);
    json_key(json, "id");
    json_text(json, "modelperm-kvasir");
    json_key(json, "object");
    json_text(json, "model_permission");
    json_key(json, "created");
    json_integer(json, server->started_at);
    json_key(json, "allow_create_engine");
    json_bool(json, false);
    json_key(json, "allow_sampling");
    json_bool(json, true);
    json_key(json, "allow_logprobs");
    json_bool(json, true);
    json_key(json, "allow_search_indices");
    json_bool(json, false);
    json_key(json, "allow_view");
    json_bool(json, true);
    json_key(json, "allow_fine_tuning");
    json_bool(json, false);
    json_key(json, "organization");
    json_text(json, "*");
    json_key(json, "group");
    json_null(json);
    json_key(json, "is_blocking");
    json_bool(json, false);
    json_object_end(json);
    json_array_end(json);
    json_object_end(json);
}

void utility_models(struct server *server, struct exchange *exchange) {
    struct buffer body = {0};
    struct json_writer json;
    json_begin(&json, &body);
    json_object(&json);
    json_key(&json, "object");
    json_text(&json, "list");
    json_key(&json, "data");
    json_array(&json);
    write_model(&json, server);
    json_array_end(&json);
    json_object_end(&json);
    reply_json(exchange, 200, &body);
}

void utility_model(struct server *server, struct exchange *exchange) {
    const char *asked = exchange_path(exchange) + strlen("/v1/models/");
    struct buffer body = {0};
    struct json_writer json;
    if (strcmp(asked, server->model.served_name) != 0) {
        struct api_error error;
        api_error_set(&error, 404, "invalid_request_error", "model_not_found", "model", "The model '%.80s' does not exist; this server has '%s'.",
                      asked, server->model.served_name);
        reply_error(exchange, &error);
        return;
    }
    json_begin(&json, &body);
    write_model(&json, server);
    reply_json(exchange, 200, &body);
}

/* ---- tokenize ---- */

struct tokenize_work {
    uv_work_t work;
    struct server *server;
    struct exchange *exchange; /* NULL: gone */
    struct completion_limits limits;
    struct tokenize_request request;
    struct api_error error;
    struct buffer body, answer;
    bool back; /* detokenize */
};

static void write_tokens(struct tokenize_work *work, const struct token_list *tokens) {
    struct json_writer json;
    json_begin(&json, &work->answer);
    json_object(&json);
    json_key(&json, "count");
    json_unsigned(&json, tokens->count);
    json_key(&json, "max_model_len");
    json_unsigned(&json, work->limits.max_model_len);
    json_key(&json, "tokens");
    json_array(&json);
    for (size_t i = 0; i < tokens->count; i++) json_integer(&json, tokens->tokens[i]);
    json_array_end(&json);
    json_key(&json, "token_strs");
    if (work->request.pieces) {
        json_array(&json);
        for (size_t i = 0; i < tokens->count; i++) {
            size_t length;
            const char *bytes = tokenizer_bytes(work->limits.tokenizer, tokens->tokens[i], &length);
            json_string(&json, bytes, length);
        }
        json_array_end(&json);
    } else {
        json_null(&json);
    }
    json_object_end(&json);
}

static void write_text(struct tokenize_work *work) {
    struct detokenizer detokenizer = {0};
    struct buffer text = {0};
    struct json_writer json;
    for (size_t i = 0; i < work->request.tokens.count; i++)
        detokenizer_put(&detokenizer, work->limits.tokenizer, work->request.tokens.tokens[i], false, &text);
    detokenizer_finish(&detokenizer, &text);
    json_begin(&json, &work->answer);
    json_object(&json);
    json_key(&json, "prompt");
    json_string(&json, text.bytes, text.length);
    json_key(&json, "content");
    json_string(&json, text.bytes, text.length);
    json_object_end(&json);
    buffer_done(&text);
}

static void run(struct tokenize_work *work) {
    const char *body = work->body.bytes ? work->body.bytes : "";
    if (work->back) {
        if (detokenize_parse(&work->request, body, work->body.length, &work->limits, &work->error)) write_text(work);
        return;
    }
    struct token_list tokens = {0};
    struct error why;
    if (!tokenize_parse(&work->request, body, work->body.length, &work->limits, &work->error)) return;
    if (tokenizer_encode(work->limits.tokenizer, work->request.text.bytes ? work->request.text.bytes : "", work->request.text.length,
                         work->request.add_special, work->request.parse_special, 0, &tokens, &why) == STATUS_OK)
        write_tokens(work, &tokens);
    else
        api_error_set(&work->error, 400, "invalid_request_error", NULL, "prompt", "The text cannot be tokenized: %s.", why.text);
    token_list_done(&tokens);
}

static void run_work(uv_work_t *work) { run(work->data); }

static void release(struct tokenize_work *work) {
    tokenize_request_done(&work->request);
    buffer_done(&work->body);
    buffer_done(&work->answer);
    free(work);
}

static void answer(struct tokenize_work *work) {
    if (work->error.status)
        reply_error(work->exchange, &work->error);
    else
        reply_json(work->exchange, 200, &work->answer);
}

static void run_done(uv_work_t *uv, int status) {
    struct tokenize_work *work = uv->data;
    struct server *server = work->server;
    (void)status;
    if (!work->exchange) {
        release(work);
        return;
    }
    work->work.data = NULL; /* from here on `complete` or `gone` releases it */
    answer(work);
    http_pump(server->http);
}

static void on_gone(void *owner) {
    struct tokenize_work *work = owner;
    work->exchange = NULL;
    if (!work->work.data) release(work);
}

static const struct exchange_owner owner_functions = {.gone = on_gone, .complete = on_gone};

static void start(struct server *server, struct exchange *exchange, bool back) {
    struct tokenize_work *work = check_calloc(1, sizeof *work);
    work->server = server;
    work->exchange = exchange;
    work->limits = server_limits(server);
    work->back = back;
    work->body = *exchange_body(exchange);
    *exchange_body(exchange) = (struct buffer){0};
    if (work->body.length < WORKER_BYTES) {
        run(work);
        answer(work);
        release(work);
        return;
    }
    exchange_own(exchange, &owner_functions, work);
    work->work.data = work;
    CHECK(uv_queue_work(&server->loop, &work->work, run_work, run_done) == 0);
}

void utility_tokenize(struct server *server, struct exchange *exchange) { start(server, exchange, false); }
void utility_detokenize(struct server *server, struct exchange *exchange) { start(server, exchange, true); }

/* ---- metrics ---- */

void utility_metrics(struct server *server, struct exchange *exchange) {
    struct buffer body = {0};
    bool loaded = server->model.engine != NULL;
    struct metrics_view view = {
        .model_name = loaded ? server->model.served_name : server->config.served_name,
        .version = KVASIR_VERSION,
        .backend = loaded ? engine_describe(server->model.engine) : server->config.backend,
        .architecture = server->model.architecture,
        .kv_dtype = loaded ? kv_dtype_name(engine_limits(server->model.engine)->kv_dtype) : server->config.kv_dtype,
        .route_names = route_names,
        .n_routes = route_count(),
        .ready = server->phase == SERVER_SERVING,
        .vllm_names = server->config.vllm_names,
        .prefix_cache = server->config.prefix_cache,
        .connections = http_connections(server->http),
        .block_tokens = BLOCK_TOKENS,
        .parameters = server->model.parameters,
        .start_time = server->start_time,
    };
    if (loaded) engine_stats(server->model.engine, &view.engine);
    /* The engine counts a choice until it has let go of its blocks; for the client it is over with the last byte of its answer. */
    view.running = view.engine.running < server->n_live ? view.engine.running : server->n_live;
    uint32_t rest = server->n_live - view.running;
    view.waiting = rest; /* submitted, and not running: in the inbox or in the queue */
    metrics_page(&body, &server->metrics, &view);
    exchange_reply(exchange, 200, "text/plain; version=0.0.4; charset=utf-8", &body);
}

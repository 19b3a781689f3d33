#!/usr/bin/env python3
"""Prints deploy/grafana/kvasir.json: a dashboard over the kvasir_* metrics. A panel is one line here; Grafana wants forty."""
import json

SECONDS, PERCENT, TOKENS, BYTES, SHORT = "s", "percentunit", "short", "bytes", "short"


def quantiles(name):
    rate = f"sum by (le) (rate(kvasir_{name}_bucket{{instance=~\"$instance\"}}[$__rate_interval]))"
    return [(f"histogram_quantile({q}, {rate})", f"p{int(q * 100)}") for q in (0.5, 0.95, 0.99)]


def rate(name, by=None, extra=""):
    grouping = f" by ({by})" if by else ""
    return f"sum{grouping} (rate(kvasir_{name}{{instance=~\"$instance\"{extra}}}[$__rate_interval]))"


def gauge(name, extra=""):
    return f"sum (kvasir_{name}{{instance=~\"$instance\"{extra}}})"


PANELS = [
    ("Requests", SHORT, [(gauge("requests_running"), "running"), (gauge("requests_waiting"), "waiting")]),
    ("Tokens a second", TOKENS, [(rate("prompt_tokens_total"), "prompt"), (rate("generation_tokens_total"), "generation")]),
    ("Answers a second", SHORT, [(rate("requests_total", by="code"), "{{code}}")]),
    ("Time to first token", SECONDS, quantiles("time_to_first_token_seconds")),
    ("Time between tokens", SECONDS, quantiles("inter_token_latency_seconds")),
    ("Whole requests", SECONDS, quantiles("e2e_request_latency_seconds")),
    ("Time in the queue", SECONDS, quantiles("request_queue_time_seconds")),
    ("KV cache in use", PERCENT, [(f"avg (kvasir_kv_cache_usage_ratio{{instance=~\"$instance\"}})", "used")]),
    ("KV blocks", SHORT, [(gauge("kv_cache_blocks", f",state=\"{state}\""), state) for state in ("used", "cached", "total")]),
    ("Prefix cache", PERCENT, [(f"{rate('prefix_cache_hits_total')} / {rate('prefix_cache_queries_total')}", "tokens found")]),
    ("Preemptions, aborts, refusals a second", SHORT,
     [(rate("preemptions_total"), "preempted"), (rate("requests_aborted_total"), "aborted"), (rate("requests_rejected_total", by="reason"), "refused: {{reason}}")]),
    ("Engine", PERCENT, [(rate("step_busy_seconds_total"), "in steps"), (rate("schedule_seconds_total"), "planning")]),
    ("Resident memory", BYTES, [("sum (process_resident_memory_bytes{job=\"kvasir\", instance=~\"$instance\"})", "resident")]),
]


def panel(index, title, unit, queries):
    return {
        "id": index + 1, "type": "timeseries", "title": title,
        "gridPos": {"x": index % 3 * 8, "y": index // 3 * 8, "w": 8, "h": 8},
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "fieldConfig": {"defaults": {"unit": unit, "min": 0, "custom": {"fillOpacity": 10, "showPoints": "never"}}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [{"refId": chr(65 + i), "expr": expression, "legendFormat": legend} for i, (expression, legend) in enumerate(queries)],
    }


def variable(name, label, kind, query, **more):
    return {"name": name, "label": label, "type": kind, "query": query, "current": {}, "hide": 0, **more}


dashboard = {
    "uid": "kvasir", "title": "kvasir", "tags": ["kvasir", "llm"], "schemaVersion": 39, "version": 1, "editable": True, "refresh": "10s",
    "time": {"from": "now-30m", "to": "now"}, "timezone": "browser", "annotations": {"list": []},
    "templating": {"list": [
        variable("datasource", "Data source", "datasource", "prometheus"),
        variable("instance", "Instance", "query", "label_values(kvasir_ready, instance)", multi=True, includeAll=True, refresh=2,
                 datasource={"type": "prometheus", "uid": "${datasource}"}),
    ]},
    "panels": [panel(i, *row) for i, row in enumerate(PANELS)],
}
print(json.dumps(dashboard, indent=1))

"""/metrics: the format promtool accepts, the names dashboards need, and numbers that add up."""
import os
import shutil
import subprocess
import unittest

import harness

FAMILIES = {
    "requests_running": "gauge", "requests_waiting": "gauge", "kv_cache_usage_ratio": "gauge", "kv_cache_blocks": "gauge", "cache_config_info": "gauge",
    "prompt_tokens_total": "counter", "generation_tokens_total": "counter", "prefix_cache_queries_total": "counter", "prefix_cache_hits_total": "counter",
    "preemptions_total": "counter", "requests_total": "counter", "request_success_total": "counter", "build_info": "gauge",
    "time_to_first_token_seconds": "histogram", "inter_token_latency_seconds": "histogram", "e2e_request_latency_seconds": "histogram",
    "request_queue_time_seconds": "histogram", "request_prefill_time_seconds": "histogram", "request_decode_time_seconds": "histogram",
    "request_prompt_tokens": "histogram", "request_generation_tokens": "histogram", "iteration_tokens": "histogram",
}
# What the dashboards and autoscalers made for vLLM ask for.
VLLM = {
    "e2e_request_latency_seconds": "histogram", "prompt_tokens_total": "counter", "generation_tokens_total": "counter", "inter_token_latency_seconds": "histogram",
    "num_requests_running": "gauge", "num_requests_waiting": "gauge", "kv_cache_usage_perc": "gauge", "time_to_first_token_seconds": "histogram",
    "request_success_total": "counter", "request_prompt_tokens": "histogram", "request_generation_tokens": "histogram",
    "request_queue_time_seconds": "histogram", "request_prefill_time_seconds": "histogram", "request_decode_time_seconds": "histogram",
    "request_max_num_generation_tokens": "histogram", "iteration_tokens_total": "histogram", "cache_config_info": "gauge", "num_preemptions_total": "counter",
    "prefix_cache_queries_total": "counter", "prefix_cache_hits_total": "counter",
}
TTFT_BUCKETS = [.001, .005, .01, .02, .04, .06, .08, .1, .25, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560, float("inf")]


def promtool(page):
    program = os.environ.get("KVASIR_PROMTOOL") or shutil.which("promtool")
    if not program:
        raise AssertionError("promtool (Debian package prometheus) is not on the PATH: install it, or set KVASIR_PROMTOOL")
    result = subprocess.run([program, "check", "metrics"], input=page, capture_output=True, timeout=harness.DEADLINE)
    return result.returncode, (result.stdout + result.stderr).decode()


def types(page):
    return dict(line.split()[2:4] for line in page.splitlines() if line.startswith("# TYPE "))


def buckets(page, family):
    """[(upper bound, count)] of a histogram, over all labels but le, plus its sum and count."""
    found, total, count = {}, 0, 0
    for series, value in page.items():
        name, _, labels = series.partition("{")
        if name == family + "_bucket":
            bound = float(labels.split('le="')[1].split('"')[0].replace("+Inf", "inf"))
            found[bound] = found.get(bound, 0) + value
        elif name == family + "_sum":
            total += value
        elif name == family + "_count":
            count += value
    return sorted(found.items()), total, count


def some_load(daemon):
    """Six requests: ended by length, by a stop string, refused, streamed, of many choices. Returns (prompt tokens, generated tokens, successes) as usage said."""
    answers = [
        daemon.complete(max_tokens=20), daemon.complete(max_tokens=5, n=3), daemon.complete(prompt=["one", "two"], max_tokens=4),
        daemon.complete(max_tokens=8, logit_bias={"120": 100}, stop="xx"),
    ]
    usage = [answer.json()["usage"] for answer in answers]
    with daemon.stream(max_tokens=6, stream_options={"include_usage": True}) as connection:
        usage.append(harness.events(connection.read_response().body)[-1]["usage"])
    assert daemon.complete(n=0).status == 400
    return sum(u["prompt_tokens"] for u in usage), sum(u["completion_tokens"] for u in usage), 1 + 3 + 2 + 1 + 1


class Metrics(harness.DaemonCase):
    def page(self):
        response = self.daemon.get("/metrics")
        self.assertEqual(response.status, 200)
        self.assertEqual(response.header("Content-Type"), "text/plain; version=0.0.4; charset=utf-8")
        return response.body

    def test_promtool(self):
        for load in (lambda: None, lambda: some_load(self.daemon)):
            load()
            code, words = promtool(self.page())
            self.assertEqual(code, 0, words)
            self.assertEqual(words.strip(), "")

    def test_families(self):
        self.daemon.complete(max_tokens=3)
        found = types(self.page().decode())
        for name, kind in FAMILIES.items():
            self.assertEqual(found.get("kvasir_" + name), kind, name)
        self.assertFalse([name for name in found if name.startswith("vllm:")])

    def test_counters_never_fall_and_count_what_usage_says(self):
        def counters():
            text = self.page().decode()
            page, kinds = harness.parse_metrics(text), types(text)
            family = lambda series: series.partition("{")[0]
            histogram = lambda name: any(name == f"{f}_{part}" for f, kind in kinds.items() if kind == "histogram" for part in ("bucket", "sum", "count"))
            return {k: v for k, v in page.items() if kinds.get(family(k)) == "counter" or histogram(family(k))}

        total = lambda page, name, part="": sum(v for k, v in page.items() if k.partition("{")[0] == "kvasir_" + name and part in k)
        before = counters()
        prompt = generated = success = 0
        last = before
        for _ in range(harness.rounds(5, 2)):
            more = some_load(self.daemon)
            prompt, generated, success = prompt + more[0], generated + more[1], success + more[2]
            now = counters()
            for name, value in last.items():
                self.assertGreaterEqual(now[name], value, name)
            last = now
        self.assertEqual(total(last, "generation_tokens_total") - total(before, "generation_tokens_total"), generated)
        self.assertEqual(total(last, "prompt_tokens_total") - total(before, "prompt_tokens_total"), prompt)
        self.assertEqual(total(last, "requests_total", 'code="400"') - total(before, "requests_total", 'code="400"'), harness.rounds(5, 2))
        self.assertEqual(total(last, "request_success_total") - total(before, "request_success_total"), success)

    def test_histograms_add_up(self):
        some_load(self.daemon)
        text = self.page().decode()
        page = harness.parse_metrics(text)
        for name, kind in types(text).items():
            if kind != "histogram":
                continue
            found, total, count = buckets(page, name)
            self.assertEqual(found[-1][0], float("inf"), name)
            self.assertEqual([c for _, c in found], sorted(c for _, c in found), name)
            self.assertEqual(found[-1][1], count, name)
            # The sum lies between what the buckets allow.
            lower = sum((c - p) * b for (b, _), (_, p), (_, c) in zip([(0, 0)] + found, [(0, 0)] + found, found))
            self.assertGreaterEqual(total, lower * (1 - 1e-9), name)
            if found[-2][1] == count:
                upper = sum((c - p) * b for (b, c), (_, p) in zip(found[:-1], [(0, 0)] + found))
                self.assertLessEqual(total, upper * (1 + 1e-9), name)
        self.assertEqual([b for b, _ in buckets(page, "kvasir_time_to_first_token_seconds")[0]], TTFT_BUCKETS)
        self.assertGreater(buckets(page, "kvasir_time_to_first_token_seconds")[2], 0)
        self.assertGreater(buckets(page, "kvasir_inter_token_latency_seconds")[2], 0)

    def test_cache_numbers(self):
        self.daemon.complete(prompt="a prompt long enough to fill a block or two of the cache, which holds 32 tokens each", max_tokens=2)
        page = self.daemon.metrics()
        blocks = {state: value for key, value in page.items() if key.startswith("kvasir_kv_cache_blocks{")
                  for state in ("total", "used", "cached") if f'state="{state}"' in key}
        self.assertEqual(set(blocks), {"total", "used", "cached"})
        self.assertGreater(blocks["total"], 0)
        self.assertLessEqual(blocks["used"] + blocks["cached"], blocks["total"])
        self.assertGreater(blocks["cached"], 0)
        info = next(key for key in page if key.startswith("kvasir_cache_config_info{"))
        label = lambda name: int(info.split(f'{name}="')[1].split('"')[0])
        self.assertEqual((label("block_size"), label("num_gpu_blocks"), page[info]), (32, blocks["total"], 1))
        usage = next(value for key, value in page.items() if key.startswith("kvasir_kv_cache_usage_ratio"))
        self.assertEqual(usage, 0)

    def test_head_and_wrong_method(self):
        self.assertEqual(self.daemon.request("HEAD", "/metrics").status, 200)
        self.assertError(self.daemon.post("/metrics", {}), 405)


class VllmNames(harness.DaemonCase):
    flags = (*harness.MOCK, "--vllm-names")

    def test_names(self):
        some_load(self.daemon)
        text = self.daemon.get("/metrics").body.decode()
        found, page = types(text), harness.parse_metrics(text)
        for name, kind in VLLM.items():
            self.assertEqual(found.get("vllm:" + name), kind, name)
        for name, kind in FAMILIES.items():
            self.assertEqual(found.get("kvasir_" + name), kind, name)
        for series in page:
            if series.startswith("vllm:"):
                self.assertIn(f'model_name="{self.daemon.model}"', series)
        total = lambda name: sum(v for k, v in page.items() if k.partition("{")[0] == name)
        for ours, theirs in (("kvasir_generation_tokens_total", "vllm:generation_tokens_total"), ("kvasir_prompt_tokens_total", "vllm:prompt_tokens_total"),
                             ("kvasir_e2e_request_latency_seconds_count", "vllm:e2e_request_latency_seconds_count")):
            self.assertEqual(total(ours), total(theirs))
            self.assertGreater(total(theirs), 0)

    def test_promtool_minds_nothing_else(self):
        some_load(self.daemon)
        code, words = promtool(self.daemon.get("/metrics").body)
        self.assertEqual(code, 3)
        for line in words.splitlines():
            # vLLM's names are as they are: a colon, and a histogram called _total.
            self.assertRegex(line, r"^vllm:(\S+ metric names should not contain ':'|iteration_tokens_total non-counter metrics should not have \"_total\" suffix)$")


if __name__ == "__main__":
    unittest.main(verbosity=2)

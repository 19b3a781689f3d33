"""An existing load client beside tests/bench/load, so that nobody need take our own one's word: prompts of random tokens, streamed answers that go on after an end token.

    pip install locust
    kvasir serve MODEL --port 8080 --max-sequences 32 &
    locust -f tests/bench/locustfile.py --headless -u 32 -r 1000 -t 30s --host http://127.0.0.1:8080

-u: streams at a time. At the end the output tokens a second between the first request and the last whole answer. Python takes a good part of a core here, which the server then has not:
the figure is a lower bound of what the server does.
PROMPT and TOKENS (128 each), IDS (1000): environment variables."""
import json
import os
import random
import time

from locust import HttpUser, events, task

PROMPT, TOKENS, IDS = (int(os.environ.get(name, default)) for name, default in (("PROMPT", 128), ("TOKENS", 128), ("IDS", 1000)))
totals = {"begin": None, "end": 0.0, "tokens": 0, "answers": 0}


class Streams(HttpUser):
    def on_start(self):
        self.model = self.client.get("/v1/models").json()["data"][0]["id"]

    @task
    def stream(self):
        body = {"model": self.model, "prompt": [random.randrange(IDS) for _ in range(PROMPT)], "max_tokens": TOKENS, "ignore_eos": True, "temperature": 0, "stream": True,
                "stream_options": {"include_usage": True}}
        begin = time.perf_counter()
        totals["begin"] = totals["begin"] or begin
        with self.client.post("/v1/completions", json=body, stream=True, catch_response=True) as response:
            lines = [line for line in response.iter_lines() if line.startswith(b"data: {")]
            usage = json.loads(lines[-1][len(b"data: "):]).get("usage") if lines else None
            if not usage or usage["completion_tokens"] != TOKENS:
                response.failure(f"no whole answer: {lines[-1:]}")
                return
            totals["tokens"] += usage["completion_tokens"]
            totals["answers"] += 1
            totals["end"] = time.perf_counter()


@events.quitting.add_listener
def report(environment, **_):
    if totals["answers"]:
        print(f"{totals['answers']} answers, {totals['tokens'] / (totals['end'] - totals['begin']):.0f} output tokens/s")

#!/usr/bin/env bash
# The rules and the dashboard name only metrics that the daemon has, and are what Prometheus and Grafana read.
set -euo pipefail
cd "$KVASIR_SOURCE/deploy"
python3 grafana/make_dashboard.py | cmp - grafana/kvasir.json || { echo "grafana/kvasir.json is not what make_dashboard.py prints"; exit 1; }
promtool=${KVASIR_PROMTOOL:-$(command -v promtool || echo "$KVASIR_SOURCE/build/tools/promtool")}
"$promtool" check config prometheus/prometheus.yml

exec {daemon}< <(exec "$KVASIR_PROGRAM" serve --backend mock --port 0 </dev/null)
pid=$!
trap 'kill "$pid" 2>/dev/null || true' EXIT
url=
while IFS= read -r -t 120 -u "$daemon" line; do
  case $line in
    "listening on "*) url=${line#listening on } ;;
    ready*) break ;;
  esac
done
page=$(mktemp)
python3 - "$url" "$page" <<'PYTHON'
import json, sys, urllib.request
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
body = json.dumps({"model": json.load(opener.open(sys.argv[1] + "/v1/models"))["data"][0]["id"], "prompt": "a", "max_tokens": 2}).encode()
opener.open(urllib.request.Request(sys.argv[1] + "/v1/completions", body, {"Content-Type": "application/json"})).read()
open(sys.argv[2], "wb").write(opener.open(sys.argv[1] + "/metrics").read())
PYTHON
kill -TERM "$pid"
wait "$pid"
trap - EXIT
missing=0
for name in $(grep -ohE '\b(kvasir|process)_[a-z0-9_]+' prometheus/alerts.yml grafana/kvasir.json | sort -u); do
  # A histogram is used through its buckets; "kvasir_" alone and the label are no metrics.
  grep -qE "^$name(\{| )" "$page" || { echo "no such metric: $name"; missing=1; }
done
rm -f "$page"
exit $missing

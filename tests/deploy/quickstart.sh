#!/usr/bin/env bash
# deploy/quickstart --check answers with the real model; the second time it installs, builds and fetches nothing.
set -euo pipefail
cd "$KVASIR_SOURCE"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
unset KVASIR_PROGRAM KVASIR_BUILD KVASIR_SOURCE # tests' own names, which the daemon would remark on
for round in first second; do
  deploy/quickstart --check </dev/null >"$scratch/$round" 2>&1 || { cat "$scratch/$round"; exit 1; }
  grep -q 'The capital of France is|.*Paris' "$scratch/$round" || { echo "$round run: no answer"; cat "$scratch/$round"; exit 1; }
  grep -q 'KV' "$scratch/$round" || { echo "$round run: no memory plan"; exit 1; }
done
if grep -nE 'installing Debian|configuring|Building|Linking|fetching' "$scratch/second"; then
  echo "the second run did things again"
  exit 1
fi
# What the server and the README say to try can be tried where there was git alone.
# (Read to its end, then searched: a grep -q that leaves early ends who writes into it, and with pipefail the test.)
packages=$(deploy/install-packages build --list)
grep -qx curl <<<"$packages" || { echo "curl is not installed"; exit 1; }
# Another model, and one that is none: said in one line, exit code not 0.
if KVASIR_MODEL=/nowhere.gguf deploy/quickstart --check </dev/null >"$scratch/third" 2>&1; then
  echo "a model that is not there was served"
  exit 1
fi
grep -q '/nowhere.gguf' "$scratch/third"
grep -q '^quickstart: the server did not become ready (exit code 2)$' "$scratch/third" || { cat "$scratch/third"; exit 1; }

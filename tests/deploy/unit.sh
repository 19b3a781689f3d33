#!/usr/bin/env bash
# The unit is what systemd understands, without a word of complaint, and as closed as it is meant to be (exposure below 2.0).
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
# verify wants the program to be there: the one just built stands in for the installed one.
sed "s#^ExecStart=/usr/bin/kvasir#ExecStart=$KVASIR_PROGRAM#" "$KVASIR_SOURCE/deploy/kvasir.service" >"$scratch/kvasir.service"
grep -q "^ExecStart=$KVASIR_PROGRAM serve" "$scratch/kvasir.service"
words=$(systemd-analyze verify --man=no "$scratch/kvasir.service" 2>&1) || { echo "$words"; exit 1; }
[ -z "$words" ] || { echo "verify: $words"; exit 1; }
systemd-analyze security --offline=true --threshold=20 --no-pager "$scratch/kvasir.service" | tail -1
# The promises of the program that the unit relies on.
grep -qx 'Type=notify' "$scratch/kvasir.service"
grep -qx 'RestartPreventExitStatus=2' "$scratch/kvasir.service"
# Draining must end before systemd's patience does.
seconds() { case $1 in *min) echo $((${1%min} * 60)) ;; *m) echo $((${1%m} * 60)) ;; *s) echo "${1%s}" ;; *) echo "bad duration $1" >&2; exit 1 ;; esac; }
drain=$("$KVASIR_PROGRAM" check-config | sed -n 's/^server.drain_timeout = "\(.*\)" # default$/\1/p')
stop=$(sed -n 's/^TimeoutStopSec=//p' "$scratch/kvasir.service")
[ "$(seconds "$drain")" -lt "$(seconds "$stop")" ] || { echo "drain_timeout $drain, TimeoutStopSec $stop"; exit 1; }

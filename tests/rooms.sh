#!/usr/bin/env bash
# The dependency arrows of the design, checked on every include: a room may include itself and the rooms named here.
set -u
cd "$(dirname "$0")/.." || exit 1
declare -A may=(
  [base]="" [config]="base" [kernels]="base" [blockmgr]="base" [policies]="kernels base" [model]="kernels base"
  [scheduler]="blockmgr base" [engine]="scheduler policies model blockmgr kernels config base"
  [server]="engine model config base" [cli]="server engine model kernels policies config base"
)
rooms="${!may[*]}"
failed=0
fail() { echo "rooms: $1" >&2; failed=1; }
for room in $rooms; do
  [ -d "$room" ] || continue
  while IFS=: read -r file line text; do
    target=$(sed -E 's/.*"([^"]+)".*/\1/' <<<"$text")
    to=${target%%/*}
    [ "$to" = "$target" ] && { fail "$file:$line: include \"$target\" from the root, as \"room/file.h\""; continue; }
    [ "$to" = "$room" ] && continue
    case " ${may[$room]} " in *" $to "*) ;; *) fail "$file:$line: $room must not include $to ($target)";; esac
  done < <(grep -rnE '^[[:space:]]*#[[:space:]]*include[[:space:]]*"' "$room" --include='*.[ch]' --include='*.cpp' --include='*.hpp' --include='*.cu' --include='*.cuh')
done
# server sees the engine only through engine.h, the model only through tokenizer.h (and the chat template).
while IFS=: read -r file line text; do fail "$file:$line: server may include engine/engine.h only"; done \
  < <(grep -rnE '#include "engine/' server 2>/dev/null | grep -v '"engine/engine.h"')
while IFS=: read -r file line text; do fail "$file:$line: server may include model/tokenizer.h only"; done \
  < <(grep -rnE '#include "model/' server 2>/dev/null | grep -vE '"model/(tokenizer|chat_template).h"')
# A third party lives in one room only.
third() { # header pattern, room
  while IFS=: read -r file line text; do case "$file" in "$2"/*) ;; *) fail "$file:$line: <$1> belongs to $2/ only";; esac; done \
    < <(grep -rnE "#[[:space:]]*include[[:space:]]*<($1)" $rooms 2>/dev/null)
}
third 'uv\.h' server; third 'microhttpd\.h' server; third 'cjson/' server; third 'pcre2\.h' model
third 'xxhash\.h' blockmgr; third 'toml\+\+|toml\.hpp' config; third 'cuda|cublas' kernels
[ $failed = 0 ] && echo "rooms: every include follows the arrows"
exit $failed

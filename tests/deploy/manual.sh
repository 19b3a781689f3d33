#!/usr/bin/env bash
# man formats the page without a warning, and every option of the program is in what a reader sees.
set -euo pipefail
page=$KVASIR_SOURCE/deploy/kvasir.1
words=$(LC_ALL=C.UTF-8 MANROFFOPT='' man --warnings -E UTF-8 -l "$page" 2>&1 >/dev/null)
[ -z "$words" ] || { echo "$words"; exit 1; }
text=$(LC_ALL=C.UTF-8 MANWIDTH=200 man -E ascii -l "$page" | sed 's/.\x08//g')
for command in serve bench eval inspect check-config; do
  while read -r flag; do
    grep -qe "$flag" <<<"$text" || { echo "the manual page lacks $flag"; exit 1; }
  done < <("$KVASIR_PROGRAM" "$command" --help | grep -oE '^  (-[a-z], )?--[a-z-]+' | sed 's/.*--/--/')
done

#!/usr/bin/env bash
# cmake --install puts everything where a package would, the unit points at it, and an edited configuration survives the next install.
set -euo pipefail
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
install() { DESTDIR=$root cmake --install "$KVASIR_BUILD" >"$root.log" 2>&1 || { cat "$root.log"; exit 1; }; rm -f "$root.log"; }
install
prefix=$(sed -n 's/^CMAKE_INSTALL_PREFIX:PATH=//p' "$KVASIR_BUILD/CMakeCache.txt")
"$root$prefix/bin/kvasir" --version
for file in share/man/man1/kvasir.1 share/bash-completion/completions/kvasir lib/systemd/system/kvasir.service share/doc/kvasir/kvasir.toml \
  share/doc/kvasir/README.md share/doc/kvasir/kvasir.json; do
  [ -s "$root$prefix/$file" ] || { echo "missing: $file"; exit 1; }
done
start=$(sed -n 's/^ExecStart=//p' "$root$prefix/lib/systemd/system/kvasir.service")
read -r program command flag config <<<"$start"
[ -x "$root$program" ] && [ "$command $flag" = "serve --config" ] && [ -s "$root$config" ] || { echo "the unit starts: $start"; exit 1; }
"$root$program" check-config "$root$config" >/dev/null
echo '# mine' >"$root$config"
install
[ "$(cat "$root$config")" = '# mine' ] || { echo "the configuration was overwritten"; exit 1; }
# Completion finds the commands and a command's options.
bash -c "
  set -eu
  complete() { :; }
  compopt() { :; }
  . '$root$prefix/share/bash-completion/completions/kvasir'
  COMP_WORDS=('$root$program' be) COMP_CWORD=1; _kvasir '$root$program'; [ \"\${COMPREPLY[*]}\" = bench ]
  COMP_WORDS=('$root$program' bench --rou) COMP_CWORD=2; _kvasir '$root$program'; [ \"\${COMPREPLY[*]}\" = --rounds ]
" || { echo "completion does not complete"; exit 1; }

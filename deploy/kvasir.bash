# bash completion for kvasir. Commands and options are asked of the program, which has them in one table.
_kvasir() {
  local word=${COMP_WORDS[COMP_CWORD]} words
  if [ "$COMP_CWORD" = 1 ]; then
    words=$("$1" --help 2>/dev/null | sed -n 's/^  \([a-z-]*\)  .*/\1/p')
  elif [[ $word = -* ]]; then
    words=$("$1" "${COMP_WORDS[1]}" --help 2>/dev/null | grep -oE -- '^  (-[a-z], )?--[a-z-]+' | sed 's/.*--/--/')
  else
    compopt -o default 2>/dev/null
    return
  fi
  mapfile -t COMPREPLY < <(compgen -W "$words" -- "$word")
}
complete -F _kvasir kvasir

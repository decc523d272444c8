# Two runs of pytest at once: beside ARGUMENTS -- ARGUMENTS
# The first is quiet until both are over, the second tells its progress; ends as the worse of the two.
beside() {
  local quiet=() said child first=0 second=0
  while [ "$1" != -- ]; do quiet+=("$1"); shift; done
  shift
  said=$(mktemp)
  .venv/bin/python -m pytest -q --durations=5 "${quiet[@]}" >"$said" 2>&1 &
  child=$!
  trap 'kill "$child" 2>/dev/null || true' INT TERM
  .venv/bin/python -m pytest -q --durations=5 "$@" || second=$?
  echo "Waiting for the tests that run beside these since the start."
  wait "$child" || first=$?
  cat "$said"
  rm -f "$said"
  return $((first > second ? first : second))
}

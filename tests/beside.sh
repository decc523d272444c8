# Two runs of pytest at once: beside ARGUMENTS -- ARGUMENTS
# The first is quiet until both are over, the second tells its progress. Ends as the worse of the two.
beside() {
  local quiet=() said first code others
  while [ "$1" != -- ]; do quiet+=("$1"); shift; done
  shift
  said=$(mktemp)
  .venv/bin/python -m pytest -q --durations=5 "${quiet[@]}" >"$said" 2>&1 &
  first=$!
  trap 'kill "$first" 2>/dev/null || true' INT TERM
  others=0
  .venv/bin/python -m pytest -q --durations=5 "$@" || others=$?
  echo "Waiting for the tests that run beside these since the start."
  code=0
  wait "$first" || code=$?
  cat "$said"
  rm -f "$said"
  return $((others > code ? others : code))
}

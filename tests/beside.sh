# Two runs of pytest at once: beside ARGUMENTS -- ARGUMENTS
# The first is quiet until both are over, the second tells its progress. What failed is tried once more with nothing beside
# it, and that is told; ends as the worse of the two.
beside() {
  local quiet=() said child first=0 second=0
  while [ "$1" != -- ]; do quiet+=("$1"); shift; done
  shift
  said=$(mktemp)
  remembered first "${quiet[@]}" >"$said" 2>&1 &
  child=$!
  trap 'kill "$child" 2>/dev/null || true' INT TERM
  remembered second "$@" || second=$?
  echo "Waiting for the tests that run beside these since the start."
  wait "$child" || first=$?
  cat "$said"
  rm -f "$said"
  if [ "$first" -eq 1 ]; then again first "${quiet[@]}" && first=0; fi
  if [ "$second" -eq 1 ]; then again second "$@" && second=0; fi
  return $((first > second ? first : second))
}

remembered() {
  local name=$1
  shift
  rm -rf ".pytest_cache/$name"
  .venv/bin/python -m pytest -q --durations=5 -o "cache_dir=.pytest_cache/$name" "$@"
}

again() {
  local name=$1
  shift
  echo "AGAIN, with nothing beside it: what failed above."
  .venv/bin/python -m pytest -q -o "cache_dir=.pytest_cache/$name" --last-failed --last-failed-no-failures none "$@"
}

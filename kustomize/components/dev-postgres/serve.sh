#!/bin/sh
# Serve PostgreSQL on port 5432, its data made on the first start. Fast shutdown is SIGINT; SIGTERM would wait for clients.
set -eu
data=/var/lib/postgresql/data
# Written last: what a start that was killed left half done is made anew.
made=$data/perennial-made
if ! [ -f "$made" ]; then
  rm -rf "${data:?}"/*
  initdb -D "$data" -U postgres --auth=scram-sha-256 --pwfile=/etc/dev-postgres-secret/password >/dev/null
  echo "host all all all scram-sha-256" >>"$data/pg_hba.conf"
  : >"$made"
fi
exec postgres -D "$data" -c listen_addresses='*' -c port=5432 -c unix_socket_directories=/tmp

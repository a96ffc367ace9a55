#!/bin/sh
# Makes what docker-compose.yml needs and git does not hold: .env, passwords, data directories.
# Usage: prepare.sh DREAMFLEET [--rotate]; run at the root of the tree.
set -eu
umask 077

dreamfleet=$1
shift
uid=$(id -u)
gid=$(id -g)
# Containers do not run as root, not even for root.
if [ "$uid" = 0 ]; then
  uid=10001 gid=10001
fi

if [ ! -e .env ]; then
  cp .env.example .env
  printf '\n# Who made the secrets, and so who the containers are.\nDREAMFLEET_UID=%s\nDREAMFLEET_GID=%s\n' \
    "$uid" "$gid" >>.env
fi

if [ ! -e secrets/users.acl ] || [ "${1:-}" = --rotate ]; then
  "$dreamfleet" secrets secrets/ --hosts redis "$@"
fi
for name in ray.token metrics.token grafana_admin.password; do
  if [ ! -e "secrets/$name" ] || [ "${1:-}" = --rotate ]; then
    od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"secrets/$name"
  fi
done

data=$(sed -n 's/^DATA_DIR=//p' .env | tail -n 1)
data=${data:-./compose-data}
mkdir -p "$data/redis" "$data/runs" "$data/prometheus" "$data/grafana"
if [ "$(id -u)" = 0 ]; then
  chown -R "$uid:$gid" secrets "$data"
fi

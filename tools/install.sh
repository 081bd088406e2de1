#!/usr/bin/env bash
# install.sh PYTHON [EXTRAS]: installs the checkout into a virtual environment,
# editable. By uv, which resolves all extras in seconds; pip takes minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath --no-symlinks "$1") extras=${2:-}
"$python" -m pip install --quiet --disable-pip-version-check uv
# uv does not read pip's configuration, neither its files nor its variables.
settings=$("$python" -m pip config list)
configure() {
  local value
  value=$(sed -n "s/^.*\.$1='\(.*\)'$/\1/p" <<< "$settings" | tail -n 1)
  [ -z "$value" ] || export "$2=$value"
}
configure index-url UV_DEFAULT_INDEX
configure find-links UV_FIND_LINKS
configure constraint UV_CONSTRAINT
exec "$python" -m uv pip install --quiet --python "$python" \
  -e ".${extras:+[$extras]}"

#!/usr/bin/env bash
# Sets everything up (once, in .venv) and runs the tests; arguments go to pytest:  bash scripts/test.sh -k sampler
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
exec .venv/bin/python -m pytest -q -n 2 --dist worksteal tests "$@"

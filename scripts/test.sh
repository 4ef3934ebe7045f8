#!/usr/bin/env bash
# Sets everything up (once, in .venv), checks the style and runs the tests; arguments go to pytest:
#     bash scripts/test.sh -k sampler
set -euo pipefail
cd "$(dirname "$0")/.."
[ -d .venv ] || python3 -m venv .venv
bin=.venv/bin
[ -d "$bin" ] || bin=.venv/Scripts  # Windows
"$bin/python" -m pip install --quiet --disable-pip-version-check -r requirements.txt
"$bin/python" -m ruff check --quiet .
"$bin/python" -m ruff format --quiet --check .
exec "$bin/python" -m pytest -n 2 --dist worksteal "$@"

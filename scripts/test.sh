#!/usr/bin/env bash
# Sets everything up (once, in .venv), checks the style and runs the tests; arguments go to pytest:
#     bash scripts/test.sh -k sampler
requirements=requirements-dev.txt
source "$(dirname "$0")/setup.sh"
"$python" -m ruff check --quiet .
"$python" -m ruff format --quiet --check .
exec "$python" -m pytest -n 2 --dist worksteal "$@"

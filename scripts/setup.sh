# Makes .venv, once, and installs into it what the file $requirements names; leaves its Python in
# $python. For the scripts beside it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -d .venv ] || python3 -m venv .venv
python=.venv/bin/python
[ -x "$python" ] || python=.venv/Scripts/python.exe  # Windows
"$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip  # a .venv made by uv
"$python" -m pip install --quiet --disable-pip-version-check -r "$requirements"

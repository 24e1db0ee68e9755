# Sourced by the other scripts: makes .venv from the lock file of the first
# suitable Python and activates it. MMGEN_PYTHON names another interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

CANDIDATES="python3.11 python3.13 python3"

find_python() {
  local name version
  for name in ${MMGEN_PYTHON:-$CANDIDATES}; do
    version=$("$name" -c \
      'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) \
      || continue
    if [ -f "launch/lock/$version.txt" ]; then
      echo "$name"
      return
    fi
  done
  echo "mmgen has lock files for Python $(cd launch/lock && echo [0-9]*.txt |
    sed 's/\.txt//g'); none of" \
    "${MMGEN_PYTHON:-$CANDIDATES} is one of them." \
    "Install one, or name it: MMGEN_PYTHON=/path/to/python bash $0" >&2
  return 1
}

PYTHON=$(find_python)
VERSION=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
LOCK="launch/lock/$VERSION.txt"
STAMP=".venv/mmgen-$(cat "$LOCK" setup.py | cksum | cut -d' ' -f1)"
if [ ! -f "$STAMP" ]; then
  echo "Setting up .venv with Python $VERSION from $LOCK (once)"
  "$PYTHON" -m venv --clear .venv
  .venv/bin/python -m pip install --quiet --requirement "$LOCK"
  .venv/bin/python -m pip install --quiet --no-deps --editable .
  touch "$STAMP"
fi
source .venv/bin/activate

#!/usr/bin/env bash
# The checks that a change must pass: style, then every test. Arguments go to
# pytest: bash launch/test.sh tests/models -k rotary
source "$(dirname "$0")/environment.sh"
# Compiles for TPU slices; apart, since jax looks for a TPU wherever it finds it.
LIBTPU=libtpu==0.0.52
if [ ! -f ".venv/plan/$LIBTPU" ]; then
  python -m pip install --quiet --no-deps --target .venv/plan "$LIBTPU"
  touch ".venv/plan/$LIBTPU"
fi
ruff check .
# One process per core; a file stays in one, since its tests share fixtures.
python -m pytest --numprocesses=logical --maxprocesses=8 --dist=loadfile "$@"

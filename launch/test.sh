#!/usr/bin/env bash
# The checks that a change must pass: style, then every test. Arguments go to
# pytest: bash launch/test.sh tests/models -k rotary
source "$(dirname "$0")/environment.sh"
ruff check .
python -m pytest "$@"

#!/usr/bin/env bash
# From nothing to a table: sets up, draws the pictures, trains and evaluates
# the two rows of experiments/quickstart.py, prints the table. About ten
# minutes on two cores; a second call reuses everything.
source "$(dirname "$0")/environment.sh"
python -m mmgen.prepare --corpus=emoji/tiny
python -m mmgen.table --experiment=quickstart "$@"

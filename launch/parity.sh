#!/usr/bin/env bash
# Compares with the libraries that published weights are of: tests/parity. They
# stand in an environment of their own that sees all of .venv, since packages
# there do other things where they find torch, and the tests must not depend on
# it. Arguments go to pytest. On Linux the package index has torch with CUDA;
# a torch==<the same version> for CPUs alone serves as well.
source "$(dirname "$0")/environment.sh"
APART=.venv/parity
LOCK=launch/lock/parity.txt
STAMP="$APART/mmgen-$(cksum <"$LOCK" | cut -d' ' -f1)"
if [ ! -f "$STAMP" ]; then
  echo "Setting up $APART from $LOCK (once)"
  "$PYTHON" -m venv --clear "$APART"
  packages() { "$1/bin/python" -c \
    'import sysconfig; print(sysconfig.get_path("purelib"))'; }
  echo "import site; site.addsitedir('$(packages .venv)')" \
    >"$(packages "$APART")/mmgen.pth"
  "$APART/bin/python" -m pip install --quiet --requirement "$LOCK" \
    --constraint "launch/lock/$VERSION.txt"
  touch "$STAMP"
fi
"$APART/bin/python" -m pytest tests/parity "$@"

"""The numbers of an unchanged config: when they change, say so.

The first steps of two tiny runs are stored beside `config.RESULT_VERSION`.
If a change to the code moves them, finished runs on disk no longer stand for
what the code would compute: raise RESULT_VERSION, which gives every run a new
key, then MMGEN_UPDATE_GOLDEN=1 python -m pytest tests/test_golden_metrics.py.
"""

import json
import os
import pathlib

import jax
import numpy as np
import pytest
import test_train

from mmgen import config as config_lib
from mmgen import train as train_lib
from mmgen.training import metrics as metrics_lib

FILE = pathlib.Path(__file__).parent / 'golden' / 'metrics.json'
NAMES = ('loss', 'grad_norm', 'param_norm', 'update_norm', 'lr')
RUNS = {
    'patches': {'mesh.data': 1, 'mesh.fsdp': 8},
    'eve': {'mesh.data': 1, 'mesh.fsdp': 8, 'model.vision': dict(
        name='eve', patch=2, pool=2, width=16, heads=2)},
}


@pytest.fixture(autouse=True)
def fakes_in_place(monkeypatch):
  test_train._install(monkeypatch)


@pytest.mark.parametrize('name', RUNS)
def test_the_first_steps_are_the_stored_ones(name, tmp_path):
  config = test_train._config(steps=5, **RUNS[name])
  with jax.default_matmul_precision('highest'):
    train_lib.train(config, tmp_path, '')
  rows = metrics_lib.read_rows(tmp_path)
  found = {k: [row[k] for row in rows if k in row] for k in NAMES}
  stored = json.loads(FILE.read_text()) if FILE.exists() else {}
  if os.environ.get('MMGEN_UPDATE_GOLDEN'):
    stored |= {'RESULT_VERSION': config_lib.RESULT_VERSION, name: found}
    FILE.write_text(json.dumps(stored, indent=1) + '\n')
  assert stored['RESULT_VERSION'] == config_lib.RESULT_VERSION, (
      'RESULT_VERSION was raised: store the new numbers, see the head of '
      'this file')
  for k in NAMES:
    np.testing.assert_allclose(
        found[k], stored[name][k], rtol=2e-4, err_msg=(
            f'{k} moved: raise config.RESULT_VERSION if that is intended, '
            'see the head of this file'))

"""Every row's flattened config is stored: a change shows up in review.

After an intended change: MMGEN_UPDATE_GOLDEN=1 python -m pytest
tests/test_golden_configs.py, then read the diff.
"""

import json
import os
import pathlib

import pytest

from mmgen import config as config_lib
from mmgen import errors

FOLDER = pathlib.Path(__file__).parent / 'golden' / 'configs'


def _runs():
  for name in config_lib.experiment_names():
    for scale in config_lib.SCALES:
      try:
        config_lib.experiment(name).base(scale)
      except errors.UserError:
        continue  # it says that it has no such scale
      for row in config_lib.rows(name):
        for stage in config_lib.stage_names(name, row):
          yield f'{name}:{row}:{stage}', scale


def _text(address, scale):
  flat = config_lib.flatten(config_lib.load(address, scale))
  return ''.join(f'{k} = {json.dumps(v)}\n' for k, v in flat.items())


def _file(address, scale):
  return f'{address.replace("/", ".").replace(":", ".")}.{scale}.txt'


@pytest.mark.parametrize('address, scale', list(_runs()))
def test_config_is_the_stored_one(address, scale):
  file = FOLDER / _file(address, scale)
  if os.environ.get('MMGEN_UPDATE_GOLDEN'):
    FOLDER.mkdir(parents=True, exist_ok=True)
    file.write_text(_text(address, scale))
  assert file.exists(), f'{file.name} is missing; see the top of this file'
  assert _text(address, scale) == file.read_text()


def test_no_stored_config_is_left_over():
  assert sorted(f.name for f in FOLDER.glob('*.txt')) == sorted(
      _file(*run) for run in _runs())

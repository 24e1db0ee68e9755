"""Every run's flattened config is stored: a change shows up in review.

One file for each experiment and scale holds its first run whole and of every
other run what differs from it. After an intended change:
MMGEN_UPDATE_GOLDEN=1 python -m pytest tests/test_golden_configs.py, then read
the diff.
"""

import json
import os
import pathlib

import pytest

from mmgen import addresses
from mmgen import config as config_lib
from mmgen import errors

FOLDER = pathlib.Path(__file__).parent / 'golden' / 'configs'


def _tables():
  for name in addresses.experiment_names():
    for scale in config_lib.SCALES:
      try:
        addresses.experiment(name).base(scale)
      except errors.UserError:
        continue  # it says that it has no such scale
      yield name, scale


def _text(name, scale):
  first, sections = None, []
  for row in addresses.rows(name):
    for stage in addresses.stage_names(name, row):
      flat = config_lib.flatten(config_lib.load(f'{name}:{row}:{stage}', scale))
      first = first or flat
      lines = [f'{k} = {json.dumps(v)}' for k, v in flat.items()
               if flat is first or k != 'name' and v != first.get(k, first)]
      lines += [f'{k} is absent' for k in first if k not in flat]
      sections.append('\n'.join([f'[{row}:{stage}]', *lines]))
  return '\n\n'.join(sections) + '\n'


def _file(name, scale):
  return FOLDER / f'{name.replace("/", ".")}.{scale}.txt'


@pytest.mark.parametrize('name, scale', list(_tables()))
def test_configs_are_the_stored_ones(name, scale):
  file = _file(name, scale)
  if os.environ.get('MMGEN_UPDATE_GOLDEN'):
    FOLDER.mkdir(parents=True, exist_ok=True)
    file.write_text(_text(name, scale))
  assert file.exists(), f'{file.name} is missing; see the top of this file'
  assert _text(name, scale) == file.read_text()


def test_no_stored_config_is_left_over():
  assert sorted(FOLDER.glob('*.txt')) == sorted(
      _file(*table) for table in _tables())

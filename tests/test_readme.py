"""The commands that README.md shows can be typed as they stand there."""

import importlib
import pathlib
import re
import shlex

import pytest

from mmgen import addresses
from mmgen import errors
from mmgen import plan
from mmgen import weights
from mmgen.data import corpora

README = (pathlib.Path(__file__).parents[1] / 'README.md').read_text()
COMMANDS = re.findall(r'^\| `python -m mmgen\.(\w+) ([^`]+)` \|', README, re.M)
# What stands for a choice of the reader's.
CHOICES = {'<row>': f'eva_clip/recipes:{addresses.rows("eva_clip/recipes")[0]}',
           '<weights>': 'weights', '<folder>': 'folder'}
# How each ends in an empty folder, once its arguments are read.
ENDS = {
    'prepare': 'started', 'plan': 'started',
    'look': 'mmgen.prepare --corpus=emoji/tiny',
    'train': 'mmgen.prepare --corpus=emoji/tiny',
    'evaluate': 'is no run folder', 'generate': 'is no run folder',
    'convert': 'weights', 'table': '^0$'}


def test_every_layout_of_weights_is_listed():
  _, _, rest = README.partition('## Published checkpoints')
  section, _, _ = rest.partition('\n## ')
  rows = re.findall(r'^\| [^|]+ \| (`[^|]+) \| [^|]+ \|$', section, re.M)
  named = [name for row in rows for name in re.findall(r'`(\w+)`', row)]
  assert sorted(named) == sorted(weights.FAMILIES)


def _started(*_, **__):
  raise errors.UserError('started')


def test_every_command_is_listed():
  package = pathlib.Path(corpora.__file__).parents[2]
  commands = {path.stem for path in package.glob('*.py')
              if "__name__ == '__main__'" in path.read_text()}
  assert {command for command, _ in COMMANDS} == commands == set(ENDS)


@pytest.mark.parametrize('command, arguments', COMMANDS)
def test_a_command_takes_the_arguments_that_are_shown(
    command, arguments, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(corpora, 'prepare', _started)
  monkeypatch.setattr(plan, 'plan', _started)
  for choice, taken in CHOICES.items():
    arguments = arguments.replace(choice, taken)
  arguments = shlex.split(arguments)
  if command == 'table':
    monkeypatch.setattr(corpora, 'manifest', lambda *_: {})
    arguments.append('--dry_run')
  main = importlib.import_module(f'mmgen.{command}').main
  with pytest.raises((errors.UserError, SystemExit)) as ended:
    main(arguments)
  assert re.search(ENDS[command], str(ended.value)), ended.value
  assert not list(tmp_path.iterdir())

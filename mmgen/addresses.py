"""Addresses of runs: `<experiment>:<row>[:<stage>]`, and what they name.

An experiment is a Python file below `experiments/`, or any by its path; see
`mmgen/config.py` for what it declares. A row is a chain of stages, each of
which is a run.
"""

import contextlib
import dataclasses
import functools
import importlib
import os
import pathlib
import re
import traceback
import types

from mmgen import errors

DEFAULT_STAGE = 'train'


@dataclasses.dataclass(frozen=True)
class Address:
  """Names one run: an experiment, one of its rows, a stage of that row."""
  experiment: str
  row: str
  stage: str

  def __str__(self):
    return f'{self.experiment}:{self.row}:{self.stage}'


def experiment_names() -> list[str]:
  """Returns the names of all experiments beside the package."""
  root = pathlib.Path(_experiments_package().__path__[0])
  names = [p.relative_to(root).with_suffix('').as_posix()
           for p in root.rglob('*.py')]
  return sorted(n for n in names if re.search(
      '^ROWS = ', (root / f'{n}.py').read_text(), re.MULTILINE))


def _experiments_package() -> types.ModuleType:
  return importlib.import_module('experiments')


@functools.cache
def experiment(name: str) -> types.ModuleType:
  """Imports an experiment by its name below `experiments/` or by a path.

  Args:
    name: `quickstart`, `eve/encoder`, or the path of a .py file of your own.

  Raises:
    UserError: there is no such experiment, it cannot be executed, or it lacks
      `base` or `ROWS`.
  """
  if name.endswith('.py') and os.path.exists(name):
    # Not through importlib, whose stored bytecode misses an edit that keeps
    # the size of a file within one second.
    module = types.ModuleType(pathlib.Path(name).stem)
    module.__file__ = name
    with blamed(name):
      exec(compile(pathlib.Path(name).read_text(), name, 'exec'), vars(module))
  else:
    short = name.removesuffix('.py').removeprefix('experiments/')
    if short not in experiment_names():
      names = experiment_names()
      raise errors.UserError(
          f'no experiment {name!r}.{errors.nearest(short, names)} There are: '
          f'{", ".join(names)}; or give the path of a .py file.')
    path = pathlib.Path(_experiments_package().__path__[0]) / f'{short}.py'
    with blamed(str(path)):
      module = importlib.import_module(
          'experiments.' + short.replace('/', '.'))
  for needed in ('base', 'ROWS'):
    if not hasattr(module, needed):
      raise errors.UserError(f'experiment {name!r} does not define {needed}.')
  return module


@contextlib.contextmanager
def blamed(path: str):
  """Turns what goes wrong in an experiment's file into a UserError.

  Args:
    path: of the file. An error is told with the last of its lines that had a
      part in it; one without any is no business of the file.
  """
  try:
    yield
  except errors.UserError:
    raise
  except Exception as error:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
             if frame.filename == path]
    if isinstance(error, SyntaxError) and error.filename == path:
      lines.append(error.lineno)
    if not lines:
      raise
    what = error.msg if isinstance(error, SyntaxError) else error
    raise errors.UserError(
        f'your file {path}, line {lines[-1]}: {type(error).__name__}: '
        f'{" ".join(str(what).split())}') from error


def rows(name: str) -> list[str]:
  """Returns the names of the rows of an experiment, in their order."""
  return list(experiment(name).ROWS)


def row_of(name: str, row: str) -> dict:
  """Returns the fields of a row."""
  table = experiment(name).ROWS
  if row not in table:
    raise errors.UserError(
        f'experiment {name!r} has no row {row!r}.{errors.nearest(row, table)} '
        f'Rows: {", ".join(table)}.')
  return table[row]


def stage_names(name: str, row: str) -> list[str]:
  """Returns the stages of a row in their order."""
  chain = row_of(name, row).get('stages')
  declared = getattr(experiment(name), 'STAGES', {DEFAULT_STAGE: {}})
  for stage in chain or ():
    if stage not in declared:
      raise errors.UserError(
          f'row {name}:{row} names stage {stage!r}.'
          f'{errors.nearest(stage, declared)} Stages: {", ".join(declared)}.')
  return list(chain or declared)


def parse(address: str) -> Address:
  """Reads `<experiment>:<row>[:<stage>]`; without a stage, the last one."""
  parts = str(address).split(':')
  if len(parts) == 1:
    raise errors.UserError(
        f'{address!r} names no row. Give <experiment>:<row>, with a row of '
        f'{", ".join(rows(parts[0]))}.')
  if len(parts) > 3 or not all(parts):
    raise errors.UserError(
        f'{address!r} is not of the form <experiment>:<row>[:<stage>].')
  name, row = parts[:2]
  name = name.removeprefix('experiments/')
  if not (name.endswith('.py') and os.path.exists(name)):
    name = name.removesuffix('.py')
  stages = stage_names(name, row)
  stage = parts[2] if len(parts) == 3 else stages[-1]
  if stage not in stages:
    raise errors.UserError(
        f'row {name}:{row} has no stage {stage!r}.'
        f'{errors.nearest(stage, stages)} Stages: {", ".join(stages)}.')
  return Address(name, row, stage)


def stages(address: str) -> list[str]:
  """Returns the addresses of a row's runs up to the addressed one."""
  a = parse(address)
  names = stage_names(a.experiment, a.row)
  return [str(dataclasses.replace(a, stage=s))
          for s in names[:names.index(a.stage) + 1]]

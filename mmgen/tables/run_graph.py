"""The graph of runs behind a table: what is there, what is missing, in order.

A row is a chain of stages, and any run may start from the parameters of
others (`init.<part>='run:...'`). Equal runs have equal keys, so that rows
share what they have in common.
"""

from collections.abc import Callable
from collections.abc import Mapping
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from typing import NamedTuple

from etils import epath
import numpy as np

from mmgen import addresses
from mmgen import config as config_lib
from mmgen import errors
from mmgen.training import checkpoint
from mmgen.training import run as run_lib

DONE = 'done'
DIVERGED = 'diverged'
TRAINED = 'to score'
CUT_OFF = 'cut off'
MISSING = 'to run'


class Target(NamedTuple):
  """What is asked for: a stage of a row, a seed, and other values of fields.

  Attributes:
    address: `<experiment>:<row>[:<stage>]`.
    seed: its seed, and that of its parents.
    overrides: pairs (dotted field, value) of this run, not of its parents.
  """
  address: str
  seed: int
  overrides: tuple[tuple[str, object], ...] = ()


@dataclasses.dataclass(frozen=True)
class Run:
  """One node of the graph.

  Attributes:
    address: `<experiment>:<row>:<stage>`.
    seed: its seed.
    config: its locked config.
    folder: where it is or will be.
    evaluation: how it is scored, of `config.evaluation_key`.
    parents: keys of the runs whose parameters it takes.
    overrides: pairs (dotted field, value) set over the row's.
  """
  address: str
  seed: int
  config: object
  folder: epath.Path
  evaluation: str
  parents: tuple[str, ...]
  overrides: tuple[tuple[str, object], ...] = ()

  @property
  def state(self) -> str:
    if self.result:
      return DONE
    for name, state in (
        ('result.json', TRAINED), ('not_finite.json', DIVERGED)):
      if (self.folder / name).exists():
        return state
    return MISSING if checkpoint.latest_step(self.folder) is None else CUT_OFF

  @property
  def result(self) -> dict | None:
    return run_lib.read_result(self.folder, self.evaluation)

  @property
  def divergence(self) -> str:
    """Says in one line where a diverged run ended."""
    step = json.loads((self.folder / 'not_finite.json').read_text())['step']
    return (f'diverged at step {step} (to try it again, remove '
            f'{self.folder})')

  def __str__(self):
    # What a run is scored on is not what it is known by.
    fields = [f' {field}={value}' for field, value in self.overrides
              if not field.startswith('evaluators.')]
    return f'{self.address} seed {self.seed}{"".join(fields)}'


@dataclasses.dataclass(frozen=True)
class Failure:
  """Why a run has no result.

  Attributes:
    why: in one line.
    crashed: whether it broke, or starts from one that did. A run whose loss
      diverged, deterministic as it is, is a finding and not a crash.
  """
  why: str
  crashed: bool


def plan(targets, scale: str, workdir, data_dir):
  """Finds every run that some targets need.

  Args:
    targets: `Target`s.
    scale: of the targets, and so of their parents.
    workdir: folder of all runs.
    data_dir: folder of the prepared corpora.

  Returns:
    ({key: Run}, parents before children; {target: key}, with addresses in
    full).

  Raises:
    UserError: a run needs itself.
  """
  runs, keys, open_ = {}, {}, []

  def visit(address, seed, overrides=()):
    target = Target(str(addresses.parse(address)), seed, overrides)
    if target in open_:
      raise errors.UserError(
          'runs start from each other: '
          + ' -> '.join(t.address for t in (*open_, target)))
    if target not in keys:
      open_.append(target)
      config = config_lib.load(address, scale, overrides, seed)
      parents = tuple(visit(*parent)
                      for parent in config_lib.parents(config).values())
      evaluation = config_lib.evaluation_key(config, data_dir)
      key = f'{config_lib.run_key(config, data_dir)}.{evaluation}'
      # Two rows may name one run differently: the first name stays.
      if key not in runs:
        folder = config_lib.run_folder(config, workdir, data_dir)
        runs[key] = Run(address, seed, config, folder, evaluation, parents,
                        overrides)
      keys[target] = key
      open_.pop()
    return keys[target]

  for target in targets:
    visit(*target)
  return runs, keys


def ancestors(key: str, runs: Mapping[str, Run]) -> list[str]:
  """Returns a run and all that it starts from, each once."""
  found = {key: None}
  for parent in runs[key].parents:
    found |= dict.fromkeys(ancestors(parent, runs))
  return list(found)


def launch(run: Run, workdir, data_dir) -> str | None:
  """Trains one run in a process of its own.

  A process per run costs one start of Python, and gives all memory back, keeps
  a crash (or the kernel's out-of-memory killer) from taking the other rows
  along, and is the very command with which a reader repeats the run.

  Returns:
    None, or in one line why there is no result.
  """
  command = [sys.executable, '-m', 'mmgen.train', f'--config={run.address}',
             f'--scale={run.config.scale}', f'--seed={run.seed}',
             f'--workdir={workdir}', f'--data_dir={data_dir}',
             *(f'--config.{field}={value}' for field, value in run.overrides)]
  with subprocess.Popen(command, env=_environment(workdir)) as child:
    try:
      code = child.wait()
    except BaseException:  # the child saves its last step, then we go too
      child.terminate()
      child.wait()
      raise
  if code == 0 and run.state == DONE:
    return None
  why = (f'killed by {signal.Signals(-code).name}' if code < 0 else
         f'exit code {code}' if code else 'it wrote no result.json')
  return f'{why}; repeat it with: python {" ".join(command[1:])}'


def _environment(workdir) -> dict[str, str]:
  """Lets runs that compile the same programs compile them once.

  What the user has set stays. Object stores are left alone. jaxlib 0.10.1
  prints pages about two invented CPU features for every program that it takes
  from the cache, hence the log level; 1 is what jax itself sets when it is
  imported.
  """
  kept = {name: value for name, value in os.environ.items()
          if (name, value) != ('TF_CPP_MIN_LOG_LEVEL', '1')}
  cache = {
      'TF_CPP_MIN_LOG_LEVEL': '3',
      'JAX_COMPILATION_CACHE_DIR': str(epath.Path(workdir) / 'compiled'),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.1'}
  return ({} if '://' in str(workdir) else cache) | kept


def duration(seconds: float) -> str:
  """Returns '40 s', '3 min' or '2 h 05 min'."""
  minutes = round(seconds / 60)
  if seconds < 90:
    return f'{seconds:.0f} s'
  return f'{minutes} min' if minutes < 90 else (
      f'{minutes // 60} h {minutes % 60:02d} min')


def _time_left(todo, seconds: Mapping[str, list[float]]) -> str:
  """Estimates from finished runs of the same address, else from all."""
  known = [s for values in seconds.values() for s in values]
  if not known:
    return ''
  left = sum(np.mean(seconds.get(run.address, known)) for run in todo)
  return f', about {duration(left)} left'


def execute(runs: Mapping[str, Run], start: Callable[[Run], str | None],
            say: Callable[[str], None]) -> dict[str, Failure]:
  """Runs what is missing, parents first.

  Args:
    runs: of `plan`.
    start: trains one run; returns None or why it failed.
    say: shows one line.

  Returns:
    {key: why there is no result}; a run that fails takes those along that
    start from it, and no other.
  """
  failed, seconds = {}, {}
  for run in runs.values():
    if run.state == DONE:
      result = run.result
      seconds.setdefault(run.address, []).append(
          result['seconds'] + result['evaluation_seconds'])
  todo = {key: run for key, run in runs.items()
          if run.state in (TRAINED, CUT_OFF, MISSING)}
  left = list(todo.values())
  for key, run in runs.items():
    broken = [p for p in run.parents if p in failed]
    if broken:
      failed[key] = Failure(f'starts from {runs[broken[0]]}, which failed',
                            failed[broken[0]].crashed)
    elif key in todo:
      how = {CUT_OFF: ', resumed', TRAINED: ', scored anew'}.get(run.state, '')
      say(f'run {len(todo) - len(left) + 1} of {len(todo)}: {run}{how}'
          f'{_time_left(left, seconds)}')
      began = time.monotonic()
      error = start(run)
      if error is None:
        seconds.setdefault(run.address, []).append(time.monotonic() - began)
      elif run.state != DIVERGED:
        failed[key] = Failure(error, True)
    if run.state == DIVERGED:
      failed[key] = Failure(run.divergence, False)
    if key in failed:
      say(f'{run} has no result: {failed[key].why}')
    if key in todo:
      left.remove(run)
  return failed

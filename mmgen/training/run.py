"""What a run writes into its folder while it is trained, and how it ends."""

import datetime
import json
import logging
import math
import signal
import time

import jax
import jax.numpy as jnp

from mmgen import errors
from mmgen.objectives import common
from mmgen.training import checkpoint
from mmgen.training import metrics as metrics_lib

_log = logging.getLogger(__name__)

# Records named in the error of a step that is not finite; the file has all.
_RECORDS_NAMED = 8


def write_json(path, content):
  """Writes a file whole or not at all; only the first process does."""
  if jax.process_index() == 0:
    with errors.writing(path.parent):
      draft = path.with_suffix('.draft')
      draft.write_text(json.dumps(content, indent=1) + '\n')
      draft.replace(path)


def read_result(folder, evaluation: str) -> dict | None:
  """Returns a finished run's result under one evaluation; None without it.

  Args:
    folder: epath of the run.
    evaluation: of `config.evaluation_key`.
  """
  for path in (folder / 'result.json',
               folder / 'results' / f'{evaluation}.json'):
    if path.exists():
      result = json.loads(path.read_text())
      if result['evaluation'] == evaluation:
        return result
  return None


def write_result(folder, result: dict):
  """Writes `result.json`; an older one, scored otherwise, goes to `results/`.
  """
  path = folder / 'result.json'
  if path.exists() and jax.process_index() == 0:
    with errors.writing(folder):
      (folder / 'results').mkdir(exist_ok=True)
      older = json.loads(path.read_text())['evaluation']
      path.rename(folder / 'results' / f'{older}.json')
  write_json(path, result)


class NotFinite(Exception):
  """A step whose loss or gradient was not finite."""

  def __init__(self, step, values):
    super().__init__(step)
    self.step, self.values = step, values


class Run:
  """The files of one run: rows, checkpoints, predictions, result.

  Attributes:
    start: steps that were done before.
    totals: sums of `metrics.COUNTS` over all steps so far.
    flops: of one step on all devices; set before the first step.
  """

  def __init__(self, config, flat, folder, pipeline, evaluators, checkpointer,
               extras):
    """Opens the files.

    Args:
      config: locked config.
      flat: the same as {dotted field: value}.
      folder: of the run.
      pipeline: gives the batches.
      evaluators: (parameters, folder) -> {'scores': {name: value},
        'examples', 'fingerprints'}, which also stores the predictions.
      checkpointer: of the folder.
      extras: of the checkpoint to go on from; {} at a fresh start.
    """
    self.config, self.flat, self.folder = config, flat, folder
    self.pipeline, self._evaluators = pipeline, evaluators
    self.checkpointer = checkpointer
    self.start = extras.get('step', 0)
    self.totals = extras.get('totals', dict.fromkeys(metrics_lib.COUNTS, 0))
    # A run may have been gone on with by a newer revision.
    self.revisions = list(dict.fromkeys(
        [*extras.get('revisions', []), checkpoint.git_revision()]))
    self.flops = 0
    self._began = time.perf_counter() - extras.get('seconds', 0.0)
    self._scored, self._evaluation_seconds = None, 0.0
    self._progress = self._shown = None
    index = jax.process_index()
    with errors.writing(folder):
      files = folder / f'process_{index}' if index else folder
      files.mkdir(parents=True, exist_ok=True)
      self._writer = metrics_lib.MetricsWriter(files, self.start)

  def __enter__(self):
    return self

  def __exit__(self, *_):
    if self._progress:
      self._progress.close()

  def record(self, step: int, metrics):
    """Fetches the metrics of a step and writes them down.

    Args:
      step: number of updates behind it.
      metrics: of `make_train_step`, on the device.

    Raises:
      NotFinite: the step was refused.
    """
    values = jax.device_get(metrics)
    if values.pop('bad'):
      raise NotFinite(step, values)
    values = {name: int(x) if name in metrics_lib.COUNTS else float(x)
              for name, x in values.items()}
    for name in metrics_lib.COUNTS:
      self.totals[name] += values[name]
    if self._progress is None:  # the first step has compiled: start the clock
      self._progress = metrics_lib.Progress(
          self.config.steps, step, self.flops, self.config.name)
      self._shown = dict(self.totals)
    elif step % self.config.log_every == 0 or step == self.config.steps:
      values |= self._show(step, values['loss'])
      self._writer.plot(step, values)
    self._writer.write(step, values)

  def _show(self, step, loss):
    """Moves the progress line; returns the rates since the last time."""
    since = {name: self.totals[name] - self._shown[name]
             for name in self.totals}
    self._shown = dict(self.totals)
    return self._progress.update(
        step, loss, since['text_tokens'] + since['visual_tokens'],
        since['images'])

  def evaluate(self, step: int, state, frozen) -> dict[str, dict]:
    """Runs all evaluators, once a step, and writes down their scores.

    Returns:
      dict: 'scores' {'<evaluator>/<score>': value}, 'examples' and
      'fingerprints', for `result`.
    """
    if self._scored and self._scored[0] == step:
      return self._scored[1]
    began = time.perf_counter()
    params = common.merge(state['params'], frozen)
    found = self._evaluators(params, self.folder)
    if found['scores']:
      named = {f'scores/{name}': x for name, x in found['scores'].items()}
      self._writer.write(step, named)
      self._writer.plot(step, named)
    seconds = time.perf_counter() - began
    self._evaluation_seconds += seconds
    self._began += seconds
    self._scored = step, found
    return found

  def save(self, step: int, state):
    """Starts a checkpoint; the rows up to it are on disk before it is."""
    with errors.writing(self.folder):
      self._writer.flush()
    self.checkpointer.save(step, state, dict(
        config=self.flat, totals=self.totals, revisions=self.revisions,
        seconds=time.perf_counter() - self._began),
                           self.pipeline.tokenizer.bytes)

  def stop(self, step: int):
    """Ends the process after SIGTERM, with step `step` saved."""
    self.close()
    _log.warning('%s: stopped by SIGTERM after step %d, which is saved. Run '
                 'the same command to go on.', self.config.name, step)
    raise SystemExit(128 + signal.SIGTERM)

  def give_up(self, error: NotFinite, state):
    """Saves the state before a step that was not finite, and names it.

    Raises:
      UserError: always.
    """
    good = error.step - 1
    if good > (self.checkpointer.latest() or 0):
      self.save(good, {**state, 'bad': jnp.zeros_like(state['bad'])})
    self.close()
    records = self.pipeline.records(good)
    path = self.folder / 'not_finite.json'
    values = {name: str(x) for name, x in error.values.items()}
    write_json(path, dict(step=error.step, metrics=values, records=records))
    some = '; '.join(
        f'{source}: {", ".join(ids[:_RECORDS_NAMED])}'
        f'{", ..." if len(ids) > _RECORDS_NAMED else ""}'
        for source, ids in records.items())
    raise errors.UserError(
        f'step {error.step} of {self.config.name} is not finite: loss '
        f'{values["loss"]}, gradient norm {values["grad_norm"]}. Its records '
        f'are {some} (all in {path}). The state before it is saved; see the '
        f'batch with python -m mmgen.look --config={self.config.name} '
        f'--step={good}.')

  def close(self):
    """Waits until everything is on disk."""
    self.checkpointer.wait()
    with errors.writing(self.folder):
      self._writer.close()

  def result(self, found, state, frozen, mesh) -> dict:
    """Returns the content of `result.json`.

    A run whose held-out loss was followed has the score 'stability/collapsed'
    beside those of its evaluators; see `metrics.stability`. Documents that had
    no place in a row, or could not be read, are `unplaced`: each step draws
    the same number of them, so that what was not seen is what was left out.

    Args:
      found: what `evaluate` returned after the last step, and the
        'evaluation' that it was.
      state: train state.
      frozen: frozen parameters.
      mesh: the mesh.
    """
    config, totals = self.config, dict(self.totals)
    if config.layout.name == 'pair':  # pictures take no positions of a row
      totals['visual_tokens'] = (
          totals['images'] * self.pipeline.image_layout.table_size)
    count = lambda tree: sum(math.prod(x.shape) for x in jax.tree.leaves(tree))
    with errors.writing(self.folder):
      self._writer.flush()
    stability = metrics_lib.stability(metrics_lib.read_rows(self.folder))
    scores = dict(found['scores'])
    if 'collapsed' in stability:  # a table may have a column of it
      scores['stability/collapsed'] = stability['collapsed']
    groups = sum(source.quota for source in config.mix.values())
    drawn = config.steps * groups * config.layout.documents
    return dict(
        name=config.name, scale=config.scale, seed=config.seed,
        **found | {'scores': scores}, steps=config.steps, **totals,
        unplaced=drawn - totals['samples'],
        flops=self.flops * config.steps,
        parameters=count(state['params']) + count(frozen),
        trained_parameters=count(state['params']),
        seconds=time.perf_counter() - self._began,
        evaluation_seconds=self._evaluation_seconds,
        device=jax.devices()[0].device_kind, devices=jax.device_count(),
        mesh=dict(mesh.shape), git_revision=', '.join(self.revisions),
        stability=stability, date=datetime.date.today().isoformat())

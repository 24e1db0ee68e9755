"""Trains one run: the one loop of the project.

  python -m mmgen.train --config=quickstart:patches
  python -m mmgen.train --config=quickstart:patches --config.steps=100

Leaves in the run's folder

  config.json       the flattened config
  init_report.json  which parameters came from which other run or file
  metrics.jsonl     one row per step, for TensorBoard in tensorboard/
  checkpoints/      see `training/checkpoint.py`; frozen/ beside it
  predictions/      <evaluator>.jsonl, one line per example
  result.json       scores and accounts, written last: the run is finished
  results/          the same under earlier evaluators

A run that is finished is not run again; one that was cut off goes on from its
last complete checkpoint, bit for bit as if nothing had happened. One whose
evaluators have changed is scored again, not trained again.
"""

import argparse
import contextlib
import functools
import inspect
import logging
import signal
import sys
import threading

from etils import epath
import jax
from jax.experimental import multihost_utils
import numpy as np

from mmgen import config as config_lib
from mmgen import errors
from mmgen import evaluators as evaluators_lib
from mmgen.data import pipeline as pipeline_lib
from mmgen.objectives import alignment
from mmgen.objectives import common
from mmgen.objectives import contrastive
from mmgen.objectives import next_token
from mmgen.training import checkpoint
from mmgen.training import inherit
from mmgen.training import metrics as metrics_lib
from mmgen.training import optimizer as optimizer_lib
from mmgen.training import run as run_lib
from mmgen.training import sharding
from mmgen.training import step as step_lib

_log = logging.getLogger(__name__)


def train(config, folder, data_dir, parents=None) -> dict:
  """Trains one run, or the rest of it.

  Args:
    config: locked config of the run.
    folder: of the run.
    data_dir: folder of the prepared corpora.
    parents: {part: run folder or weights} that `config.init` stands for.

  Returns:
    The content of `result.json`.

  Raises:
    UserError: a mistake in the config, a folder that cannot be written, or a
      loss that is not finite; nothing that was saved is lost.
    SystemExit: after SIGTERM, with everything saved.
  """
  folder = epath.Path(folder)
  evaluation = config_lib.evaluation_key(config, data_dir)
  finished = run_lib.read_result(folder, evaluation)
  if finished:
    return finished

  # --------------------------------------------------------------- mesh, data
  mesh = sharding.make_mesh(config.mesh)
  pipeline = pipeline_lib.open_pipeline(
      config, data_dir, config_lib.image_layout(config), jax.process_index(),
      jax.process_count())
  example = _example(config, mesh, pipeline)

  # ------------------------------------------------- model, objective, scores
  model = config_lib.build_model(config, pipeline.tokenizer.vocab_size)
  objective = build_objective(config, model)
  evaluators = evaluators_lib.build(
      config.evaluators, evaluators_lib.Context(
          config=config, model=model, tokenizer=pipeline.tokenizer,
          image_layout=pipeline.image_layout, data_dir=data_dir))

  # ------------------------------------- optimizer, parameters, last checkpoint
  birth, optimizer = plan_birth(config, model, objective, example)
  state, frozen = sharding.init_sharded(
      mesh, birth, common.purpose_key(jax.random.key(config.seed), 'init'))
  step = step_lib.make_train_step(
      objective, optimizer, config, jax.tree.map(lambda x: x.sharding, state))
  # All is checked before the first write: what cannot start leaves no folder,
  # and a folder keeps its config until its checkpoint is known to fit.
  checkpointer, state, frozen, extras = _start(
      config, folder, mesh, pipeline.tokenizer, state, frozen, parents or {})
  run_lib.write_json(folder / 'config.json', config_lib.flatten(config))
  frozen = optimizer_lib.cast(frozen, config.dtype)

  # --------------------------------------------------------------------- loop
  run = run_lib.Run(
      config, config_lib.flatten(config), folder, pipeline,
      functools.partial(evaluators_lib.run_all, evaluators), checkpointer,
      extras)
  with run:
    state = _loop(run, step, state, frozen, mesh, example)

  # ----------------------------------------------------------- scores, result
  found = run.evaluate(config.steps, state, frozen)
  result = run.result(found | {'evaluation': evaluation}, state, frozen, mesh)
  run.close()
  run_lib.write_result(folder, result)
  return result


def _example(config, mesh, pipeline):
  """Returns the first batch of this process.

  Raises:
    UserError: its rows cannot be shared out, or a source has nothing to learn.
  """
  example = pipeline.batch(0)
  sharding.check_rows(mesh, example, config.optimizer.accumulate)
  for source, arrays in example.items():
    learned = arrays.get('weights', arrays.get('example_valid'))
    if not learned.any():
      raise errors.UserError(
          f'source {source!r} has nothing to learn in the first step: none of '
          f'its {config.layout.documents} documents could be read, has a '
          f'target and fits in config.layout.length={config.layout.length} '
          'slots. python -m mmgen.look shows what became of them; if none '
          'could be read, the corpus is damaged, and python -m mmgen.prepare '
          'makes it again.')
  return example


def build_objective(config, model):
  """Makes the objective that `config.objective` names.

  Raises:
    UserError: a wrong name or field, or a layout or model that does not fit.
  """
  fields = dict(config.objective.items())
  name = fields.pop('name')
  if name not in OBJECTIVES:
    raise errors.UserError(
        f'config.objective.name is {name!r}; allowed: '
        f'{", ".join(OBJECTIVES)}.')
  build, layout, model_name = OBJECTIVES[name]
  for field, found, wanted in (
      ('layout.name', config.layout.name, layout),
      ('model.name', config.model.name, model_name)):
    if found != wanted:
      raise errors.UserError(
          f'config.objective.name is {name!r} and config.{field} is {found!r}; '
          f'this objective goes with {wanted!r}.')
  known = list(inspect.signature(build).parameters)[1:]  # behind the model
  for field in fields:
    if field not in known:
      raise errors.UserError(
          f'config.objective has no field {field!r}.'
          f'{errors.nearest(field, known)} {name!r} has: {", ".join(known)}.')
  try:
    return build(model, **fields)
  except (TypeError, ValueError) as error:
    raise errors.UserError(f'config.objective: {error}') from error


def plan_birth(config, model, objective, example):
  """Says how the train state of a run comes into being.

  Args:
    config: of the run.
    model: the module.
    objective: of `build_objective`.
    example: a batch, or its shapes.

  Returns:
    (birth, optimizer): birth(key) -> (train state, frozen parameters).
  """
  # Any source with pictures creates every parameter; one row is enough.
  source = max(example.values(), key=lambda arrays: 'images' in arrays)
  row = jax.tree.map(lambda x: np.zeros((1, *x.shape[1:]), x.dtype), source)

  def variables(key):
    found = dict(model.init(key, row))
    own = getattr(objective, 'init', lambda key: {})(
        common.purpose_key(key, 'objective'))
    return {**found.pop('params'), **own}, found

  groups = config.optimizer.groups
  params, _ = jax.eval_shape(variables, jax.random.key(0))
  optimizer = optimizer_lib.make_optimizer(
      config.optimizer, config.steps, optimizer_lib.split(params, groups)[0])

  def birth(key):
    params, state = variables(key)
    trained, frozen = optimizer_lib.split(params, groups)
    return step_lib.init_state(trained, optimizer, state), frozen

  return birth, optimizer


def _start(config, folder, mesh, tokenizer, state, frozen, parents):
  """Goes on from the last checkpoint, or takes over parts of others.

  Returns:
    (checkpointer, train state, frozen parameters as exact as they are stored,
    what was saved beside the train state: {} for a fresh start).
  """
  if checkpoint.latest_step(folder) is not None:
    checkpointer = checkpoint.Checkpointer(folder)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=x.sharding), state)
    state, extras = checkpointer.restore(abstract)
    _log.info('%s: restored after step %d', folder.name, extras['step'])
    return checkpointer, state, checkpoint.load_frozen(folder, mesh), extras
  names = {**sharding.named_leaves(state['params']),
           **sharding.named_leaves(frozen)}
  inherit.check_vocabulary(names, parents, tokenizer)
  names, report = inherit.inherit(
      names, parents, mesh, config_lib.source_parts(config),
      _part_configs(config, tokenizer.vocab_size))
  take = lambda name, _: names[name]
  state = {**state, 'params': sharding.map_named(take, state['params'])}
  frozen = sharding.map_named(take, frozen)
  checkpointer = checkpoint.Checkpointer(folder)
  if report:
    run_lib.write_json(folder / 'init_report.json', report)
  if frozen:
    checkpoint.save_frozen(folder, frozen)
  return checkpointer, state, frozen, {}


def _part_configs(config, vocab):
  """Returns {part: config of its module}, of the model and its teacher."""
  model = config_lib.build_model(config, vocab)
  teacher = getattr(build_objective(config, model), 'teacher', None)
  return vars(model.config) | ({'teacher': teacher.config} if teacher else {})


def _loop(run, step, state, frozen, mesh, example):
  """Takes all steps that are left.

  The metrics of a step are fetched after the next one is on its way, so that
  the device never waits; `step` itself refuses what is not finite and all
  that follows.

  Args:
    run: keeps the books.
    step: of `make_train_step`.
    state: train state, donated.
    frozen: frozen parameters in compute dtype.
    mesh: the mesh.
    example: any batch of this process, for its shapes.

  Returns:
    The train state after the last step.
  """
  config = run.config
  with jax.set_mesh(mesh):
    traced = step.trace(state, frozen, sharding.shard_batch(mesh, example))
  run.flops = metrics_lib.count_flops(
      metrics_lib.live(traced.jaxpr))
  batches = run.pipeline.iterate(run.start)
  late = []  # metrics that are still to be fetched
  with _terminated() as terminated:
    for done in range(run.start + 1, config.steps + 1):
      batch = sharding.shard_batch(mesh, next(batches))
      with jax.set_mesh(mesh), jax.transfer_guard('disallow'):
        state, metrics = step(state, frozen, batch)
      late.append((done, metrics))
      stop = terminated(done)
      score = config.eval_every and done % config.eval_every == 0
      save = stop or done == config.steps or (
          done % config.checkpoint_every == 0)
      try:
        while len(late) > (0 if score or save else 1):
          run.record(*late.pop(0))
      except run_lib.NotFinite as error:
        run.give_up(error, state)
      if score:
        run.evaluate(done, state, frozen)
      if save:
        run.save(done, state)
      if stop:
        run.stop(done)
  return state


@contextlib.contextmanager
def _terminated():
  """Yields a function of the step that says whether SIGTERM has come.

  Several processes agree on the step through jax, which then owns the signal.
  """
  if jax.process_count() > 1:
    yield multihost_utils.reached_preemption_sync_point
    return
  asked = threading.Event()
  if threading.current_thread() is not threading.main_thread():
    yield lambda step: False  # a notebook's thread gets no signals
    return
  before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
  try:
    yield lambda step: asked.is_set()
  finally:
    signal.signal(signal.SIGTERM, before)


# How to make it, and the names of the layout and the model that it goes with.
OBJECTIVES = {
    'next_token': (next_token.NextToken, 'sequence', 'multimodal'),
    'alignment': (alignment.build, 'sequence', 'multimodal'),
    'contrastive': (contrastive.Contrastive, 'pair', 'clip'),
}


# ---------------------------------------------------------------------------
# Command


def parent_folders(config, workdir, data_dir) -> dict[str, epath.Path]:
  """Finds the finished runs and files that `config.init` names.

  Raises:
    UserError: a parent has not been trained.
  """
  found = config_lib.files(config)
  for part, (address, seed) in config_lib.parents(config).items():
    parent = config_lib.load(address, config.scale, seed=seed)
    found[part] = config_lib.run_folder(parent, workdir, data_dir)
    if not (found[part] / 'result.json').exists():
      raise errors.UserError(
          f'config.init.{part} starts from {address}, seed {seed}, which is '
          f'not finished in {workdir}. Train it first: python -m mmgen.train '
          f'--config={address} --scale={config.scale} --seed={seed}; '
          'mmgen.table does so by itself.')
  return found


def main(argv=None):
  """Reads the command line and trains."""
  parser = argparse.ArgumentParser(
      prog='python -m mmgen.train', description='Trains one run.',
      allow_abbrev=False)
  config_lib.add_arguments(parser)
  args, unknown = parser.parse_known_args(argv)
  logging.basicConfig(format='%(message)s', force=True)
  logging.getLogger('mmgen').setLevel(logging.INFO)
  config = config_lib.from_arguments(args, unknown)
  folder = config_lib.run_folder(config, args.workdir, args.data_dir)
  parents = parent_folders(config, args.workdir, args.data_dir)
  result = train(config, folder, args.data_dir, parents)
  for name, value in result['scores'].items():
    print(f'{name:32} {value:.4f}')
  print(f'{folder}: {result["steps"]} steps in {result["seconds"]:.0f} s')


if __name__ == '__main__':
  errors.run(lambda: main(sys.argv[1:]))

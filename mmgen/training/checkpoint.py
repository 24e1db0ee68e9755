"""mmgen's own checkpoints: save, restore onto any mesh, read parameters.

  <run>/checkpoints/<step>/state      train state, by flat names
  <run>/checkpoints/<step>/extras     config, accounts, git revision
  <run>/checkpoints/<step>/tokenizer  the serialised tokenizer
  <run>/frozen                        frozen parameters, stored once, exact

Arrays are stored under names ('params/decoder/...'), so a reader needs neither
the model nor the optimizer, and a difference can be told by name.
"""

import base64
import contextlib
import difflib
import functools
import logging
import pathlib
import subprocess
import sys

from etils import epath
import flax.traverse_util
import jax
import numpy as np
import orbax.checkpoint as ocp

from mmgen import errors
from mmgen.training import sharding

# Differences named in one error.
_MOST_NAMED = 12


@functools.cache
def git_revision() -> str:
  """Returns the commit of the running code, '+' if changed, or 'unknown'."""
  here = pathlib.Path(__file__).parent

  def git(*args):
    return subprocess.run(['git', '-C', str(here), *args], text=True,
                          capture_output=True, check=True).stdout.strip()
  try:
    tracked = git('ls-files', '--error-unmatch', __file__)
    return git('rev-parse', 'HEAD') + (
        '+' if tracked and git('status', '--porcelain', '-uno') else '')
  except (OSError, subprocess.CalledProcessError):
    return 'unknown'


def _not_of_orbax(record):
  """Drops orbax's own log: its failures are raised, and reported once."""
  return 'orbax' not in record.pathname


logging.getLogger('absl').addFilter(_not_of_orbax)


@functools.cache
def _report_failures_once():
  """Keeps the arrays that fail after the first one from a traceback each.

  orbax raises what befell the first array of a save, which is reported, and
  closes its event loop; the others find it closed when they end, in threads
  that nobody waits for.
  """
  before = sys.unraisablehook

  def hook(found):
    late = isinstance(found.exc_value, RuntimeError) and (
        str(found.exc_value) == 'Event loop is closed')
    if not late:
      before(found)

  sys.unraisablehook = hook


# ---------------------------------------------------------------------------
# Trees by name


def _nest(flat):
  return flax.traverse_util.unflatten_dict(flat, sep='/')


def _describe(leaf):
  return f'{list(leaf.shape)} {np.dtype(leaf.dtype).name}'


def compare(wanted, stored, what: str):
  """Raises one UserError that lists how two trees differ.

  Args:
    wanted: {name: array or ShapeDtypeStruct} that the model has.
    stored: the same for the checkpoint.
    what: named in the error.
  """
  lines = []
  for name in sorted(wanted.keys() | stored.keys()):
    if name not in stored:
      near = difflib.get_close_matches(name, stored.keys() - wanted.keys(), 1)
      lines.append(f'{name} {_describe(wanted[name])} is missing there' + (
          f' (nearest: {near[0]} {_describe(stored[near[0]])})' if near else
          ''))
    elif name not in wanted:
      lines.append(f'{name} {_describe(stored[name])} is only there')
    elif _describe(wanted[name]) != _describe(stored[name]):
      lines.append(f'{name} is {_describe(stored[name])} there, '
                   f'{_describe(wanted[name])} here')
  if lines:
    more = len(lines) - _MOST_NAMED
    raise errors.UserError(
        f'{what} is of another model: {"; ".join(lines[:_MOST_NAMED])}'
        f'{f"; and {more} more" if more > 0 else ""}. Use the config it was '
        'trained with, or another --workdir.')


def _restore_args(wanted):
  """Asks for some of the stored arrays, given as {name: ShapeDtypeStruct}."""
  tree = _nest(wanted)
  return ocp.args.PyTreeRestore(
      tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree),
      partial_restore=True)


def _manager(folder, **options):
  return ocp.CheckpointManager(
      epath.Path(folder).absolute() / 'checkpoints',
      item_handlers=dict(state=ocp.PyTreeCheckpointHandler(),
                         extras=ocp.JsonCheckpointHandler(),
                         tokenizer=ocp.JsonCheckpointHandler()),
      options=ocp.CheckpointManagerOptions(**options))


def _stored(manager, step):
  """Returns {name: what has a shape and a dtype} of a saved train state."""
  return sharding.named_leaves(manager.item_metadata(step)['state'].tree)


def _place(leaf, layout):
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout)


def _abstract(stored, mesh):
  """Adds to {name: array} where it shall live: by the rules of a mesh."""
  if mesh is None:
    layout = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return {name: _place(leaf, layout) for name, leaf in stored.items()}
  tree = {name: _place(leaf, None) for name, leaf in stored.items()}
  layouts = sharding.shardings(mesh, tree)
  return {name: _place(leaf, layouts[name]) for name, leaf in tree.items()}


# ---------------------------------------------------------------------------
# One run's checkpoints


def latest_step(folder) -> int | None:
  """Returns the newest complete step in a run's folder, or None."""
  path = epath.Path(folder) / 'checkpoints'
  return max(ocp.utils.checkpoint_steps(path), default=None) if (
      path.exists()) else None


class Checkpointer:
  """Saves and restores the train states of one run."""

  def __init__(self, folder):
    """Opens, and creates if needed, `<folder>/checkpoints`.

    Raises:
      UserError: the folder cannot be written.
    """
    _report_failures_once()
    self._folder = epath.Path(folder)
    with errors.writing(self._folder):
      (self._folder / 'checkpoints').mkdir(parents=True, exist_ok=True)
      self._manager = _manager(self._folder, max_to_keep=2,
                               cleanup_tmp_directories=True)

  def latest(self) -> int | None:
    """Returns the newest complete step, or None."""
    return self._manager.latest_step()

  def save(self, step: int, state, extras: dict, tokenizer: bytes):
    """Starts to save; arrays may be donated once this returns.

    Args:
      step: number of updates behind the state.
      state: the train state.
      extras: what JSON can hold.
      tokenizer: the serialised tokenizer.

    Raises:
      UserError: this save, or the one before it, could not be written. The
        last complete checkpoint is untouched.
    """
    with errors.writing(self._folder):
      self._manager.save(step, args=ocp.args.Composite(
          state=ocp.args.PyTreeSave(_nest(sharding.named_leaves(state))),
          extras=ocp.args.JsonSave(
              {**extras, 'step': step, 'git_revision': git_revision()}),
          tokenizer=ocp.args.JsonSave(
              {'model': base64.b64encode(tokenizer).decode()})))

  def restore(self, abstract, step: int | None = None):
    """Reads a train state.

    Args:
      abstract: the train state as ShapeDtypeStructs with shardings of the
        present mesh, which need not be the one it was saved on.
      step: by default the newest.

    Returns:
      (state, extras).

    Raises:
      UserError: the checkpoint is of another model.
    """
    step = self.latest() if step is None else step
    wanted = sharding.named_leaves(abstract)
    compare(wanted, _stored(self._manager, step),
            f'the checkpoint {self._folder}/checkpoints/{step}')
    found = self._manager.restore(step, args=ocp.args.Composite(
        state=_restore_args(wanted), extras=ocp.args.JsonRestore()))
    flat = sharding.named_leaves(found['state'])
    leaves = [flat[name] for name in wanted]
    return (jax.tree.unflatten(jax.tree.structure(abstract), leaves),
            found['extras'])

  def wait(self):
    """Returns once everything is on disk.

    Raises:
      UserError: it could not be written.
    """
    with errors.writing(self._folder):
      self._manager.wait_until_finished()

  def close(self):
    with errors.writing(self._folder):
      self._manager.close()


# ---------------------------------------------------------------------------
# Frozen parameters


def save_frozen(folder, frozen):
  """Stores the frozen parameters of a run, once, before its first step."""
  with errors.writing(folder), ocp.PyTreeCheckpointer() as checkpointer:
    checkpointer.save(epath.Path(folder).absolute() / 'frozen',
                      _nest(sharding.named_leaves(frozen)), force=True)


def load_frozen(folder, mesh=None, part: str | None = None):
  """Returns the frozen parameters of a run as a nested dict, {} if none."""
  path = epath.Path(folder).absolute() / 'frozen'
  if not path.exists():
    return {}
  with ocp.PyTreeCheckpointer() as checkpointer:
    stored = checkpointer.metadata(path).item_metadata.tree
    wanted = _abstract(_only(sharding.named_leaves(stored), part), mesh)
    if not wanted:
      return {}
    return checkpointer.restore(path, args=_restore_args(wanted))


# ---------------------------------------------------------------------------
# Reading a run from its folder


def _only(names, part):
  return {name: leaf for name, leaf in names.items()
          if part is None or name.split('/')[0] == part}


@contextlib.contextmanager
def _open(folder):
  """Opens a run's checkpoints for reading, with the newest step."""
  if not (epath.Path(folder) / 'checkpoints').exists():
    raise errors.UserError(
        f'{folder} is no run folder: it has no checkpoints/. Train it first '
        'with python -m mmgen.train.')
  manager = _manager(folder, read_only=True)
  try:
    step = manager.latest_step()
    if step is None:
      raise errors.UserError(
          f'{folder} holds no complete checkpoint yet; run python -m '
          'mmgen.train again.')
    yield manager, step
  finally:
    manager.close()


def load_params(folder, part: str | None = None, mesh=None):
  """Reads the parameters of a run, trained and frozen, without its optimizer.

  Args:
    folder: of the run.
    part: a top-level name, such as 'decoder'; None for all.
    mesh: lays them out by the rules of `sharding`; None for one device.

  Returns:
    Nested dict of float32 arrays of the newest checkpoint.

  Raises:
    UserError: no checkpoint, or no such part.
  """
  with _open(folder) as (manager, step):
    params = {name.removeprefix('params/'): leaf
              for name, leaf in _stored(manager, step).items()
              if name.startswith('params/')}
    parts = {name.split('/')[0] for name in params}
    wanted = _abstract(_only(params, part), mesh)
    found = {}
    if wanted:
      args = _restore_args({f'params/{k}': v for k, v in wanted.items()})
      found = manager.restore(step, args=ocp.args.Composite(state=args))
      found = found['state']['params']
  frozen = load_frozen(folder, mesh, part)
  if not found and not frozen:
    raise errors.UserError(
        f'{folder} has no part {part!r}; its trained parts: '
        f'{", ".join(sorted(parts))}.')
  return _nest({**sharding.named_leaves(found),
                **sharding.named_leaves(frozen)})


def parts(folder) -> set[str]:
  """Returns the top-level names of a run's parameters, frozen ones too."""
  with _open(folder) as (manager, step):
    names = {name.split('/')[1] for name in _stored(manager, step)
             if name.startswith('params/')}
  path = epath.Path(folder).absolute() / 'frozen'
  if path.exists():
    with ocp.PyTreeCheckpointer() as checkpointer:
      stored = checkpointer.metadata(path).item_metadata.tree
    names |= {name.split('/')[0] for name in sharding.named_leaves(stored)}
  return names


def load_extras(folder) -> dict:
  """Returns what was saved beside the newest state: config, accounts, ..."""
  with _open(folder) as (manager, step):
    args = ocp.args.Composite(extras=ocp.args.JsonRestore())
    return manager.restore(step, args=args)['extras']


def tokenizer_bytes(folder) -> bytes:
  """Returns the serialised tokenizer that a run was trained with."""
  with _open(folder) as (manager, step):
    args = ocp.args.Composite(tokenizer=ocp.args.JsonRestore())
    found = manager.restore(step, args=args)['tokenizer']
  return base64.b64decode(found['model'])

"""The mesh, and how parameters and batches are laid over it.

A parameter's layout follows from the end of its name and from its last axes,
so neither the layer axis of a stack nor the prefix under which a moment of the
optimizer is stored needs a rule. Models know nothing of this file; their
activations are laid out in `mmgen/partition.py`.
"""

import logging
import math
import re

import jax
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from mmgen import errors

_log = logging.getLogger(__name__)

AXES = ('data', 'fsdp', 'tensor', 'sequence')
# Axes that share out the rows of a batch.
ROWS = ('data', 'fsdp')
# A parameter of at most this many elements (4 MiB in float32) is replicated
# along an axis that does not divide; a larger one is an error.
REPLICATED_SIZE = 2**20

# (end of a parameter's name, mesh axes of its last axes). The first match with
# so many axes counts; what has none is replicated if small, an error if large.
RULES = (
    # [D, N * H] or [D, F], and their inverses
    (r'(query|key|value|gate|up)/kernel', ('fsdp', 'tensor')),
    (r'(query|key|value|gate|up)/bias', ('tensor',)),
    (r'(out|down)/kernel', ('tensor', 'fsdp')),
    # [V, D] and its inverse
    (r'embedding', ('tensor', 'fsdp')),
    (r'(head|unembed)/kernel', ('fsdp', 'tensor')),
    (r'position_embedding', (None, 'fsdp')),
    # low-rank adapters: [inputs, rank] and [rank, outputs]
    (r'lora/.*/a', ('fsdp', None)),
    (r'lora/.*/b', (None, 'fsdp')),
    # patch projections and whatever else maps to a width
    (r'kernel', (None, 'fsdp')),
    (r'(scale|bias|(class|split)_embedding|probe|queries|relative_bias|'
     r'logit_\w+)', ()),
)


def named_leaves(tree) -> dict[str, object]:
  """Returns {'a/b/0/c': leaf} for any pytree, in its own order."""
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {_name(path): leaf for path, leaf in leaves}


def map_named(function, tree, *rest):
  """Maps `function(name, leaf, *leaves)` over pytrees of one structure."""
  return jax.tree_util.tree_map_with_path(
      lambda path, *leaves: function(_name(path), *leaves), tree, *rest)


def _name(path):
  return jax.tree_util.keystr(path, simple=True, separator='/')


# ---------------------------------------------------------------------------
# Mesh


def make_mesh(config, devices=None):
  """Builds the mesh.

  Args:
    config: {axis: ways} for each of `AXES`; one of them may be -1, which
      stands for all devices that the others leave.
    devices: list of devices; by default all of them.

  Raises:
    UserError: the axes cannot share out the devices.
  """
  count = len(devices) if devices is not None else jax.device_count()
  shape = {axis: int(config[axis]) for axis in AXES}
  text = ', '.join(f'{axis}={ways}' for axis, ways in shape.items())
  free = [axis for axis, ways in shape.items() if ways == -1]
  if len(free) > 1 or any(ways < 1 and ways != -1 for ways in shape.values()):
    raise errors.UserError(
        f'config.mesh is {text}: each axis is at least 1, and at most one is '
        '-1 (the rest).')
  fixed = math.prod(ways for ways in shape.values() if ways != -1)
  if free:
    shape[free[0]] = count // fixed
  if math.prod(shape.values()) != count:
    raise errors.UserError(
        f'config.mesh is {text}, which takes '
        f'{"a multiple of " if free else ""}{fixed} devices; this run has '
        f'{count}. Set config.mesh.data=-1 and let the other axes multiply to '
        f'a divisor of {count}.')
  try:
    return jax.make_mesh(tuple(shape.values()), AXES, devices=devices,
                         axis_types=(AxisType.Auto,) * len(AXES))
  except NotImplementedError as error:  # of the links between the chips
    raise errors.UserError(
        f'config.mesh is {text}, but the links of these {count} chips cannot '
        f'be shared out so: {str(error).splitlines()[0]}') from error


# ---------------------------------------------------------------------------
# Parameters


def spec(name: str, shape, axes) -> tuple[P, str | None]:
  """Returns the layout of one array and a note if it fell short of its rule.

  Args:
    name: path of the array; only its end is looked at.
    shape: of the array; any axes before those of the rule are not split.
    axes: {mesh axis: ways}.

  Raises:
    UserError: a large array that no rule covers or no axis divides.
  """
  rule = next((axes_ for end, axes_ in RULES if len(axes_) <= len(shape)
               and re.search(rf'(^|/){end}$', name)), None)
  small = math.prod(shape) <= REPLICATED_SIZE
  if rule is None:
    if not small:
      raise errors.UserError(
          f'no rule lays out the parameter {name} {list(shape)}: add one to '
          'RULES in mmgen/training/sharding.py.')
    note = 'no rule' if len(shape) else None
    return P(), note if math.prod(axes.values()) > 1 else None
  rule = (None,) * (len(shape) - len(rule)) + rule
  notes = []
  for i, axis in enumerate(rule):
    if axis is not None and shape[i] % axes[axis]:
      notes.append(f'axis {i} of {list(shape)} is not a multiple of '
                   f'{axis}={axes[axis]}')
  if notes and not small:
    raise errors.UserError(
        f'cannot lay out the parameter {name}: {"; ".join(notes)}. Choose a '
        'mesh whose axes divide the model.')
  return P(*(None if axis is None or shape[i] % axes[axis] else axis
             for i, axis in enumerate(rule))), '; '.join(notes) or None


def shardings(mesh, tree):
  """Returns a tree of NamedShardings for parameters or a whole train state.

  Args:
    mesh: the mesh.
    tree: of arrays or ShapeDtypeStructs.

  What is replicated for want of a rule or of divisibility is logged.
  """
  replicated = []

  def one(name, leaf):
    layout, note = spec(name, leaf.shape, mesh.shape)
    if note:
      replicated.append(f'{name}: {note}')
    return NamedSharding(mesh, layout)

  result = map_named(one, tree)
  if replicated:
    _log.info('not split as their rules say:\n  %s',
                 '\n  '.join(replicated))
  return result


def init_sharded(mesh, init, *args):
  """Calls `init(*args)` so that every result is born where it belongs."""
  layout = shardings(mesh, jax.eval_shape(init, *args))
  return jax.jit(init, out_shardings=layout)(*args)


# ---------------------------------------------------------------------------
# Batches


def check_rows(mesh, batch, accumulate: int = 1):
  """Checks that the rows of each source split evenly.

  Args:
    mesh: the mesh.
    batch: {source: {name: array[R, ...]}}, the rows of this process.
    accumulate: number of microbatches of a step.

  Raises:
    UserError: devices and microbatches cannot share them evenly.
  """
  ways = math.prod(mesh.shape[axis] for axis in ROWS)
  need = ways * accumulate
  for source, arrays in batch.items():
    rows = len(next(iter(arrays.values()))) * jax.process_count()
    if rows % need:
      raise errors.UserError(
          f'source {source!r} has {rows} rows a step, which {ways} devices '
          f'(mesh {dict(mesh.shape)}) and {accumulate} microbatch(es) cannot '
          'share evenly. Choose layout.rows x quota (for pairs, '
          f'layout.documents x quota) as a multiple of {need}, such as '
          f'{-(-rows // need) * need}.')


def shard_batch(mesh, batch):
  """Lays a batch over the mesh, rows split over `ROWS`.

  Args:
    mesh: the mesh.
    batch: {source: {name: array[R, ...]}}, the rows of this process.

  Raises:
    UserError: rows that the devices cannot share evenly.
  """
  check_rows(mesh, batch)
  layout = NamedSharding(mesh, P(ROWS))
  return jax.tree.map(
      lambda x: jax.make_array_from_process_local_data(layout, np.asarray(x)),
      batch)

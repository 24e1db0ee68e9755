"""Logical names of array axes, and the mesh axes they are laid over.

Models name the axes of their activations (`constrain(x, 'batch', 'length',
'width')`) and never mention the mesh. This table is the only place where the
two meet. Parameters are laid out by name in `training/sharding.py`.
"""

import math

import jax

# Logical axis -> mesh axes (None: never split).
RULES = {
    'batch': ('data', 'fsdp'),
    'length': ('sequence',),
    'heads': ('tensor',),
    'hidden': ('tensor',),
    'vocab': ('tensor',),
    'width': None,
    'head_dim': None,
    'patches': None,
}


def constrain(x, *names):
  """Lays `x` over the current mesh; without a mesh, returns it untouched.

  Args:
    x: an array with one axis for each name.
    names: logical axes, keys of `RULES`; None for an axis never split. An
      axis that the mesh cannot split evenly (two heads over eight chips) is
      left to the compiler.

  Raises:
    ValueError: under a mesh, if a name has no rule, or a rule speaks of an
      axis that the mesh lacks.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  if len(names) != x.ndim:
    raise ValueError(f'constrain: {len(names)} names {names} for an array with '
                     f'{x.ndim} axes, shape {x.shape}.')
  spec = jax.sharding.PartitionSpec(
      *(_axes(mesh, name, size) for name, size in zip(names, x.shape)))
  return jax.lax.with_sharding_constraint(x, spec)


def local(function, slots, whole=()):
  """Applies a function to the slots that each chip has, on that chip.

  What depends on the contents of slots (how many are of a kind) can then be
  decided by each chip for itself. The compiler still splits other axes.

  Args:
    function: of `slots` and, if given, `whole`; returns arrays [B, T, ...].
    slots: arrays [B, T, ...], of which a chip gets its rows and columns.
    whole: arrays of which each chip gets all; their gradients are summed.

  Returns:
    What the function returns, of all chips together. Axes that the mesh cannot
    split evenly are not split.
  """
  arguments = (slots, whole) if whole else (slots,)
  mesh = jax.sharding.get_abstract_mesh()
  split = []
  for name, size in zip(('batch', 'length'),
                        jax.tree.leaves(slots)[0].shape):
    axes = () if mesh.empty else _axes(mesh, name, size)
    split.append(axes if isinstance(axes, tuple) else ())
  manual = {axis for axes in split for axis in axes if mesh.shape[axis] > 1}
  if not manual:
    return function(*arguments)
  spec = jax.sharding.PartitionSpec(*(axes or None for axes in split))
  everywhere = jax.sharding.PartitionSpec()
  return jax.shard_map(
      function, in_specs=(spec, everywhere)[:len(arguments)], out_specs=spec,
      axis_names=set().union(*split), check_vma=False)(*arguments)


def _axes(mesh, name, size):
  if name is None:
    return None
  if name not in RULES:
    raise ValueError(f'constrain: no rule for the logical axis {name!r}; '
                     f'known: {", ".join(RULES)}.')
  axes = RULES[name] or ()
  unknown = [axis for axis in axes if axis not in mesh.shape]
  if unknown:
    raise ValueError(f'constrain: {name!r} is laid over {unknown}, but the '
                     f'mesh has only the axes {list(mesh.shape)}.')
  ways = math.prod(mesh.shape[axis] for axis in axes)
  return jax.sharding.PartitionSpec.UNCONSTRAINED if size % ways else axes

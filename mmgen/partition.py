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

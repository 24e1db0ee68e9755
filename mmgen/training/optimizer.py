"""AdamW, groups of parameters by name, clipping, schedules.

An optimizer is a chain: clip the gradient, turn it into a direction for each
tensor, add weight decay, scale by the group's factor and by the schedule. The
factors of a parameter follow from its name and are plain numbers fixed before
the first step.
"""

import dataclasses
import difflib
import math
import re

import flax.traverse_util
import jax
import jax.numpy as jnp
import optax

from mmgen import errors
from mmgen.training import sharding


def _flatten(params):
  return flax.traverse_util.flatten_dict(params, sep='/')


def _unflatten(flat):
  return flax.traverse_util.unflatten_dict(flat, sep='/')


# ---------------------------------------------------------------------------
# Groups


@dataclasses.dataclass(frozen=True)
class Group:
  """Parameters that are trained in their own way, or not at all.

  Attributes:
    pattern: regex found anywhere in the name of a parameter.
    freeze: whether they stay as they are.
    lr_scale: factor of the learning rate.
    weight_decay: replaces the optimizer's, also where it decays nothing.
  """

  pattern: str
  freeze: bool = False
  lr_scale: float = 1.0
  weight_decay: float | None = None


def read_groups(groups) -> dict[str, Group]:
  """Returns {group: Group} of `config.optimizer.groups`.

  Raises:
    UserError: an unknown field, no pattern, or a value of a wrong type.
  """
  return {name: _read_group(f'config.optimizer.groups.{name}', entry)
          for name, entry in groups.items()}


def _read_group(where, entry):
  fields = {field.name: field for field in dataclasses.fields(Group)}
  if not hasattr(entry, 'items'):
    raise errors.UserError(
        f'{where} is {entry!r}, a value; it has the fields '
        f'{", ".join(fields)}.')
  for name, value in entry.items():
    if name not in fields:
      raise errors.UserError(
          f'{where} has no field {name!r}.{errors.nearest(name, fields)} It '
          f'has: {", ".join(fields)}.')
    kind = fields[name].type
    number = kind not in (str, bool) and type(value) is int
    if not isinstance(value, kind) and not number:
      raise errors.UserError(
          f'{where}.{name} is {value!r}; expected '
          f'{kind.__name__ if type(kind) is type else kind}.')
  if 'pattern' not in entry:
    raise errors.UserError(
        f'{where}.pattern is missing: a regular expression found in the names '
        'of its parameters.')
  return Group(**dict(entry.items()))


def assign(names, groups: dict[str, Group]) -> dict[str, str | None]:
  """Returns {parameter: name of its group, or None}.

  Args:
    names: names of parameters, such as 'decoder/blocks/mlp/up/kernel'.
    groups: of `read_groups`.

  Raises:
    UserError: a pattern that is no regex or finds nothing, or two patterns
      that find the same parameter.
  """
  names = list(names)
  found = dict.fromkeys(names)
  for group, options in groups.items():
    try:
      hits = [name for name in names if re.search(options.pattern, name)]
    except re.error as error:
      raise errors.UserError(
          f'config.optimizer.groups.{group}.pattern is '
          f'{options.pattern!r}, not a regular expression: {error}.'
      ) from None
    if not hits:
      near = difflib.get_close_matches(options.pattern, names, 3, 0.0)
      raise errors.UserError(
          f'config.optimizer.groups.{group}.pattern {options.pattern!r} '
          f'matches none of {len(names)} parameters. Nearest: '
          f'{", ".join(near)}.')
    for name in hits:
      if found[name] is not None:
        raise errors.UserError(
            f'config.optimizer.groups: {name} is in {found[name]!r} and in '
            f'{group!r}; a parameter has at most one group.')
      found[name] = group
  return found


def split(params, groups):
  """Divides parameters into trained and frozen ones.

  Args:
    params: nested dict of arrays or ShapeDtypeStructs.
    groups: `config.optimizer.groups`; those with `freeze=True` are frozen.

  Returns:
    (trained, frozen): nested dicts that share no leaf. The frozen ones are as
    exact as they came: `cast` them for the step, store them as they are.

  Raises:
    UserError: see `read_groups` and `assign`; or nothing is left to train.
  """
  flat = _flatten(params)
  groups = read_groups(groups)
  group = assign(flat, groups)
  frozen = {name for name in flat
            if group[name] and groups[group[name]].freeze}
  if len(frozen) == len(flat):
    raise errors.UserError(
        'config.optimizer.groups freezes every parameter: nothing to train.')
  return (_unflatten({k: v for k, v in flat.items() if k not in frozen}),
          _unflatten({k: v for k, v in flat.items() if k in frozen}))


def cast(params, dtype):
  """Casts floating-point leaves, as frozen parameters are in a step."""
  return jax.tree.map(
      lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating)
      else x, params)


def decays(name: str, leaf) -> bool:
  """Says whether weight decay applies by default: to matrices only.

  Norms, biases and single vectors are spared, also where a stack (everything
  below 'blocks') gives them a leading layer axis: a norm's scale is [L, D]
  there, and the bias of a query [L, N, H].
  """
  *path, last = name.split('/')
  axes = len(leaf.shape) - ('blocks' in path)
  return axes >= 2 and last not in ('scale', 'bias')


# ---------------------------------------------------------------------------
# Schedules


def make_schedule(config, steps: int):
  """Returns the learning rate as a function of the step, from 0.

  Warm-up is linear and reaches the peak in update number `warmup`; the decay
  takes the remaining steps and ends at `min_ratio` of the peak.

  Args:
    config: `schedule`, `peak_lr`, `warmup` in steps, `min_ratio`.
    steps: updates of the whole run.

  Raises:
    UserError: an unknown schedule, or a warm-up longer than the run.
  """
  if config.schedule not in SCHEDULES:
    raise errors.UserError(
        f'config.optimizer.schedule is {config.schedule!r}; allowed: '
        f'{", ".join(SCHEDULES)}.')
  if not 0 <= config.warmup < steps:
    raise errors.UserError(
        f'config.optimizer.warmup is {config.warmup} steps; a run of {steps} '
        f'steps allows 0 to {steps - 1}.')
  decay = SCHEDULES[config.schedule](
      config.peak_lr, steps - config.warmup, config.min_ratio)
  if not config.warmup:
    return decay
  warmup = lambda step: config.peak_lr * (step + 1) / config.warmup
  return optax.join_schedules([warmup, decay], [config.warmup])


# ---------------------------------------------------------------------------
# Optimizers


def adamw(config):
  """Directions of AdamW (arXiv:1711.05101), before decay and rate."""
  return optax.scale_by_adam(config.b1, config.b2, config.eps)


def decay_and_scale(config, params):
  """Adds weight decay and applies each group's factor, by name."""
  groups = {name: options
            for name, options in read_groups(config.groups).items()
            if not options.freeze}
  flat = _flatten(params)
  group = assign(flat, groups)

  def factors(name, leaf):
    options = groups[group[name]] if group[name] else Group('')
    decay = options.weight_decay
    if decay is None:
      decay = config.weight_decay if decays(name, leaf) else 0.0
    return float(decay), float(options.lr_scale)

  factor = {name: factors(name, leaf) for name, leaf in flat.items()}

  def update(updates, params):
    def one(name, update, param):
      decay, scale = factor[name]
      return scale * (update + decay * param)
    return sharding.map_named(one, updates, params)

  return optax.stateless(update)


def make_optimizer(config, steps: int, params):
  """Builds the optimizer of a run.

  Args:
    config: `config.optimizer`.
    steps: updates of the whole run.
    params: the trained parameters, or their ShapeDtypeStructs.

  Returns:
    (optax.GradientTransformation, schedule).

  Raises:
    UserError: an unknown name, a bad schedule or a bad group.
  """
  if config.name not in OPTIMIZERS:
    raise errors.UserError(
        f'config.optimizer.name is {config.name!r}; allowed: '
        f'{", ".join(OPTIMIZERS)}.')
  schedule = make_schedule(config, steps)
  return optax.chain(
      optax.clip_by_global_norm(config.clip or math.inf),
      OPTIMIZERS[config.name](config),
      decay_and_scale(config, params),
      optax.scale_by_learning_rate(schedule)), schedule


SCHEDULES = {
    'cosine': optax.cosine_decay_schedule,
    'linear': lambda peak, steps, ratio: optax.linear_schedule(
        peak, peak * ratio, steps),
    'constant': lambda peak, steps, ratio: optax.constant_schedule(peak),
}

# Each turns a gradient into a direction, one tensor at a time. One whose
# arithmetic spans a tensor (a trust ratio, a factored moment) must be mapped
# over the layer axis of stacked leaves.
OPTIMIZERS = {'adamw': adamw}

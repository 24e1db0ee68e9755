"""Optimizers: a gradient into an update, tensor by tensor.

An optimizer is a chain: clip the gradient, turn it into a direction for each
tensor, add weight decay, adapt the direction to the tensor (LAMB), scale by
the factor of its group and layer and by the schedule.
"""

import dataclasses
import math

import flax.traverse_util
import jax
import jax.numpy as jnp
import optax

from mmgen import errors
from mmgen import fields
from mmgen.training import groups as groups_lib
from mmgen.training import lamb
from mmgen.training import schedules


def _of(default=dataclasses.MISSING, **bounds):
  """A field with bounds, see `fields`."""
  return dataclasses.field(default=default, metadata=bounds)


@dataclasses.dataclass(frozen=True)
class Options:
  """The fields of `config.optimizer`; those with a default may be left out.

  Attributes:
    name: in `OPTIMIZERS`.
    peak_lr, schedule, warmup, warmup_from, min_ratio: see `schedules`.
    b1, b2, eps: how much of the two moments is kept, and what is added to the
      root of the second.
    weight_decay: of matrices; `groups.decays` says which these are.
    no_decay: regex of further parameters without it, 'position_embedding' in
      the recipes of open_clip and EVA-CLIP.
    clip: bound of the gradient's global norm, or None.
    groups: {name: fields of a `groups.Group`}.
    accumulate: microbatches of a step.
    denominators: whether a loss is averaged over the 'batch' or over each
      'microbatch' first; see `step`, which alone reads it.
    bias_correction, trust_clip, always_adapt: see `lamb`, which alone reads
      them.
  """

  name: str
  peak_lr: float = _of(least=0)
  schedule: str
  warmup: int = _of(least=0)
  b1: float = _of(least=0, below=1)
  b2: float = _of(least=0, below=1)
  eps: float = _of(least=0)
  weight_decay: float = _of(least=0)
  min_ratio: float = _of(0.0, least=0, most=1)
  warmup_from: str = 'one'
  no_decay: str | None = None
  clip: float | None = _of(None, above=0)
  groups: object = dataclasses.field(default_factory=dict)
  accumulate: int = 1
  denominators: str = 'batch'
  bias_correction: str = 'moments'
  trust_clip: tuple | None = None
  always_adapt: bool = False


def _flatten(params):
  return flax.traverse_util.flatten_dict(params, sep='/')


def _unflatten(flat):
  return flax.traverse_util.unflatten_dict(flat, sep='/')


# ---------------------------------------------------------------------------
# Trained and frozen parameters


def split(params, groups):
  """Divides parameters into trained and frozen ones.

  Args:
    params: nested dict of arrays or ShapeDtypeStructs.
    groups: `config.optimizer.groups`; those with `freeze=True` are frozen.

  Returns:
    (trained, frozen): nested dicts that share no leaf. The frozen ones are as
    exact as they came: `cast` them for the step, store them as they are.

  Raises:
    UserError: see `groups.read_groups` and `groups.assign`; or nothing is left
      to train.
  """
  flat = _flatten(params)
  groups = groups_lib.read_groups(groups)
  group = groups_lib.assign(flat, groups)
  frozen = {name for name in flat
            if group[name] and groups[group[name]].freeze}
  if len(frozen) == len(flat):
    raise errors.UserError(
        'config.optimizer.groups freezes every parameter: nothing to train.')
  return (_unflatten({k: v for k, v in flat.items() if k not in frozen}),
          _unflatten({k: v for k, v in flat.items() if k in frozen}))


def cast(params, dtype):
  """Casts floating-point leaves, as frozen parameters are in a step.

  Single numbers stay as they are: bfloat16 would make a fixed scale of 100,
  stored as its logarithm, one of 98.9.
  """
  return jax.tree.map(
      lambda x: x.astype(dtype)
      if x.ndim and jnp.issubdtype(x.dtype, jnp.floating) else x, params)


# ---------------------------------------------------------------------------
# Optimizers


def adamw(options, factors):
  """AdamW (arXiv:1711.05101): directions stay as they are."""
  del factors
  return (optax.scale_by_adam(options.b1, options.b2, options.eps),
          lambda directions, params: directions, lambda step: 1.0)


def make_optimizer(config, steps: int, params):
  """Builds the optimizer of a run.

  Args:
    config: `config.optimizer`, see `Options`.
    steps: updates of the whole run.
    params: the trained parameters, or their ShapeDtypeStructs.

  Returns:
    (optax.GradientTransformation, schedule).

  Raises:
    UserError: a wrong field or name, a bad schedule or a bad group.
  """
  options = fields.read(Options, 'config.optimizer', config)
  if options.name not in OPTIMIZERS:
    raise errors.UserError(
        f'config.optimizer.name is {options.name!r}; allowed: '
        f'{", ".join(OPTIMIZERS)}.')
  schedule = schedules.make_schedule(options, steps)
  factors = groups_lib.find_factors(
      _flatten(params), groups_lib.read_groups(options.groups),
      options.weight_decay, options.no_decay)
  direction, adapt, correction = OPTIMIZERS[options.name](options, factors)

  def finish(updates, params):
    updates, params = _flatten(updates), _flatten(params)
    updates = adapt({name: update + factors[name].decay * params[name]
                     for name, update in updates.items()}, params)
    return _unflatten({
        name: jnp.asarray(factors[name].rate, update.dtype) * update
        for name, update in updates.items()})

  rate = lambda step: schedule(step) * correction(step)
  return optax.chain(
      optax.clip_by_global_norm(options.clip or math.inf), direction,
      optax.stateless(finish), optax.scale_by_learning_rate(rate)), schedule


# Each makes of its options and of {parameter: `groups.Factors`}
#   a transformation from gradients to directions, one tensor at a time;
#   adapt({name: direction}, {name: parameter}) -> {name: direction}, which
#     takes in a whole tensor and so must see a stacked leaf as L tensors;
#   a factor of the learning rate, as a function of the step.
OPTIMIZERS = {'adamw': adamw, 'lamb': lamb.lamb}

"""LAMB: Adam whose step is as long as the tensor that it moves.

The direction of Adam, with weight decay, is scaled by the tensor's trust ratio
|w| / |direction| (arXiv:1904.00962, algorithm 2). A leaf of a stack, [L, ...],
is L tensors with a trust ratio each; and where a reference keeps query, key
and value in one matrix, several leaves are one tensor (`Group.fused`).

A trust ratio undoes whatever scales a direction before it. So it matters where
the bias correction stands, and two forms are in use:

  'moments'  the moments are corrected, then the direction is scaled (the
             paper; training/lamb.py of baaivision/EVA, after NVIDIA's)
  'rate'     the direction is that of the plain moments, with epsilon added to
             their plain root, and the correction multiplies the learning rate
             (DeepSpeed's fused kernel, with which EVA-CLIP was trained)
"""

import collections
import math

import jax
import jax.numpy as jnp
import optax

from mmgen import errors


def lamb(config, factors):
  """Returns the parts of LAMB, for `optimizer.OPTIMIZERS`.

  Args:
    config: `b1`, `b2`, `eps`; `bias_correction`; `trust_clip`, the (lowest,
      highest) trust ratio or None; `always_adapt`, whether tensors without
      weight decay have a trust ratio, too.
    factors: {name: `optimizer.Factors`}.

  Returns:
    (optax transformation from gradients to directions,
     adapt({name: direction}, {name: parameter}) -> {name: direction},
     factor of the learning rate as a function of the step).

  Raises:
    UserError: a wrong `bias_correction` or `trust_clip`.
  """
  adam = optax.scale_by_adam(config.b1, config.b2, config.eps)
  if config.bias_correction == 'moments':
    return adam, _adapt(config, factors), lambda step: 1.0
  if config.bias_correction != 'rate':
    raise errors.UserError(
        f'config.optimizer.bias_correction is {config.bias_correction!r}; '
        'allowed: moments, rate.')

  def update(updates, state, params=None):
    _, state = adam.update(updates, state, params)
    return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + config.eps),
                        state.mu, state.nu), state

  def correction(step):
    return (jnp.sqrt(1 - config.b2 ** (step + 1))
            / (1 - config.b1 ** (step + 1)))

  return (optax.GradientTransformation(adam.init, update),
          _adapt(config, factors), correction)


def _adapt(config, factors):
  """Returns the function that scales directions by their trust ratios.

  Parameters that are all zero have a trust ratio of 1.
  """
  low, high = _limits(config.trust_clip)
  tensors = collections.defaultdict(list)
  for name, factor in factors.items():
    if config.always_adapt or factor.decay:
      tensors[factor.tensor].append(name)

  def adapt(directions, params):
    scaled = dict(directions)
    for names in tensors.values():
      size, length = (jnp.sqrt(sum(
          _square(leaves[name], factors[name].stacked) for name in names))
                      for leaves in (params, directions))
      ratio = jnp.clip(size / jnp.where(length > 0, length, 1), low, high)
      ratio = jnp.where(size > 0, ratio, 1)
      for name in names:
        x = directions[name]
        scaled[name] = x * ratio.reshape(*ratio.shape,
                                         *[1] * (x.ndim - ratio.ndim))
    return scaled

  return adapt


def _square(x, stacked):
  """Sum of squares of all elements, or [L] of each layer's."""
  return jnp.sum(x * x, axis=tuple(range(int(stacked), x.ndim)))


def _limits(clip):
  """Returns (lowest, highest) trust ratio."""
  if clip is None:
    return 0.0, math.inf
  numbers = [x for x in clip if isinstance(x, (int, float))]
  if len(clip) != 2 or len(numbers) != 2 or not 0 <= clip[0] <= clip[1]:
    raise errors.UserError(
        f'config.optimizer.trust_clip is {tuple(clip)}; allowed: None, or the '
        'lowest and the highest trust ratio in this order, such as '
        '(0.01, 10).')
  return clip

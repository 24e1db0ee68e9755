"""Contrastive objectives: each image against every caption of the step.

All sources of a step form one batch: a caption of one source is a negative
for the images of another. Equal captions count as negatives of each other's
images, as in the references. A record that could not be read
(`example_valid` False) is taken out of the rows, the columns and the count.

Examples are coupled: the loss of a batch is not the sum of the losses of its
parts, so microbatches cannot simply be added up. `gradient_cache` computes
the exact gradient of the whole batch while it holds the activations of one
part only.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from mmgen import partition
from mmgen.models import transformer
from mmgen.models import vision_encoder
from mmgen.objectives import common


def softmax_loss(image_BE, text_BE, scale, bias, valid_B):
  """Symmetric softmax cross-entropy (CLIP, arXiv 2103.00020, figure 3).

  Args:
    image_BE: normalised image embeddings, float32.
    text_BE: normalised caption embeddings, float32; row i belongs to image i.
    scale: factor of the cosines, the inverse temperature.
    bias: not used; a constant does not change a softmax.
    valid_B: False rows are neither examples nor negatives.

  Returns:
    (sum over examples of half of both cross-entropies, logits_BB of images
    against captions).
  """
  del bias
  logits_BB = _logits(image_BE, text_BE, scale)
  by_image_B = _cross_entropy(logits_BB, valid_B, axis=1)
  by_text_B = _cross_entropy(logits_BB, valid_B, axis=0)
  return jnp.sum(by_image_B + by_text_B) / 2, logits_BB


def sigmoid_loss(image_BE, text_BE, scale, bias, valid_B):
  """Pairwise sigmoid loss (SigLIP, arXiv 2303.15343, section 3.2).

  Every pair is a binary question of its own: sum over all captions, and mean
  over images only.

  Args:
    image_BE: normalised image embeddings, float32.
    text_BE: normalised caption embeddings, float32.
    scale: factor of the cosines.
    bias: added to every logit; starts at -10 since most pairs are negative.
    valid_B: pairs with a False member do not count.

  Returns:
    (sum over pairs, logits_BB of images against captions).
  """
  logits_BB = _logits(image_BE, text_BE, scale) + bias
  sign_BB = 2 * jnp.eye(valid_B.size) - 1
  loss_BB = jax.nn.softplus(-sign_BB * logits_BB)
  pairs_BB = valid_B[:, None] & valid_B[None, :]
  return jnp.sum(loss_BB, where=pairs_BB), logits_BB


def _logits(image_BE, text_BE, scale):
  logits_BB = scale * jnp.einsum(
      'BE,CE->BC', image_BE, text_BE, precision='highest')
  # Rows stay where their images are; columns are gathered.
  return partition.constrain(logits_BB, 'batch', None)


def _cross_entropy(logits_BB, valid_B, axis):
  """Cross-entropy of the diagonal against one axis; 0 where not valid."""
  negatives = jnp.expand_dims(valid_B, 1 - axis)
  norm_B = jax.nn.logsumexp(logits_BB, axis, where=negatives)
  return jnp.where(valid_B, norm_B - jnp.diagonal(logits_BB), 0.0)


@dataclasses.dataclass(frozen=True, eq=False)
class Contrastive:
  """Trains a model with two towers to tell matching pairs from others.

  Attributes:
    model: a `models.clip.Clip`.
    loss: name in `LOSSES`.
    coefficients: {'contrastive': factor of the loss}.
  """

  model: Any
  loss: str = 'softmax'
  coefficients: dict[str, float] = dataclasses.field(
      default_factory=lambda: {'contrastive': 1.0})

  names = ('contrastive',)
  coupled = True

  def __post_init__(self):
    if self.loss not in LOSSES:
      raise ValueError(f'objective.loss is {self.loss!r}; allowed: '
                       f'{", ".join(LOSSES)}.')

  def weights(self, batch):
    """Returns the number of examples that can be used."""
    return {'contrastive': jnp.sum(_valid(batch), dtype=jnp.float32)}

  def __call__(self, params, frozen, state, batch, rng, step):
    del step  # `rng` is of this step
    features = self.encode(params, frozen, self.draw(batch, rng))
    sums, aux = self.couple(params, frozen, features, batch)
    return sums, (state, aux)

  def draw(self, batch, rng):
    """Draws what training draws, for each example by its place in the batch.

    Done for the whole batch, before it is cut into parts or laid over devices,
    so that neither changes a draw.

    Args:
      batch: {source: arrays}, all examples of the step.
      rng: the key of the step; not read if the model draws nothing.

    Returns:
      The batch with the patches that are kept, 'kept', and the factors of the
      branches of the image tower, 'factors', if any are left out.
    """
    vision = self.model.config.vision
    draws = {}  # {what it is called: (field that asks for it, how to draw)}
    if vision.patch_dropout:
      draws['kept'] = 'patch_dropout', functools.partial(
          vision_encoder.draw_patches, vision)
    if vision.drop_path:
      draws['factors'] = 'drop_path', functools.partial(
          transformer.draw_branches, vision.stack)
    if not draws:
      return batch
    if rng is None:
      field, _ = next(iter(draws.values()))
      raise ValueError(f'model.vision.{field} is {getattr(vision, field)}, but '
                       'there is no random key to draw with.')
    def drawn(source, count, field, draw):
      keys_B = jax.vmap(jax.random.fold_in, (None, 0))(
          common.purpose_key(rng, f'{field}/{source}'), jnp.arange(count))
      return draw(keys_B)
    return {source: arrays | {
        name: drawn(source, len(arrays['images']), *draw)
        for name, draw in draws.items()} for source, arrays in batch.items()}

  def encode(self, params, frozen, batch):
    """The part of the loss in which examples are independent.

    Returns:
      {source: (image_BE, text_BE)}, normalised and in float32.
    """
    variables = {'params': common.merge(params, frozen)}
    return {source: self.model.apply(variables, arrays)[0]
            for source, arrays in batch.items()}

  def couple(self, params, frozen, features, batch):
    """The rest of the loss, from the embeddings of the whole batch.

    Args:
      params: trained parameters; of these only the temperature is read.
      frozen: fixed parameters.
      features: what `encode` returned.
      batch: {source: arrays}, for the valid examples.

    Returns:
      ({'contrastive': (sum, weight)}, scalars for the log).
    """
    variables = {'params': common.merge(params, frozen)}
    scale, bias = self.model.apply(variables, method='temperature')
    pairs = [features[source] for source in sorted(features)]
    image_BE, text_BE = (jnp.concatenate(x) for x in zip(*pairs))
    valid_B = _valid(batch)
    total, logits_BB = LOSSES[self.loss](
        image_BE, text_BE, scale, bias, valid_B)
    weight = jnp.sum(valid_B, dtype=jnp.float32)
    return {'contrastive': (total, weight)}, {
        'logit_scale': scale,
        **_accuracies(jax.lax.stop_gradient(logits_BB), valid_B)}

  def project(self, params):
    """Returns `params` with the temperature back in its allowed range.

    To be applied after each optimizer step, as the references do; a clamp
    inside the loss would leave the parameter without a gradient for ever once
    it is outside.
    """
    limit = self.model.config.logit_scale_max
    if limit is None or 'logit_scale' not in params:  # free, or frozen
      return params
    return {**params,
            'logit_scale': jnp.clip(params['logit_scale'], 0.0, limit)}


def _valid(batch):
  return jnp.concatenate(
      [batch[source]['example_valid'] for source in sorted(batch)])


def _accuracies(logits_BB, valid_B):
  """How often the own partner scores highest, among valid ones."""
  own_B = jnp.arange(valid_B.size)
  count = jnp.maximum(jnp.sum(valid_B), 1)
  def share(axis):
    negatives = jnp.expand_dims(valid_B, 1 - axis)
    best_B = jnp.argmax(jnp.where(negatives, logits_BB, -jnp.inf), axis)
    return jnp.sum((best_B == own_B) & valid_B) / count
  return {'accuracy/image_to_text': share(1),
          'accuracy/text_to_image': share(0)}


def gradient_cache(objective, params, frozen, state, batch, parts, rng=None):
  """Loss and exact gradients of a coupled objective, in `parts` parts.

  Embeddings of all parts are computed first, without keeping activations; the
  loss is differentiated with respect to them; then each part is run again
  and its share of that gradient pulled through (Gao et al., arXiv 2101.06983,
  section 3.2). Costs one forward pass more than the whole batch at once.

  Args:
    objective: has `draw`, `encode`, `couple` and `coefficients` as
      `Contrastive` has.
    params: trained parameters.
    frozen: fixed parameters.
    state: returned as it came.
    batch: {source: arrays [B, ...]}.
    parts: number of parts, dividing each source's B.
    rng: the key of the step, for objectives that draw.

  Returns:
    ((loss, {name: loss}, state, aux), gradients).

  Raises:
    ValueError: a source cannot be split.
  """
  drawn = objective.draw(batch, rng)
  micro = {source: jax.tree.map(lambda x, s=source: _split(x, parts, s), arrays)
           for source, arrays in drawn.items()}
  cached = jax.lax.map(lambda b: objective.encode(params, frozen, b), micro)

  def from_features(params, cached):
    sums, aux = objective.couple(
        params, frozen, jax.tree.map(_join, cached), batch)
    losses = {name: total / jnp.where(weight > 0, weight, 1.0)
              for name, (total, weight) in sums.items()}
    total = sum(objective.coefficients[name] * x for name, x in losses.items())
    return total, (losses, aux)

  (loss, (losses, aux)), (direct, pulled) = jax.value_and_grad(
      from_features, argnums=(0, 1), has_aux=True)(params, cached)

  def add(gradients, part):
    arrays, cotangent = part
    pull = jax.vjp(lambda p: objective.encode(p, frozen, arrays), params)[1]
    return jax.tree.map(jnp.add, gradients, pull(cotangent)[0]), None

  gradients, _ = jax.lax.scan(add, direct, (micro, pulled))
  return (loss, losses, state, aux), gradients


def _split(x, parts, source):
  """[B, ...] -> [parts, B / parts, ...], each part spread over all devices."""
  if x.shape[0] % parts:
    raise ValueError(f'source {source!r} has {x.shape[0]} examples, which '
                     f'optimizer.accumulate={parts} does not divide.')
  return jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0)


def _join(x):
  """Undoes `_split`."""
  return jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])


LOSSES = {'softmax': softmax_loss, 'sigmoid': sigmoid_loss}

"""Next-token prediction: cross-entropy on the weighted targets of a batch."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from mmgen.objectives import common


@dataclasses.dataclass(frozen=True, eq=False)
class NextToken:
  """Token-weighted cross-entropy over all sources of a batch.

  Attributes:
    model: a `models.multimodal.MultimodalDecoder`.
    coefficients: {'next_token': factor of the loss}.
  """
  model: Any
  coefficients: dict[str, float] = dataclasses.field(
      default_factory=lambda: {'next_token': 1.0})

  names = ('next_token',)
  coupled = False

  def weights(self, batch):
    """Returns the sum of the weights of all targets, {name: scalar}."""
    return {'next_token': sum(
        jnp.sum(arrays['weights']) for arrays in batch.values())}

  def __call__(self, params, frozen, state, batch, rng, step):
    """See the step contract.

    Returns:
      ({'next_token': (sum, weight)}, (state, aux)); aux has (sum, weight) of
      'accuracy' and of the loss of each source, 'next_token/<source>'.
    """
    del step  # `rng` is of this step
    variables = {'params': common.merge(params, frozen)}
    total, correct, aux = 0.0, 0.0, {}
    for source, arrays in batch.items():
      logits_BTV, _ = self.model.apply(
          variables, arrays, train=True,
          rngs=common.rngs(rng, source))
      weights_BT = arrays['weights']
      loss = jnp.sum(weights_BT * cross_entropy(logits_BTV, arrays['targets']))
      hits_BT = jnp.argmax(logits_BTV, axis=-1) == arrays['targets']
      total += loss
      correct += jnp.sum(weights_BT * hits_BT)
      aux[f'next_token/{source}'] = (loss, jnp.sum(weights_BT))
    weight = self.weights(batch)['next_token']
    aux['accuracy'] = (correct, weight)
    return {'next_token': (total, weight)}, (state, aux)


def cross_entropy(logits_BTV, targets_BT):
  """-log p(target) in nats at every slot, float32 [B, T]."""
  logits_BTV = logits_BTV.astype(jnp.float32)
  chosen = jnp.take_along_axis(logits_BTV, targets_BT[:, :, None], axis=-1)
  return jax.nn.logsumexp(logits_BTV, axis=-1) - chosen[:, :, 0]

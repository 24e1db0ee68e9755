"""What all objectives share."""

import zlib

import flax.traverse_util
import jax


def purpose_key(rng, purpose: str):
  """Returns the key of one use of randomness within a step."""
  return jax.random.fold_in(rng, zlib.crc32(purpose.encode()))


def rngs(rng, source: str):
  """Returns the keys that a model is applied with to a source.

  Args:
    rng: the key of the step; None where nothing is drawn.
    source: name of the source.
  """
  return {} if rng is None else {
      'dropout': purpose_key(rng, f'dropout/{source}')}


def merge(params, frozen):
  """Joins trained and frozen parameters into one tree, sharing the leaves.

  Args:
    params: nested dict of the parameters that are trained.
    frozen: nested dict of those that are not; no leaf of both.
  """
  flat = flax.traverse_util.flatten_dict
  return flax.traverse_util.unflatten_dict({**flat(params), **flat(frozen)})

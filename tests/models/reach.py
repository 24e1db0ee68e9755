"""Which inputs an output depends on, by gradients."""

import jax
import jax.numpy as jnp
import numpy as np


def reached(outputs, x_BTD):
  """bool [B, T, B, S]: does output (b, t) have a gradient to input (b', s)?

  Args:
    outputs: from [B, S, D] to one number for each position, [B, T].
    x_BTD: where to differentiate.
  """

  @jax.jit
  def gradients(x_BTD):
    y_BT, pull = jax.vjp(outputs, x_BTD)
    basis = jnp.eye(y_BT.size).reshape(-1, *y_BT.shape)
    # One output at a time: batched over all of them, XLA's CPU compiler of
    # jaxlib 0.10.2 gets wide reductions wrong (jax-ml/jax#39103).
    return jax.lax.map(lambda one: pull(one)[0], basis)

  used = np.any(np.asarray(gradients(x_BTD)) != 0, axis=-1)
  B, S = x_BTD.shape[:2]
  return used.reshape(B, -1, B, S)

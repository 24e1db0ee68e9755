"""The installed compiler computes what it is told to."""

import jax
import jax.numpy as jnp
import numpy as np


def test_batched_gradients_of_a_norm_are_right():
  # jaxlib 0.10.2 fuses this reduction wrongly on CPU and is off by 0.7
  # (jax-ml/jax#39103), which is why setup.py excludes it.
  x_BTD = jax.random.normal(jax.random.key(0), (2, 34, 16))
  _, pull = jax.vjp(lambda x: x * jax.lax.rsqrt(
      jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5), x_BTD)
  basis = jnp.eye(x_BTD.size)[:64].reshape(64, *x_BTD.shape)
  at_once = jax.jit(jax.vmap(pull))(basis)[0]
  one_by_one = jnp.stack([pull(one)[0] for one in basis])
  np.testing.assert_allclose(at_once, one_by_one, atol=1e-5)

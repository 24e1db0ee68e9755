"""Two sets of weights, one for words and one for what is seen, dispatched.

EVEv2 (arXiv 2502.06788, section 3) gives every block a second set of weights
for the slots of pictures; all slots attend to each other as before. Its
released code computes both sets for every slot and selects. Here a slot costs
one set:

  1. the slots of a chip are sorted, words first; nothing crosses chips
  2. a matrix product is cut where words end, to an eighth of the slots: of
     eight compiled programs the one runs whose cut fits, and the slots of that
     eighth alone are computed twice
  3. results go back to where their slots were

so that a product costs 1 + 1/8 of one set, whatever the share of pictures, and
its gradients likewise. Both sets are whole matrices in every program: nothing
is padded, copied or accumulated block by block.

What else was tried, by compiled FLOPs over those of one set: `lax.ragged_dot`
2.0, as it multiplies all slots by both sets on CPU and on TPU v5e (jax 0.10,
libtpu 0.0.52) alike; a fixed number of slots for pictures, as many as a row can
hold, beside all slots as words: 1.6 in the published recipe (2551 slots a
picture in rows of 4096).
"""

import functools

import jax
import jax.numpy as jnp

from mmgen import partition

PARTS = {'norms': ('attention_norm', 'mlp_norm'), 'attention': ('attention',),
         'mlp': ('mlp',)}
# Programs of a product, and cuts between words and pictures that they know.
CUTS = 8


def copied(blocks, parts):
  """The second set as it starts, equal to the first (released code).

  Args:
    blocks: parameters of blocks.
    parts: names in `PARTS`.
  """
  return {name: blocks[name] for part in parts for name in PARTS[part]}


def route(visual_BT):
  """Where the slots of a chip go.

  Returns:
    {'visual': as given, 'order': [B, T], slots of words, then of pictures, as
    numbers within a chip; 'place': its inverse}.
  """
  def sort(visual_BT):
    visual_N = visual_BT.reshape(-1)
    order_N = jnp.argsort(visual_N, stable=True).astype(jnp.int32)
    place_N = jnp.zeros_like(order_N).at[order_N].set(
        jnp.arange(order_N.size, dtype=jnp.int32), unique_indices=True)
    return dict(visual=visual_BT, order=order_N.reshape(visual_BT.shape),
                place=place_N.reshape(visual_BT.shape))
  return partition.local(sort, visual_BT)


def apply(function, x_BT, first, second, routes):
  """Applies a function of slots, each with the weights of its modality.

  Args:
    function: (linear, x) -> results; x and results [slots, ...]. The function
      linear(name, x) is a linear map.
    x_BT: [B, T, ...].
    first, second: {name: {'kernel': [D, F], 'bias' if any}}, for words and
      for pictures, in the dtype of `x_BT`.
    routes: of `route`.

  Returns:
    As the function, [B, T, ...].
  """
  def run(slots, weights):
    x_BT, routes = slots
    order_N, place_N = (routes[k].reshape(-1) for k in ('order', 'place'))
    words = jnp.sum(~routes['visual'], dtype=jnp.int32)
    def linear(name, x):
      return _linear(x, *(tree[name] for tree in weights), words)
    x = _permute(x_BT.reshape(-1, *x_BT.shape[2:]), order_N, place_N)
    return jax.tree.map(
        lambda y: _permute(y, place_N, order_N).reshape(
            *x_BT.shape[:2], *y.shape[1:]), function(linear, x))
  return partition.local(run, (x_BT, routes), (first, second))


def choose(first, second, visual_BT):
  """Vectors of the modality of each slot: [B, T, ...]."""
  visual = visual_BT.reshape(*visual_BT.shape, *(1,) * first.ndim)
  return jnp.where(visual, second[None, None], first[None, None])


def _linear(x_ND, first, second, words):
  """The first `words` rows by one set, the others by the other."""
  y_NF = pair_dot(x_ND, first['kernel'], second['kernel'], words)
  if 'bias' in first:
    seen_N1 = (jnp.arange(len(x_ND)) >= words)[:, None]
    y_NF += jnp.where(seen_N1, second['bias'][None], first['bias'][None])
  return y_NF


@jax.custom_vjp
def pair_dot(x_ND, first_DF, second_DF, words):
  """x @ first for the first `words` rows, x @ second for the others."""
  return _switch(len(x_ND), words, lambda start, end: _cut_dot(
      x_ND, first_DF, second_DF, words, start, end))


def _cut_dot(x_ND, first_DF, second_DF, words, start, end):
  """Rows up to `end` by the first, from `start` on by the second."""
  top, bottom = x_ND[:end] @ first_DF, x_ND[start:] @ second_DF
  between = jnp.where(_words(start, end, words), top[start:],
                      bottom[:end - start])
  return jnp.concatenate([top[:start], between, bottom[end - start:]])


def _forward(x_ND, first_DF, second_DF, words):
  return (pair_dot(x_ND, first_DF, second_DF, words),
          (x_ND, first_DF, second_DF, words))


def _backward(kept, dy_NF):
  x_ND, first_DF, second_DF, words = kept
  def branch(start, end):
    top = jnp.where(_words(0, end, words), dy_NF[:end], 0)
    bottom = jnp.where(_words(start, len(x_ND), words), 0, dy_NF[start:])
    return (_cut_dot(dy_NF, first_DF.T, second_DF.T, words, start, end),
            x_ND[:end].T @ top, x_ND[start:].T @ bottom)
  return *_switch(len(x_ND), words, branch), None


pair_dot.defvjp(_forward, _backward)


def _switch(rows, words, branch):
  """Runs branch(start, end) with start <= words <= end, static both."""
  cuts = [i * rows // CUTS for i in range(CUTS + 1)]
  which = jnp.sum(jnp.asarray(cuts[1:-1]) <= words)
  return jax.lax.switch(which, [
      functools.partial(branch, start, end)
      for start, end in zip(cuts, cuts[1:])])


def _words(start, end, words):
  return (jnp.arange(start, end) < words)[:, None]


@jax.custom_vjp
def _permute(x, order_N, inverse_N):
  """x[order]; its gradient is a permutation too, and no scatter."""
  return x.at[order_N].get(mode='promise_in_bounds', unique_indices=True)


_permute.defvjp(
    lambda x, order_N, inverse_N: (_permute(x, order_N, inverse_N),
                                   (order_N, inverse_N)),
    lambda kept, dy: (_permute(dy, kept[1], kept[0]), None, None))

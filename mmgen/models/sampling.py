"""Draw text, or the features of a picture, from a next-token model.

A prompt is a right-padded row of `layout.prompt`; the decoder reads it once
(`prefill`) and then extends each row by one token a step, through its cache,
inside one compiled loop. Rows end on their own; the loop ends with the last.
Text is greedy, or drawn with temperature and top-p.

Randomness is keyed by example: token i of a row depends on that row's key and
on i alone, so the company a row keeps in its batch does not change its sample.
"""

import functools
import zlib

import jax
import jax.numpy as jnp

from mmgen.models import multimodal

PAD = 0  # fills a row after its end; the tokenizer's reserved id 0


def example_keys(seed, names):
  """One random key per example, from its name and not from its place.

  Args:
    seed: int.
    names: a list of B strings or bytes, one per example.

  Returns:
    A typed key array [B].
  """
  names = [n.encode('utf-8') if isinstance(n, str) else n for n in names]
  digests = jnp.asarray([zlib.crc32(name) for name in names], jnp.uint32)
  key = jax.random.key(seed)
  return jax.vmap(functools.partial(jax.random.fold_in, key))(digests)


def keep_top_p(logits_BV, top_p):
  """Sets all but the nucleus to -inf (arXiv 1904.09751, section 3.1).

  The nucleus is the smallest set of most probable tokens whose probabilities
  add up to `top_p` or more. It always holds the most probable token; tokens
  exactly as probable as its last member are kept as well.
  """
  sorted_BV = jnp.sort(jax.nn.softmax(logits_BV, axis=-1), axis=-1)[:, ::-1]
  before_BV = jnp.cumsum(sorted_BV, axis=-1) - sorted_BV
  least_B1 = jnp.min(
      jnp.where(before_BV < top_p, sorted_BV, jnp.inf), axis=-1, keepdims=True
  )
  keep_BV = jax.nn.softmax(logits_BV, axis=-1) >= least_B1
  return jnp.where(keep_BV, logits_BV, -jnp.inf)


def choose(logits_BV, keys_B, index, temperature, top_p):
  """Token `index` of each row from its logits and its key: i32[B]."""
  keys_B = jax.vmap(lambda key: jax.random.fold_in(key, index))(keys_B)
  logits_BV = keep_top_p(logits_BV.astype(jnp.float32) / temperature, top_p)
  return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)


def decode(extend, logits_BV, cache, lengths_B, max_tokens, eos, pick):
  """The loop: pick a token, extend the rows, until all of them have ended.

  Args:
    extend: function (tokens_B1, positions_B, cache) -> (logits_BV, cache).
    logits_BV: logits after the prompts.
    cache: the cache that holds the prompts.
    lengths_B: i32, slots of each prompt; its next token takes that position.
    max_tokens: int, the longest answer, `eos` included.
    eos: int, the token that ends a row; it is written, `PAD` follows it.
    pick: function (logits_BV, index) -> tokens_B.

  Returns:
    tokens i32[B, max_tokens].
  """

  def unfinished(carry):
    index, done_B = carry[0], carry[1]
    return (index < max_tokens) & ~jnp.all(done_B)

  def advance(carry):
    index, done_B, tokens_BT, logits_BV, cache = carry
    token_B = jnp.where(done_B, PAD, pick(logits_BV, index))
    tokens_BT = tokens_BT.at[:, index].set(token_B)
    logits_BV, cache = extend(token_B[:, None], lengths_B + index, cache)
    return index + 1, done_B | (token_B == eos), tokens_BT, logits_BV, cache

  rows = logits_BV.shape[0]
  start = (
      jnp.int32(0),
      jnp.zeros(rows, bool),
      jnp.full((rows, max_tokens), PAD, jnp.int32),
      logits_BV,
      cache,
  )
  return jax.lax.while_loop(unfinished, advance, start)[2]


@functools.partial(
    jax.jit, static_argnames=('model', 'max_tokens', 'eos', 'greedy')
)
def _generate(
    model, params, batch, lengths_B, keys_B, temperature, top_p, *,
    max_tokens, eos, greedy,
):
  """One compilation per model, shape of the prompts and `max_tokens`."""
  rows, length = batch['tokens'].shape
  cache = multimodal.init_cache(model.config, rows, length + max_tokens)
  variables = {'params': params}
  logits_BV, cache = model.apply(
      variables, batch, lengths_B, cache, method='prefill'
  )
  extend = functools.partial(model.apply, variables, method='extend')
  if greedy:
    pick = lambda logits_BV, _: jnp.argmax(logits_BV, -1).astype(jnp.int32)
  else:
    pick = lambda logits_BV, index: choose(
        logits_BV, keys_B, index, temperature, top_p
    )
  return decode(extend, logits_BV, cache, lengths_B, max_tokens, eos, pick)


@functools.partial(jax.jit, static_argnames=('model', 'count'))
def generate_features(model, params, batch, lengths_B, count):
  """Draws a picture: entry after entry, each read before the next.

  Args:
    model: a `multimodal.MultimodalDecoder` with a visual head.
    params: its parameters.
    batch: as in `generate`; each row ends where the first entry is asked for,
      with the token <image> if the model has borders.
    lengths_B: i32, filled slots of each row.
    count: entries of a picture, `ImageLayout.table_size`.

  Returns:
    [B, count, F], for what turns such features into pixels.

  Raises:
    ValueError: the model has no visual head.
  """
  if model.config.visual_head is None:
    raise ValueError('model.visual_head is None: nothing was trained to '
                     'predict the entries of a picture.')
  rows, length = batch['tokens'].shape
  cache = multimodal.init_cache(model.config, rows, length + count)
  variables = {'params': params}
  first = model.apply(
      variables, batch, lengths_B, cache, method='prefill_visual')

  def advance(carry, index):
    features_BF, cache = carry
    return model.apply(variables, features_BF, lengths_B + index, cache,
                       method='extend_visual'), features_BF

  (last_BF, _), features_PBF = jax.lax.scan(
      advance, first, jnp.arange(count - 1))
  features_PBF = jnp.concatenate([features_PBF, last_BF[None]])
  return features_PBF.swapaxes(0, 1)


def generate(
    model, params, batch, lengths_B, max_tokens, *, eos,
    temperature=0.0, top_p=1.0, keys_B=None,
):
  """Answers to a batch of prompts.

  Args:
    model: a `multimodal.MultimodalDecoder`.
    params: its parameters.
    batch: the arrays of `layout.prompt`: right-padded rows of prompts.
    lengths_B: i32, filled slots of each row.
    max_tokens: the longest answer, `eos` included.
    eos: the token id that ends an answer.
    temperature: 0 takes the most probable token, else divides the logits.
    top_p: in (0, 1], the probability mass of the nucleus drawn from.
    keys_B: keys of `example_keys`; needed if `temperature` is not 0.

  Returns:
    tokens i32[B, max_tokens]; a row that ended holds `eos`, then `PAD`.

  Raises:
    ValueError: if a setting is out of range, or keys are missing.
  """
  if max_tokens < 1:
    raise ValueError(f'max_tokens must be at least 1, found {max_tokens}')
  if not temperature >= 0:
    raise ValueError(f'temperature must be 0 or more, found {temperature}')
  if not 0 < top_p <= 1:
    raise ValueError(f'top_p must lie in (0, 1], found {top_p}')
  if keys_B is None:
    if temperature:
      raise ValueError('temperature is not 0: pass keys_B (example_keys)')
    keys_B = example_keys(0, [''] * len(lengths_B))
  return _generate(
      model, params, batch, jnp.asarray(lengths_B, jnp.int32), keys_B,
      jnp.float32(temperature or 1.0), jnp.float32(top_p),
      max_tokens=max_tokens, eos=eos, greedy=temperature == 0,
  )

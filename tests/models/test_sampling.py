"""The sampler on a scripted model, then on a real decoder."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmgen.models import connector
from mmgen.models import decoder
from mmgen.models import multimodal
from mmgen.models import patch_embedding
from mmgen.models import sampling

EOS = 2


def successor(script):
  """A model without memory: after token t comes script[t], certainly."""
  table_VV = jnp.full((len(script),) * 2, -9.0)
  table_VV = table_VV.at[jnp.arange(len(script)), jnp.asarray(script)].set(9.0)

  def extend(tokens_B1, positions_B, cache):
    # The cache notes at which position each row was written.
    rows = jnp.arange(len(positions_B))
    return table_VV[tokens_B1[:, 0]], cache.at[rows, positions_B].add(1)

  return table_VV, extend


def greedy(logits_BV, _):
  return jnp.argmax(logits_BV, -1).astype(jnp.int32)


def test_decode_stops_each_row_at_eos_and_writes_at_its_own_position():
  #        0  1  2  3  4  5  6
  script = [0, 0, 6, 4, 5, 2, 3]
  table_VV, extend = successor(script)
  last_B = jnp.asarray([3, 5, 2])  # the last tokens of three prompts
  lengths_B = jnp.asarray([2, 1, 3])
  tokens_BT = sampling.decode(
      extend, table_VV[last_B], jnp.zeros((3, 9), jnp.int32), lengths_B,
      max_tokens=4, eos=EOS, pick=greedy,
  )
  np.testing.assert_array_equal(
      tokens_BT, [[4, 5, 2, 0], [2, 0, 0, 0], [6, 3, 4, 5]]
  )


def test_decode_ends_with_the_last_row():
  table_VV, extend = successor([0, 0, 0, 4, 2])
  calls = []

  def counted(tokens_B1, positions_B, cache):
    jax.debug.callback(lambda p: calls.append(int(p)), positions_B[0])
    return extend(tokens_B1, positions_B, cache)

  tokens_BT = sampling.decode(
      counted, table_VV[jnp.asarray([3])], jnp.zeros((1, 60), jnp.int32),
      jnp.asarray([5]), max_tokens=50, eos=EOS, pick=greedy,
  )
  tokens_BT.block_until_ready()
  jax.effects_barrier()
  assert tokens_BT[0, :3].tolist() == [4, 2, 0]
  assert sorted(calls) == [5, 6]


def test_top_p_keeps_the_smallest_set_that_reaches_p():
  logits_BV = jnp.log(jnp.asarray([[0.5, 0.3, 0.15, 0.05]] * 2))
  for top_p, kept in [(0.01, 1), (0.49, 1), (0.51, 2), (0.79, 2), (0.9, 3),
                      (1.0, 4)]:
    out_BV = sampling.keep_top_p(logits_BV, top_p)
    assert jnp.isfinite(out_BV).sum(1).tolist() == [kept, kept], top_p


def test_samples_follow_temperature_and_nucleus():
  logits_BV = jnp.tile(jnp.log(jnp.asarray([[0.6, 0.3, 0.1]])), (4000, 1))
  keys_B = sampling.example_keys(0, [str(i) for i in range(4000)])
  share = lambda **k: np.bincount(
      sampling.choose(logits_BV, keys_B, 0, **k), minlength=3) / 4000
  np.testing.assert_allclose(
      share(temperature=1.0, top_p=1.0), [0.6, 0.3, 0.1], atol=0.03)
  # Halving the temperature squares the odds: 36 : 9 : 1.
  np.testing.assert_allclose(
      share(temperature=0.5, top_p=1.0), np.array([36, 9, 1]) / 46, atol=0.03)
  np.testing.assert_allclose(
      share(temperature=1.0, top_p=0.7), [2 / 3, 1 / 3, 0], atol=0.03)


def test_a_sample_depends_on_its_name_not_on_its_batch():
  logits_BV = jnp.zeros((5, 1000))
  names = list('abcde')
  draw = lambda names, index: np.asarray(sampling.choose(
      logits_BV[:len(names)], sampling.example_keys(7, names), index,
      temperature=1.0, top_p=1.0))
  together = draw(names, 3)
  alone = np.concatenate([draw([name], 3) for name in reversed(names)])[::-1]
  np.testing.assert_array_equal(together, alone)
  assert len(set(together.tolist())) > 3
  assert (draw(names, 4) != together).any()


VOCAB = 20
LONGEST = 6


@pytest.fixture(scope='module')
def model():
  config = multimodal.MultimodalConfig(
      decoder.DecoderConfig(
          vocab=VOCAB, layers=2, width=16, heads=2, hidden=32, unroll=True),
      patch_embedding.LinearPatchesConfig(width=16, patch=4, newline='none'),
      connector.ConnectorConfig('identity', 16))
  return multimodal.MultimodalDecoder(config)


@pytest.fixture(scope='module')
def params(model):
  batch, _ = prompts([3])
  shapes = jax.eval_shape(model.init, jax.random.key(0), batch)['params']
  leaves, tree = jax.tree.flatten(shapes)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  # Large weights: answers then depend on every slot, and no two are alike.
  return jax.tree.unflatten(tree, [
      1.5 * jax.random.normal(key, leaf.shape) / leaf.shape[-2] ** 0.5
      if leaf.ndim > 1 else jax.random.normal(key, leaf.shape)
      for key, leaf in zip(keys, leaves)])


def prompts(lengths, total=9):
  """Right-padded rows: bos, 4 patches of a picture of noise, words."""
  generator = np.random.default_rng(4)
  B = len(lengths)
  slots = np.arange(total)[None] < np.asarray(lengths)[:, None] + 5
  visual = np.full((B, total), -1, np.int32)
  visual[:, 1:5] = np.arange(4)
  tokens = generator.integers(5, VOCAB, (B, total)).astype(np.int32)
  batch = dict(
      tokens=np.where(slots, tokens, 0), visual=np.where(slots, visual, -1),
      segments=slots.astype(np.int32),
      positions=np.where(slots, np.arange(total)[None], 0).astype(np.int32),
      images=generator.integers(0, 256, (B, 1, 8, 8, 3)).astype(np.uint8),
      image_box=np.tile(np.int32([0, 0, 2, 2]), (B, 1, 1)))
  return batch, np.asarray(lengths, np.int32) + 5


def without_cache(model, params, batch, lengths_B, eos):
  """Greedy answers by reading the whole row anew for every token."""
  apply = jax.jit(lambda batch: model.apply({'params': params}, batch)[0])
  pad = lambda a: np.pad(a, ((0, 0), (0, LONGEST)))
  batch = dict(batch, **{
      k: pad(batch[k]) for k in ('tokens', 'segments', 'positions')},
               visual=np.pad(batch['visual'], ((0, 0), (0, LONGEST)),
                             constant_values=-1))
  rows = np.arange(len(lengths_B))
  answers = np.zeros((len(rows), LONGEST), np.int32)
  done = np.zeros(len(rows), bool)
  for i in range(LONGEST):
    at = lengths_B + i
    logits_BTV = np.asarray(apply(batch))
    answers[:, i] = np.where(done, 0, logits_BTV[rows, at - 1].argmax(-1))
    done |= answers[:, i] == eos
    batch['tokens'][rows, at] = answers[:, i]
    batch['segments'][rows, at] = 1
    batch['positions'][rows, at] = at
  return answers


def test_cached_equals_uncached_greedy(model, params):
  batch, lengths_B = prompts([1, 4, 2, 3])
  # An id that the model says in the midst of an answer, as the end.
  never = without_cache(model, params, batch, lengths_B, eos=-1)
  eos = int(never[1, 2])
  expected = without_cache(model, params, batch, lengths_B, eos)
  tokens_BT = sampling.generate(
      model, params, batch, lengths_B, LONGEST, eos=eos)
  np.testing.assert_array_equal(tokens_BT, expected)
  assert (never != expected).any() and len(set(never.ravel())) > 4


@pytest.mark.parametrize('settings', [
    {}, dict(temperature=1.5, top_p=0.95)], ids=['greedy', 'sampled'])
def test_unequal_lengths_equal_one_by_one(model, params, settings):
  batch, lengths_B = prompts([1, 4, 2])
  names = ['a', 'b', 'c']
  together = sampling.generate(
      model, params, batch, lengths_B, LONGEST, eos=-1,
      keys_B=sampling.example_keys(0, names), **settings)
  for b in range(3):
    alone = sampling.generate(
        model, params, {k: v[b:b + 1] for k, v in batch.items()},
        lengths_B[b:b + 1], LONGEST, eos=-1,
        keys_B=sampling.example_keys(0, names[b:b + 1]), **settings)
    np.testing.assert_array_equal(alone[0], together[b])


def test_answers_depend_on_the_picture(model, params):
  batch, lengths_B = prompts([1, 4, 2])
  first = sampling.generate(model, params, batch, lengths_B, LONGEST, eos=-1)
  batch['images'] = 255 - batch['images']
  other = sampling.generate(model, params, batch, lengths_B, LONGEST, eos=-1)
  assert (np.asarray(first) != np.asarray(other)).any(axis=1).all()


@pytest.mark.parametrize('settings, message', [
    (dict(max_tokens=0), 'max_tokens .* found 0'),
    (dict(temperature=-1), 'temperature .* found -1'),
    (dict(top_p=0), r'top_p .* found 0'),
    (dict(top_p=1.1), r'top_p .* found 1.1'),
    (dict(temperature=1), 'pass keys_B')])
def test_wrong_settings_are_named(settings, message):
  settings = dict(max_tokens=3) | settings
  with pytest.raises(ValueError, match=message):
    sampling.generate(None, None, {}, np.ones(2), eos=2, **settings)

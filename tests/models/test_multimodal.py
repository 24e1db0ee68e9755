import dataclasses
import functools
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import reach

from mmgen.data import document
from mmgen.data import layout
from mmgen.models import connector
from mmgen.models import decoder
from mmgen.models import multimodal
from mmgen.models import patch_embedding
from mmgen.training import metrics

SIZE = (8, 12)
DECODER = decoder.DecoderConfig(
    vocab=64, layers=2, width=16, heads=4, kv_heads=2, hidden=24)
CONFIGS = {
    'linear_patches': multimodal.MultimodalConfig(
        DECODER, patch_embedding.LinearPatchesConfig(width=16, patch=4),
        connector.ConnectorConfig('identity', 16)),
    'eve': multimodal.MultimodalConfig(
        DECODER,
        patch_embedding.EveConfig(width=8, heads=2, patch=2, pool=2),
        connector.ConnectorConfig('mlp', 16)),
}


class Letters:
  """A tokenizer of letters."""
  names = ('<pad>', '<bos>', '<eos>', '<patch>', '<newline>', '<class>')

  def id(self, name):
    return self.names.index(name)

  def encode(self, text):
    return [ord(letter) - ord('a') + 8 for letter in text]


def _picture(seed):
  return np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), np.uint8)


def _documents():
  """Text alone, a picture first, two pictures, a padded picture."""
  text, image = document.text, document.image
  return [document.Document(spans) for spans in (
      (text('abcde'),),
      (image(_picture(0)), text('fg')),
      (text('h'), image(_picture(1)), text('ij'), image(_picture(2)),
       text('k')),
      (text('lm'), image(_picture(3), valid=(0, 4, 4, 8)), text('nop')))]


def _layout(config):
  return config.vision.image_layout(SIZE)


def _batch(config, documents, rows, length, images=4):
  arrays, stats = layout.sequence(
      documents, Letters(), _layout(config), rows, length, images, SIZE)
  assert stats['dropped_documents'] == 0
  return jax.tree.map(jnp.asarray, arrays)


@functools.cache
def _params(config):
  """Random everywhere, and large enough for every path to show."""
  shapes = jax.eval_shape(
      multimodal.MultimodalDecoder(config).init, jax.random.key(0),
      multimodal.example_batch(config, SIZE))['params']
  leaves, tree = jax.tree.flatten(shapes)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  return tree.unflatten([0.5 * jax.random.normal(k, x.shape)
                         for k, x in zip(keys, leaves)])


@functools.cache
def _apply(config):
  model = multimodal.MultimodalDecoder(config)
  return jax.jit(functools.partial(model.apply, {'params': _params(config)}))


def _declared(batch):
  """[B, T, B, S]: a slot sees its own document up to itself."""
  segments = np.asarray(batch['segments'])
  B, T = segments.shape
  seen = np.zeros((B, T, B, T), bool)
  for b, t, s in np.ndindex(B, T, T):
    seen[b, t, b, s] = s <= t and segments[b, t] == segments[b, s]
  return seen


@pytest.mark.parametrize('name', CONFIGS)
def test_gradients_reach_exactly_the_declared_mask(name):
  config = CONFIGS[name]
  batch = _batch(config, _documents(), 2, 34)
  assert {0, 1, 2} <= set(np.unique(batch['segments']))
  assert (np.asarray(batch['visual']) >= 0).any()
  model = multimodal.MultimodalDecoder(config)
  variables = {'params': _params(config)}

  def outputs(change_BTD):
    def add(next_function, args, kwargs, context):
      result = next_function(*args, **kwargs)
      if context.method_name != '_splice':
        return result
      x_BTD, out = result
      return x_BTD + change_BTD, out
    with nn.intercept_methods(add):
      logits_BTV, _ = model.apply(variables, batch)
    return jnp.sum(jnp.sin(logits_BTV), axis=-1)

  np.testing.assert_array_equal(
      reach.reached(outputs, jnp.zeros((2, 34, 16))), _declared(batch))


@pytest.mark.parametrize('name', CONFIGS)
def test_a_picture_reaches_exactly_what_may_see_its_slots(name):
  config = CONFIGS[name]
  batch = _batch(config, _documents(), 2, 34)
  before, _ = _apply(config)(batch)
  seen = _declared(batch)
  slots = np.where(np.asarray(batch['visual']) >= 0, batch['image_index'], -1)
  pictures = {(b, i) for b, i in np.ndindex(2, 4) if (slots[b] == i).any()}
  assert len(pictures) == 4
  for b, i in pictures:
    images = batch['images'].at[b, i].set(255 - batch['images'][b, i])
    after, _ = _apply(config)({**batch, 'images': images})
    changed = np.any(np.asarray(before != after), axis=-1)
    holds = np.zeros(slots.shape, bool)
    holds[b] = slots[b] == i
    np.testing.assert_array_equal(changed, seen[:, :, holds].any(-1))


@pytest.mark.parametrize('name', CONFIGS)
def test_packed_equals_each_document_alone(name):
  config = CONFIGS[name]
  packed = _batch(config, _documents(), 2, 34)
  logits, _ = _apply(config)(packed)
  found = 0
  for single in _documents():
    alone = _batch(config, [single], 1, 34)
    expected, _ = _apply(config)(alone)
    used = np.asarray(alone['segments'][0]) == 1
    tokens = np.asarray(alone['tokens'][0])[used]
    for b, segment in ((b, s) for b in range(2) for s in range(1, 5)):
      place = np.asarray(packed['segments'][b]) == segment
      if np.array_equal(np.asarray(packed['tokens'][b])[place], tokens):
        found += 1
        np.testing.assert_allclose(
            logits[b][place], expected[0][used], atol=1e-4)
  assert found == 4


@pytest.mark.parametrize('unroll', [False, True])
@pytest.mark.parametrize('name', CONFIGS)
def test_cached_decoding_equals_the_full_pass(name, unroll):
  config = dataclasses.replace(
      CONFIGS[name], decoder=dataclasses.replace(DECODER, unroll=unroll))
  model = multimodal.MultimodalDecoder(config)
  full = jax.tree.map(jnp.asarray, layout.unpacked(
      _documents(), Letters(), _layout(config), 34, 2, SIZE))
  expected, _ = _apply(config)(full)
  ends = jnp.sum(full['segments'] > 0, axis=1)
  assert len(set(ends.tolist())) == 4
  # Cut before the last two slots, which are text: prompts of unequal length,
  # padded on the right with tokens that must not be seen.
  lengths = ends - 2
  rows = jnp.arange(4)
  outside = jnp.arange(34)[None] >= lengths[:, None]
  prompt = {**full, 'tokens': jnp.where(outside, 63, full['tokens']),
            'visual': jnp.where(outside, -1, full['visual'])}
  variables = {'params': _params(config)}
  cache = multimodal.init_cache(config, 4, 36)
  logits, cache = jax.jit(functools.partial(
      model.apply, variables, method='prefill'))(prompt, lengths, cache)
  np.testing.assert_allclose(logits, expected[rows, lengths - 1], atol=1e-4)
  extend = jax.jit(functools.partial(model.apply, variables, method='extend'))
  for at in (lengths, lengths + 1):
    logits, cache = extend(full['tokens'][rows, at][:, None], at, cache)
    np.testing.assert_allclose(logits, expected[rows, at], atol=1e-4)


def test_slots_take_the_table_or_the_text_embedding():
  config = CONFIGS['eve']
  batch = _batch(config, _documents(), 2, 34)
  _, out = _apply(config)(batch)
  params = _params(config)
  table, _ = patch_embedding.Eve(config.vision).apply(
      {'params': params['vision']}, batch['images'], batch['image_box'])
  table, _ = connector.Mlp(config.connector).apply(
      {'params': params['connector']}, table)
  P = _layout(config).table_size
  visual = np.asarray(batch['visual'])
  for b, t in np.ndindex(visual.shape):
    expected = (params['decoder']['embedding'][batch['tokens'][b, t]]
                if visual[b, t] < 0
                else table[b, visual[b, t] // P, visual[b, t] % P])
    np.testing.assert_allclose(out['input'][b, t], expected, atol=1e-5)


def test_a_batch_without_pictures():
  config = CONFIGS['eve']
  arrays, _ = layout.sequence(_documents()[:1], Letters(), None, 1, 8, 0)
  logits, out = _apply(config)(jax.tree.map(jnp.asarray, arrays))
  assert not any(name.startswith('vision/') for name in out)
  text = multimodal.MultimodalConfig(DECODER)
  alone, _ = multimodal.MultimodalDecoder(text).apply(
      {'params': {'decoder': _params(config)['decoder']}}, arrays)
  np.testing.assert_allclose(logits, alone, atol=1e-5)
  batch = _batch(config, _documents(), 2, 34)
  with pytest.raises(ValueError, match='vision is None, but the batch has'):
    multimodal.MultimodalDecoder(text).init(jax.random.key(0), batch)


def test_eve_7b_has_its_parameters():
  config = multimodal.MultimodalConfig(
      decoder.sized('vicuna-7b'), patch_embedding.EveConfig(),
      connector.ConnectorConfig('mlp', 4096))
  shapes = jax.eval_shape(
      multimodal.MultimodalDecoder(config).init, jax.random.key(0),
      multimodal.example_batch(config, (56, 56)))['params']
  assert sorted(shapes) == ['connector', 'decoder', 'vision']
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 6_768_398_336


def test_flops_by_hand():
  config = CONFIGS['eve']
  text = decoder.flops_per_token(DECODER, 34)
  table = 1 + 2 * (3 + 1)
  vision = patch_embedding.eve_flops(config.vision, SIZE)
  mlp = 2 * (8 * 16 + 16 * 16)
  assert multimodal.flops(config, 34, 5, SIZE) == 34 * text + 5 * (
      vision + table * mlp)
  assert multimodal.flops(
      multimodal.MultimodalConfig(DECODER), 34, 5, SIZE) == 34 * text


@pytest.mark.parametrize('name', CONFIGS)
def test_flops_are_those_of_the_program(name):
  config = CONFIGS[name]
  batch = _batch(config, _documents(), 2, 34)
  program = jax.make_jaxpr(multimodal.MultimodalDecoder(config).apply)(
      {'params': _params(config)}, batch)
  assert metrics.count_flops(program) == 2 * multimodal.flops(
      config, 34, 4, SIZE)


def _experiment(**model):
  fields = dict(
      decoder=dict(layers=2, width=16, heads=4, hidden=24, vocab=64),
      vision=dict(name='eve', width=8, heads=2, patch=2),
      connector=dict(name='mlp', hidden=20))
  return ml_collections.ConfigDict(
      dict(dtype='bfloat16', model=fields | model))


def test_build_reads_an_experiment():
  config = multimodal.build(_experiment()).config
  assert config.vision == patch_embedding.EveConfig(
      width=8, heads=2, patch=2, dtype='bfloat16')
  assert config.connector == connector.ConnectorConfig(
      'mlp', 16, hidden=20, dtype='bfloat16')
  assert config.decoder.dtype == 'bfloat16'
  assert multimodal.build(_experiment(), vocab=99).config.decoder.vocab == 99
  config = multimodal.build(_experiment(
      vision=None, decoder=dict(size='vicuna-7b', vocab=7))).config
  assert (config.vision, config.decoder.layers, config.decoder.vocab) == (
      None, 32, 7)


@pytest.mark.parametrize('model, message', [
    (dict(vision=dict(name='evo')), "vision.name: 'evo'; allowed: linear_pat"),
    (dict(decoder=dict(layer=2, vocab=9)), "'layer'. Did you mean 'layers'"),
    (dict(connector=dict(name='conv')), "connector.name: 'conv'; allowed: id"),
    (dict(connector=dict(name='identity')), 'vision.width is 8 and .* is 16'),
    (dict(decoder=dict(layers=2, width=16, heads=3, hidden=24, vocab=9)),
     'model.decoder.heads: 3 does not divide width 16')])
def test_build_errors_name_the_field(model, message):
  with pytest.raises(ValueError, match=message):
    multimodal.build(_experiment(**model))


def test_importing_a_model_pulls_in_no_pipeline():
  code = (
      'import sys\n'
      'import mmgen.models.multimodal, mmgen.objectives.next_token\n'
      'heavy = {"tensorflow_datasets", "tensorflow", "grain", "orbax",'
      ' "tensorstore", "sentencepiece"}\n'
      'found = heavy & {name.split(".")[0] for name in sys.modules}\n'
      'flags = sys.modules.get("absl.flags")\n'
      'assert not found, found\n'
      'assert flags is None or "mmgen" not in str('
      'flags.FLAGS.flags_by_module_dict()), "flags"\n')
  subprocess.run([sys.executable, '-c', code], check=True)

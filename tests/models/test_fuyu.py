"""Fuyu-8B against its reference: pixels, slots, every stage, and answers.

The arrays in tests/golden/fuyu_{wide,tall}.npz hold random weights (norms and
biases, too), pictures, and what FuyuImageProcessor, FuyuProcessor and
FuyuForCausalLM of transformers 4.46.3 made of them, one prompt at a time;
answers were generated from all prompts at once, padded on the left (torch
2.13.0, fp32, CPU, eager attention).
"""

import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import reference

from mmgen.data import document
from mmgen.data import image
from mmgen.data import layout
from mmgen.models import decoder
from mmgen.models import multimodal
from mmgen.models import patch_embedding
from mmgen.models import sampling

PERSIMMON = dict(norm='layer', mlp='relu2', qkv_bias=True, out_bias=True,
                 mlp_bias=True, query_key_norm=True)
# Size of the canvas, size of a patch, words after each picture, the decoder.
CASES = {
    'fuyu_wide': ((15, 35), 5, ('abc', 'gbdadef', 'q'), dict(
        vocab=47, layers=2, width=36, heads=3, hidden=50, rope_theta=25e3,
        rope_share=0.5)),
    # Of 6 channels of a head 4 turn: 0.75 * 6, rounded down.
    'fuyu_tall': ((20, 12), 4, ('hello', 'xyzxyzx', 'ab', 'z'), dict(
        vocab=61, layers=3, width=30, heads=5, hidden=33, rope_theta=100.0,
        rope_share=0.75, norm_eps=1e-3)),
}


@functools.cache
def golden(name):
  return reference.load(name)


@functools.cache
def build(name, unroll=False):
  """(model, its parameters): nothing but a config."""
  _, patch, _, fields = CASES[name]
  config = ml_collections.ConfigDict(dict(dtype='float32', model=dict(
      decoder=fields | PERSIMMON | dict(unroll=unroll),
      vision=dict(name='linear_patches', width=fields['width'], patch=patch,
                  bos='after_image'),
      connector=dict(name='identity'))))
  model = multimodal.build(config)
  weights = golden(name)[1]
  params = {
      'vision': {'projection': reference.dense(weights, 'vision_embed_tokens')},
      'decoder': reference.persimmon(
          weights, model.config.decoder, 'language_model.')}
  shapes = jax.eval_shape(
      model.init, jax.random.key(0),
      multimodal.example_batch(model.config, CASES[name][0]))['params']
  assert jax.tree.map(np.shape, params) == jax.tree.map(
      lambda x: x.shape, shapes)
  return model, jax.tree.map(jnp.asarray, params)


def documents(name):
  """The prompts: a picture of any size, words, and <answer>."""
  size, patch, words, _ = CASES[name]
  grid = size[0] // patch, size[1] // patch
  for i, text in enumerate(words):
    yield image.fit_document(
        document.Document((
            document.image(golden(name)[0][f'picture/{i}']),
            document.text(text, 'input'), document.marks('<answer>'))),
        size, 'fuyu', 'bilinear', grid)


def layout_of(name):
  model, _ = build(name)
  return model.config.vision.image_layout(CASES[name][0])


def packed(name):
  """All prompts in two rows, and which slots are whose."""
  docs = list(documents(name))
  members, arrays, stats = layout.packed(
      docs, reference.Ids(), layout_of(name), 2, 46, 3, CASES[name][0])
  assert stats['dropped_documents'] == 0
  places = dict(zip([i for row in members for i in row],
                    reference.spans(arrays)))
  assert len(places) == len(docs) and all(members)
  return jax.tree.map(jnp.asarray, arrays), places


@pytest.mark.parametrize('name', CASES)
def test_pixels_and_slots_equal_the_reference(name):
  arrays, _ = golden(name)
  batch, places = packed(name)
  table = layout_of(name).table_size
  cols = layout_of(name).cols
  for i, fitted in enumerate(documents(name)):
    np.testing.assert_array_equal(fitted.spans[0].data, arrays[f'canvas/{i}'])
    row, slots = places[i]
    tokens = np.asarray(batch['tokens'][row])[slots]
    # Ours ends in <eos>.
    np.testing.assert_array_equal(tokens[:-1], arrays[f'tokens/{i}'])
    np.testing.assert_array_equal(
        batch['positions'][row][slots], np.arange(len(tokens)))
    # Reference: numbers of the patches that are picture; ours: of the canvas.
    visual = np.asarray(batch['visual'][row])[slots][:-1]
    width = (tokens == 9).sum() // (tokens == 10).sum()
    y, x = np.divmod(arrays[f'visual/{i}'], width)
    np.testing.assert_array_equal(
        np.where(visual < 0, -1, visual % table),
        np.where(arrays[f'visual/{i}'] < 0, -1, y * cols + x))


@pytest.mark.parametrize('unroll', [False, True])
@pytest.mark.parametrize('name', CASES)
def test_every_stage_equals_the_reference(name, unroll):
  arrays, _ = golden(name)
  model, params = build(name, unroll)
  batch, places = packed(name)
  layers = model.config.decoder.layers
  with jax.default_matmul_precision('highest'):
    logits, out = jax.jit(lambda params: model.apply(
        {'params': params}, batch, taps=tuple(range(layers))))(params)
  table = out['vision/patches'].reshape(2, -1, model.config.decoder.width)
  for i, (row, slots) in places.items():
    slots = np.flatnonzero(slots)[:-1]
    used = np.asarray(batch['visual'][row])[slots]
    close = lambda got, name, i=i: reference.error(
        got, arrays[name.format(i)]) < 1e-5
    assert close(table[row][used[used >= 0]], 'patches/{}')
    for layer, state in out['taps'].items():
      assert close(state[row][slots], f'hidden/{{}}/{layer}'), layer
    assert close(out['hidden'][row][slots], f'hidden/{{}}/{layers}')
    assert close(logits[row][slots], 'logits/{}')


@pytest.mark.parametrize('name', CASES)
def test_greedy_answers_equal_the_reference(name):
  arrays, _ = golden(name)
  model, params = build(name, unroll=True)
  batch, lengths = layout.prompt(
      list(documents(name)), reference.Ids(), layout_of(name), 30, 1)
  assert lengths.tolist() == [
      len(arrays[f'tokens/{i}']) for i in range(len(lengths))]
  with jax.default_matmul_precision('highest'):
    tokens = sampling.generate(model, params, batch, lengths, 32, eos=-1)
  # No two best tokens were so close that rounding could swap them.
  assert arrays['gap'].min() > 1e-3
  np.testing.assert_array_equal(tokens, arrays['generated'])


def test_fuyu_8b_has_its_parameters():
  config = multimodal.SIZES['fuyu-8b']
  shapes = jax.eval_shape(
      multimodal.MultimodalDecoder(config).init, jax.random.key(0),
      multimodal.example_batch(config, (1080, 1920)))['params']
  count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
  assert count(shapes) == 9_408_238_592
  assert count(shapes['decoder']['stack']['blocks']) == 36 * 201_380_096
  assert count(shapes['vision']) == 2700 * 4096 + 4096
  # 36 x 64 cells and a newline each row.
  names, _ = config.vision.image_layout((1080, 1920)).slots()
  assert len(names) == 2340


def test_persimmon_8b_has_its_constants():
  c = decoder.sized('persimmon-8b').stack
  assert {name: getattr(c, name) for name in PERSIMMON} == PERSIMMON
  assert (c.norm_eps, c.rope_theta, c.H, c.rope_size, c.rope) == (
      1e-5, 25e3, 64, 32, 'line')


def test_a_choice_that_does_not_exist():
  for field, message in (('bos', "vision.bos is 'last'; allowed: first, after"),
                         ('newline', "vision.newline is 'last'; allowed: no")):
    with pytest.raises(ValueError, match=message):
      patch_embedding.LinearPatchesConfig(width=8, **{field: 'last'})

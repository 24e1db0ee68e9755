"""Emu and Emu2 against their references: every stage, answers, pictures.

The arrays in tests/golden/emu{,2}_*.npz hold random weights (norms and biases,
too) under the names of the released files, pictures, and what the code released
with arXiv 2307.05222 and 2312.13286 (baaivision/Emu) made of them: a forward
pass of documents padded on the right, `generate` of prompts padded on the left,
and `generate_image`, which has no cache and runs one prompt at a time (torch
2.13.0, transformers 4.31.0, fp32, CPU).
"""

import dataclasses
import functools

import flax.traverse_util
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import reference
import tiny_lora

from mmgen import config as config_lib
from mmgen.data import document
from mmgen.data import layout
from mmgen.models import causal_former
from mmgen.models import lora
from mmgen.models import multimodal
from mmgen.models import sampling
from mmgen.models import vision_encoder
from mmgen.objectives import next_token
from mmgen.training import metrics
from mmgen.training import sharding
from mmgen.weights import emu as emu_weights
from mmgen.weights import layout as weights_layout

EVA = dict(
    name='vit', mlp='gelu', norm_eps=1e-6, init='eva', stem_bias=True,
    pre_norm=False, qkv_bias='qv', tap=-1, final_norm=False)
EMU = dict(class_entry=True, **EVA)
EMU2 = dict(placement='post', **EVA)
ONE = dict(
    decoder=dict(vocab=43, layers=2, width=20, heads=5, hidden=31,
                 norm_eps=1e-6))
TWO = dict(
    decoder=dict(vocab=47, layers=3, width=12, heads=3, kv_heads=1, hidden=19,
                 norm_eps=1e-3))
LINEAR = dict(connector=dict(name='linear', bias=False, border=True),
              visual_head=dict(name='linear', target='vision'))
# Documents and prompts: letters, and I for a picture. In 'square' and 'four'
# two pixels are left over at two edges.
CASES = {
    'emu_oblong': dict(ONE, size=(10, 15), vision=dict(
        EMU, patch=5, layers=2, width=15, heads=3, hidden=28), connector=dict(
            name='causal_former', queries=6, layers=2, inner_width=12, heads=3,
            head_dim=5, hidden=22, buckets=4, max_distance=8, border=True),
        visual_head=dict(name='linear', target='connector'),
        documents=('IabIacde', 'qIrs', 'hijklm'),
        prompts=('IabIc', 'qIrst', 'I'), draw=('abIc', 'xyzxy')),
    'emu_square': dict(TWO, size=(14, 14), vision=dict(
        EMU, patch=4, layers=3, width=10, heads=5, hidden=15), connector=dict(
            name='causal_former', queries=3, layers=3, inner_width=10, heads=5,
            head_dim=3, hidden=17, buckets=8, max_distance=6, border=True,
            unroll=True),
        visual_head=dict(name='linear', target='connector'),
        documents=('IIto', 'uvwI', 'aIb', 'z'),
        prompts=('IIto', 'uIvw', 'abcdefgh'), draw=('', 'IbIc')),
    'emu2_nine': dict(**ONE, **LINEAR, size=(24, 24), vision=dict(
        EMU2, patch=4, layers=2, width=15, heads=3, hidden=28, pool=2),
        prompts=('IabIc', 'qIrst', 'I', 'hijklm'), draw=('abIc', 'xyzxy')),
    'emu2_four': dict(**TWO, **LINEAR, size=(32, 32), vision=dict(
        EMU2, patch=5, layers=2, width=10, heads=5, hidden=15, pool=3),
        prompts=('IIto', 'uIvw', 'z', 'abcdefgh'), draw=('', 'IbIc')),
}


@functools.cache
def golden(name):
  return reference.load(name)


class Tensor:
  """An array as the tensor of a file."""

  def __init__(self, x):
    self.shape, self.dtype, self.array = x.shape, x.dtype, lambda: x


@functools.cache
def build(name, **changes):
  """(model, its parameters): nothing but a config."""
  case = CASES[name]
  config = ml_collections.ConfigDict(dict(dtype='float32', model={
      part: case[part] | changes.get(part, {}) for part in (
          'vision', 'connector', 'decoder', 'visual_head')}))
  config.model.vision.image_size = case['size']
  model = multimodal.build(config)
  found = emu_weights.LAYOUTS[name.partition('_')[0]]
  rules, tensors = found.rules(model.config), {
      name: Tensor(x) for name, x in golden(name)[1].items()}
  _, ours = found.build(model.config, 'float32')
  weights_layout.check(rules, tensors, ours, found.ignored)
  return model, flax.traverse_util.unflatten_dict(
      weights_layout.load(rules, tensors, ours), sep='/')


def documents(texts, images, role, *marks, **frame):
  """One document for each text, the pictures in order, marks at the end."""
  images = iter(images)
  for text in texts:
    spans = [document.image(next(images)) if part == 'I'
             else document.text(part, role) for part in
             filter(None, text.replace('I', ' I ').split(' '))]
    spans += [document.marks(mark) for mark in marks]
    yield document.Document(tuple(spans), **frame)
  assert next(images, None) is None


def layout_of(name):
  return build(name)[0].config.image_layout(CASES[name]['size'])


@functools.cache
def packed(name):
  """All documents in two rows, and which slots are whose."""
  case, arrays = CASES[name], golden(name)[0]
  docs = list(documents(
      case.get('documents', case['prompts']), arrays['images'], 'target',
      end='documents' in case))
  members, batch, stats = layout.packed(
      docs, reference.Ids(), layout_of(name), 2, 34, 3, case['size'])
  assert stats['dropped_documents'] == 0 and all(members)
  places = dict(zip([i for row in members for i in row],
                    reference.spans(batch)))
  return batch, [(row, np.flatnonzero(slots))
                 for _, (row, slots) in sorted(places.items())]


def pictures(name):
  """Of 2 x 3 slots for pictures, those of all documents in order."""
  batch, places = packed(name)
  return np.concatenate([
      3 * row + np.unique(found[found >= 0]) for row, found in (
          (row, batch['image_index'][row][slots]) for row, slots in places)])


@functools.cache
def outputs(name):
  model, params = build(name)
  batch = jax.tree.map(jnp.asarray, packed(name)[0])
  layers = model.config.decoder.layers
  with jax.default_matmul_precision('highest'):
    return jax.jit(lambda params: model.apply(
        {'params': params}, batch, taps=tuple(range(1, layers))))(params)


def close(got, want, tolerance=1e-5):
  assert reference.error(got, want) < tolerance


@pytest.mark.parametrize('name', CASES)
def test_the_tower_equals_the_reference(name):
  arrays, _ = golden(name)
  model, params = build(name)
  c = model.config.vision
  run = jax.jit(lambda params, images: vision_encoder.VisionEncoder(c).apply(
      {'params': params}, images, method='encode',
      taps=tuple(range(c.layers + 1)))[1]['taps'])
  with jax.default_matmul_precision('highest'):
    states = run(params['vision'], arrays['images'])
  for layer, state in states.items():
    close(state, arrays[f'vision/{layer}'])


@pytest.mark.parametrize('name', CASES)
def test_the_connector_equals_the_reference(name):
  arrays, _ = golden(name)
  _, out = outputs(name)
  found = pictures(name)
  table = out['features'].reshape(6, -1, out['features'].shape[-1])[found]
  if 'features' in arrays:
    close(table, arrays['features'])  # before the connector
    return
  close(table, arrays['connector'])
  close(out['connector/keys'][found], arrays['norm'])
  for layer, states in enumerate(out['connector/blocks'], 1):
    close(states[found], arrays[f'former/{layer}'])


@pytest.mark.parametrize('name', CASES)
def test_the_decoder_and_the_head_equal_the_reference(name):
  arrays, _ = golden(name)
  batch, places = packed(name)
  logits, out = outputs(name)
  last = build(name)[0].config.decoder.layers
  states = out['taps'] | {last: out['hidden']}
  for i, (row, slots) in enumerate(places):
    n = arrays['lengths'][i]
    assert len(slots) == n
    np.testing.assert_array_equal(batch['tokens'][row][slots],
                                  arrays['tokens'][i][:n])
    np.testing.assert_array_equal(batch['positions'][row][slots], np.arange(n))
    for key, state in {'input': out['input'], 'logits': logits,
                       'regressed': out['regressed'],
                       **{f'hidden/{l}': x for l, x in states.items()}}.items():
      close(state[row][slots], arrays[key][i][:n])


def test_adapters_beside_the_matrices_give_the_same():
  """Of an Emu-I whose matrices, with its adapters, are those of an Emu."""
  arrays, tensors = golden('emu_oblong')
  tensors = tiny_lora.emu_instruct(tensors, whole=True)
  found = emu_weights.LAYOUTS['emu_instruct']
  config = dataclasses.replace(build('emu_oblong')[0].config,
                               lora=multimodal.SIZES['emu-i'].lora)
  model, ours = found.build(config, 'float32')
  params = flax.traverse_util.unflatten_dict(weights_layout.load(
      found.rules(config), {name: Tensor(x) for name, x in tensors.items()},
      ours), sep='/')
  batch, places = packed('emu_oblong')
  with jax.default_matmul_precision('highest'):
    logits, out = jax.jit(model.apply)(
        {'params': params}, jax.tree.map(jnp.asarray, batch))
  for i, (row, slots) in enumerate(places):
    n = arrays['lengths'][i]
    # Sums in another order: 1.1e-5 with jax 0.12.0.1, less with 0.10.1.
    close(logits[row][slots], arrays['logits'][i][:n], 3e-5)
    close(out['regressed'][row][slots], arrays['regressed'][i][:n], 3e-5)


@pytest.mark.parametrize('name', CASES)
def test_the_entry_that_the_next_slot_takes_is_the_target(name):
  arrays, _ = golden(name)
  batch, places = packed(name)
  features = np.asarray(outputs(name)[1]['features'])
  if 'features' in arrays:
    entries = iter(arrays['features'].reshape(-1, features.shape[-1]))
  else:
    # The reference has one more at the end of each picture: its last entry
    # would predict the embedding of </image>. Nothing reads it.
    entries = iter(arrays['targets'][arrays['tokens'][
        (arrays['tokens'] == 9) | (arrays['tokens'] == 6)] == 9])
    masks = iter(arrays['target_mask'])
  for row, slots in places:
    takes = batch['visual'][row][slots]
    predicts = np.flatnonzero(takes[1:] >= 0)
    if 'targets' in arrays:
      tokens = batch['tokens'][row][slots]
      expected = next(masks)[:len(slots)].astype(bool)
      expected &= np.append(tokens[1:], 0) != 6
      np.testing.assert_array_equal(predicts, np.flatnonzero(expected))
    for t in predicts:
      np.testing.assert_allclose(
          features[row][takes[t + 1]], next(entries), atol=1e-4)
  assert next(entries, None) is None


@pytest.mark.parametrize('name', [name for name in CASES if 'emu_' in name])
def test_the_loss_of_text_equals_the_reference(name):
  batch, _ = packed(name)
  logits, _ = outputs(name)
  loss = next_token.cross_entropy(logits, jnp.asarray(batch['targets']))
  weights = batch['weights']
  np.testing.assert_allclose(np.sum(weights * loss) / weights.sum(),
                             golden(name)[0]['loss'], rtol=1e-5)


def prompts(name, key, images, *marks):
  case = CASES[name]
  return layout.prompt(
      list(documents(case[key], golden(name)[0][images], 'input', *marks)),
      reference.Ids(), layout_of(name), 30, 2, case['size'])


@pytest.mark.parametrize('name', CASES)
def test_greedy_answers_equal_the_reference(name):
  arrays, _ = golden(name)
  model, params = build(name)
  batch, lengths = prompts(
      name, 'prompts',
      'prompt_images' if 'prompt_images' in arrays else 'images')
  assert len(set(lengths.tolist())) > 1
  with jax.default_matmul_precision('highest'):
    tokens = sampling.generate(model, params, batch, lengths, 32, eos=-1)
  # No two best tokens were so close that rounding could swap them.
  assert arrays['gap'].min() > 1e-3
  np.testing.assert_array_equal(tokens, arrays['generated'])


@pytest.mark.parametrize('name', ['emu_square', 'emu2_nine'])
def test_drawn_features_equal_the_reference_which_has_no_cache(name):
  arrays, _ = golden(name)
  model, params = build(name)
  batch, lengths = prompts(name, 'draw', 'draw_images', '<image>')
  assert len(set(lengths.tolist())) == 2
  with jax.default_matmul_precision('highest'):
    features = sampling.generate_features(
        model, params, batch, lengths, layout_of(name).table_size)
  # Each is drawn from those before it: 1.9e-5 with jax 0.12.0.1.
  close(features, arrays['drawn'], 3e-5)


@pytest.mark.parametrize('name', ['emu_oblong', 'emu2_four'])
def test_flops_are_those_of_the_program(name):
  model, params = build(name)
  batch, _ = packed(name)
  program = jax.make_jaxpr(model.apply)({'params': params}, batch)
  size = CASES[name]['size']
  assert metrics.count_flops(program) == 2 * multimodal.flops(
      model.config, 34, 3, size)


def test_no_gradient_passes_through_the_targets():
  model, params = build('emu_oblong')
  batch, _ = packed('emu_oblong')
  gradient = jax.jit(jax.grad(lambda params: jnp.sum(model.apply(
      {'params': params}, batch)[1]['features'])))(params)
  assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_a_step_of_training_on_text():
  model, params = build('emu_oblong')
  objective = next_token.NextToken(model)
  batch = {'drawn': packed('emu_oblong')[0]}

  @jax.jit
  def step(params):
    def loss(params):
      total, weight = objective(params, {}, {}, batch, None, 0)[0]['next_token']
      return total / weight
    value, gradient = jax.value_and_grad(loss)(params)
    return value, gradient, jax.tree.map(
        lambda x, g: x - 0.01 * g, params, gradient)
  before, gradient, params = step(params)
  assert step(params)[0] < before
  # The regression is not learnt from text; all that a picture passes is.
  assert not np.any(gradient.pop('visual_head')['out']['kernel'])
  assert all(np.any(leaf) for leaf in jax.tree.leaves(gradient))


PUBLISHED = {
    'emu': dict(
        vision=dict(name='vit', size='eva01-g14', tap=-1, final_norm=False,
                    class_entry=True),
        connector=dict(name='causal_former', border=True),
        decoder=dict(size='llama-13b', vocab=32004),
        visual_head=dict(name='linear', target='connector')),
    'emu2': dict(
        vision=dict(name='vit', size='eva02-e14-plus', image_size=(448, 448),
                    tap=-1, final_norm=False, pool=4),
        connector=dict(name='linear', bias=False, border=True),
        decoder=dict(size='llama-33b', vocab=32272),
        visual_head=dict(name='linear', target='vision')),
}
COUNTS = {
    # The tower of 1,012,588,928 without its final norm and its head.
    'emu': dict(vision=1_012_588_928 - 2816 - 1_442_816,
                connector=2816 + 32 * 768 + 125_071_488 + 768 * 5120 + 5120,
                decoder=13_015_864_320 + 2 * 4 * 5120, visual_head=5120 ** 2),
    'emu2': dict(vision=4_350_093_568, connector=1792 * 6656,
                 decoder=32_532_564_480, visual_head=1792 * 6656),
}


@pytest.mark.parametrize('size', PUBLISHED)
def test_published_sizes(size):
  config = multimodal.SIZES[size]
  made = ml_collections.ConfigDict(dict(
      name=size, dtype='float32', image=dict(size=config.vision.image_size),
      model=dict(PUBLISHED[size], name='multimodal')))
  assert multimodal.build(made).config == config
  shapes = jax.eval_shape(
      multimodal.MultimodalDecoder(config).init, jax.random.key(0),
      multimodal.example_batch(config, config.vision.image_size))['params']
  count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
  assert {part: count(tree) for part, tree in shapes.items()} == COUNTS[size]
  assert count(shapes) == dict(
      emu=14_182_299_136, emu2=36_906_513_152)[size]
  assert config_lib.image_layout(made) == dict(
      emu=layout.ImageLayout(1, 32, border=True, whole=True),
      emu2=layout.ImageLayout(8, 8, border=True))[size]
  # No large parameter is without a place on a mesh.
  for name, leaf in sharding.named_leaves(shapes).items():
    sharding.spec(name, leaf.shape, dict(data=1, fsdp=16, tensor=2, sequence=1))


def test_variants_differ_in_words_and_cells():
  emu, emu2 = multimodal.SIZES['emu'], multimodal.SIZES['emu2']
  words = lambda config, vocab: dataclasses.replace(
      config, decoder=dataclasses.replace(config.decoder, vocab=vocab))
  assert multimodal.SIZES['emu-i'] == dataclasses.replace(
      words(emu, 32006), lora=lora.LoraConfig(16, 16, 0.05, '^attention/'))
  assert multimodal.SIZES['emu2-gen'] == emu2
  chat = multimodal.SIZES['emu2-chat']
  assert chat == dataclasses.replace(
      words(emu2, 32274), vision=dataclasses.replace(emu2.vision, pool=2))
  assert chat.image_layout((448, 448)).table_size == 256


def test_buckets_of_32_queries():
  found = causal_former.buckets(40, 32, 128)
  assert (found[0] == 0).all() and found.max() == 22
  # One bucket for each distance up to 15, then log(d / 16) / log(8) * 16.
  assert found[39].tolist()[::-1] == [
      *range(16), *([16] * 3), *([17] * 2), *([18] * 3), *([19] * 3),
      *([20] * 4), *([21] * 4), *([22] * 5)]


def test_a_former_has_no_cells():
  found = layout_of('emu_oblong')
  assert (found.rows, found.cols, found.grid) == (1, 6, None)
  assert found.slots()[0] == ('<image>', *['<patch>'] * 6, '</image>')
  padded = document.image(np.zeros((10, 15, 3), np.uint8), valid=(0, 0, 5, 5))
  assert found.cells(padded) == found.box
  assert layout_of('emu2_nine').cells(document.image(
      np.zeros((24, 24, 3), np.uint8), valid=(0, 0, 8, 9))) == (0, 0, 1, 2)


@pytest.mark.parametrize('name, part, fields, message', [
    ('emu_oblong', 'visual_head', dict(target='vision'), "is 'vision', but no"),
    ('emu_oblong', 'visual_head', dict(target='pixels'), "allowed: vision, c"),
    ('emu_oblong', 'visual_head', dict(name='conv'), "allowed: linear"),
    ('emu_oblong', 'connector', dict(buckets=1), 'buckets is 1; allowed: from'),
    ('emu_oblong', 'connector', dict(bias=False), "has no field 'bias'"),
    ('emu2_four', 'connector', dict(name='mlp'), "only 'linear' can do"),
    ('emu2_four', 'vision', dict(pool=4), r'pool is 4; .* patches, \(6, 6\)'),
    ('emu2_four', 'vision', dict(tap=None), 'final_norm is False; -1 is'),
    ('emu2_four', 'vision', dict(class_entry=True, class_token=False,
                                 pooling='mean'), 'there is none to enter')])
def test_choices_that_do_not_exist(name, part, fields, message):
  with pytest.raises(ValueError, match=message):
    build.__wrapped__(name, **{part: fields})


def test_a_head_needs_pictures():
  text = build('emu2_four')[0].config.decoder
  with pytest.raises(ValueError, match='there is nothing to predict'):
    multimodal.build(ml_collections.ConfigDict(dict(
        dtype='float32', model=dict(
            vision=None, decoder=TWO['decoder'],
            visual_head=LINEAR['visual_head']))))
  plain = multimodal.MultimodalDecoder(multimodal.MultimodalConfig(text))
  batch = multimodal.example_batch(plain.config, None)
  with pytest.raises(ValueError, match='model.visual_head is None'):
    sampling.generate_features(plain, {}, batch, jnp.ones(1, int), 2)

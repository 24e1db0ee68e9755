"""EVEv2 against its reference: every stage, the loss, gradients, answers.

The arrays in tests/golden/eve_v2{,_parts}.npz hold random weights (norms and
biases, too, and both sets) under the names of the released files, pictures, and
what EVEv2's own model made of a batch of three documents, of which one has two
pictures and one none, padded on the right (torch 2.13.0, transformers 4.46.3,
fp32, CPU, SDPA): of the hidden states every fifth or fourth channel. In 'parts'
the norms have one set of weights. Gradients are in files of their own: in
'parts' of all 53 tensors, else of a sample, 22 of 81.
"""

import dataclasses
import functools
import hashlib

import flax.traverse_util
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import reference

from mmgen import weights
from mmgen.data import document
from mmgen.data import image
from mmgen.data import layout
from mmgen.models import attention
from mmgen.models import decoder
from mmgen.models import modality
from mmgen.models import multimodal
from mmgen.models import sampling
from mmgen.objectives import next_token
from mmgen.training import optimizer
from mmgen.training import step as step_lib
from mmgen.weights import layout as layout_lib

# A document is pictures and words; a prompt has no answer.
CASES = {
    'eve_v2': dict(
        size=(36, 36), grid=(6, 6), vision=dict(patch=3, hidden=14),
        decoder=dict(
            vocab=43, layers=3, width=24, heads=3, kv_heads=1, hidden=33,
            norm_eps=1e-6, rope_theta=1e6, qkv_bias=True, remat=True,
            modality_weights=('norms', 'attention', 'mlp')),
        documents=[(0, 'ab', 'cde'), ('f', 1, 'gh', 2, '', 'ijkl'),
                   ('mn', 'o', 'pq')],
        prompts=[(0, 'ab'), ('fgh', 1, 2), ('qrst',)], stride=5,
        sampled=(22, 81)),
    'eve_v2_parts': dict(
        size=(32, 32), grid=(4, 4), vision=dict(patch=4, hidden=10),
        decoder=dict(
            vocab=47, layers=2, width=20, heads=5, hidden=31, norm_eps=1e-3,
            rope_theta=100.0, qkv_bias=True, unroll=True,
            modality_weights=('attention', 'mlp')),
        documents=[('x', 0, 1, 'cde'), (2, 'f', 'ghi'), ('jklm', 'nop')],
        prompts=[(0, 1, 'ab'), (2,), ('q', 2, 'rs')], stride=4,
        sampled=(53, 53)),
}


@functools.cache
def golden(name):
  return reference.load(name)


@functools.cache
def build(name):
  """(model, its parameters): nothing but a config."""
  case, tensors = CASES[name], golden(name)[1]
  config = ml_collections.ConfigDict(dict(dtype='float32', model=dict(
      decoder=case['decoder'], connector=dict(name='identity'),
      vision=dict(name='conv_patches', width=case['decoder']['width'],
                  **case['vision']))))
  model = multimodal.build(config)
  params = parameters(tensors, model.config)
  shapes = jax.eval_shape(
      model.init, jax.random.key(0),
      multimodal.example_batch(model.config, case['size']))['params']
  assert jax.tree.map(np.shape, params) == jax.tree.map(
      lambda x: x.shape, shapes)
  return model, jax.tree.map(jnp.asarray, params)


def parameters(tensors, config):
  """Both sets of the decoder, and the patch embedding."""
  marked = {}
  for name, x in tensors.items():
    marked[name.replace('moe_', '') if 'moe_' in name else name] = x
  text = reference.llama(tensors, config.decoder)
  second = reference.llama(marked, config.decoder)['stack']['blocks']
  text['stack']['blocks']['visual'] = modality.copied(
      second, config.decoder.modality_weights)
  tower = 'model.vision_tower.'
  conv = lambda name: reference.dense({
      f'{name}.weight': (x := tensors[f'{name}.weight']).transpose(
          0, 2, 3, 1).reshape(len(x), -1),
      f'{name}.bias': tensors[f'{name}.bias']}, name)
  return {'decoder': text, 'vision': {
      'patch_embedding': conv(f'{tower}patch_embedding.0'),
      'cell_embedding': conv(f'{tower}patch_embedding.2'),
      'class_embedding': tensors[f'{tower}class_embedding'],
      'split_embedding': tensors[f'{tower}split_embedding']}}


def documents(name, entries, answers):
  fit = dict(size=CASES[name]['size'], fit='area_up', kernel='bicubic',
             grid=CASES[name]['grid'])
  for parts in entries:
    spans = [document.image(golden(name)[0][f'picture/{part}'])
             if isinstance(part, int) else document.text(part, 'input')
             for part in parts[:len(parts) - answers]]
    spans += [document.text(part) for part in parts[len(parts) - answers:]]
    yield image.fit_document(document.Document(tuple(spans)), **fit)


def layout_of(name):
  return build(name)[0].config.vision.image_layout(CASES[name]['size'])


def batches(name, arrangement):
  return reference.arranged(
      list(documents(name, CASES[name]['documents'], 1)), layout_of(name),
      arrangement, dict(packed=(48, 3), separate=(30, 2)))


@pytest.mark.parametrize('name', CASES)
def test_pixels_equal_the_reference(name):
  arrays, _ = golden(name)
  for i, fitted in enumerate(documents(name, [(0,), (1,), (2,)], 0)):
    y, x = arrays['sizes'][i]
    pixels = fitted.spans[0]
    assert pixels.valid == (0, 0, y, x)
    assert hashlib.sha256(np.ascontiguousarray(
        pixels.data[:y, :x])).hexdigest() == arrays[f'pixels/{i}']


@pytest.mark.parametrize('name, arrangement', [
    ('eve_v2', 'packed'), ('eve_v2_parts', 'separate')])
def test_every_stage_and_gradient_equals_the_reference(name, arrangement):
  arrays, _ = golden(name)
  model, params = build(name)
  batch, places = batches(name, arrangement)
  layers = model.config.decoder.layers
  objective = next_token.NextToken(model)

  def run(params):
    total, weight = objective(
        params, {}, {}, {'source': batch}, None, 0)[0]['next_token']
    return total / weight

  with jax.default_matmul_precision('highest'):
    loss, gradient = jax.jit(jax.value_and_grad(run))(params)
    logits, out = jax.jit(lambda params: model.apply(
        {'params': params}, batch, taps=tuple(range(layers))))(params)
  ordered = functools.partial(reference.in_order, places)
  assert arrays['lengths'].tolist() == [
      slots.sum() for _, (_, slots) in sorted(places.items())]
  visual, inputs = ordered(batch['visual']) >= 0, ordered(out['input'])
  tables = [arrays[f'table/{i}'] for i in range(3)]
  assert reference.error(inputs[visual], np.concatenate(tables)) < 1e-5
  for layer, state in (out['taps'] | {layers: out['hidden']}).items():
    assert reference.error(ordered(state)[:, ::CASES[name]['stride']],
                           arrays[f'hidden/{layer}']) < 1e-5, layer
  assert reference.error(ordered(logits), arrays['logits']) < 1e-5
  np.testing.assert_allclose(loss, arrays['loss'], rtol=1e-6)

  got = dict(layout_lib.export(
      weights.FAMILIES['eve_v2'].rules(model.config),
      flax.traverse_util.flatten_dict(gradient, sep='/'), 'float32'))
  stored = reference.load(f'{name}_gradients')[1]
  assert (len(stored), len(got)) == CASES[name]['sampled']
  assert sum('moe_' in key for key in stored) > 7
  for key, wanted in stored.items():
    assert reference.error(got[key], wanted) < 3e-5, key


@pytest.mark.parametrize('name', CASES)
def test_greedy_answers_equal_the_reference(name):
  arrays, _ = golden(name)
  model, params = build(name)
  batch, lengths = layout.prompt(
      list(documents(name, CASES[name]['prompts'], 0)), reference.Ids(),
      layout_of(name), 40, 2, CASES[name]['size'])
  assert len(set(lengths.tolist())) == 3
  with jax.default_matmul_precision('highest'):
    tokens = sampling.generate(model, params, batch, lengths, 32, eos=-1)
  # No two best tokens were so close that rounding could swap them.
  assert arrays['gap'] > 1e-3
  np.testing.assert_array_equal(tokens, arrays['generated'])


def test_copies_and_words_alone_give_the_decoder_without_a_second_set():
  model, params = build('eve_v2_parts')
  c = model.config.decoder
  blocks = params['decoder']['stack']['blocks']
  first = {name: leaf for name, leaf in blocks.items() if name != 'visual'}
  both = lambda blocks: {'params': {
      **params['decoder'], 'stack': params['decoder']['stack'] | {
          'blocks': blocks}}}
  x = jax.random.normal(jax.random.key(0), (2, 11, c.width))
  positions = jnp.tile(jnp.arange(11)[None], (2, 1))
  seen = jax.random.bernoulli(jax.random.key(1), 0.5, (2, 11))
  run = lambda config, blocks, visual: decoder.Decoder(config).apply(
      both(blocks), x, attention.Mask(causal=True), positions,
      visual_BT=visual)[0]
  plain = run(dataclasses.replace(c, modality_weights=()), first, None)
  run = jax.jit(functools.partial(run, c))
  copies = first | {'visual': modality.copied(first, c.modality_weights)}
  np.testing.assert_allclose(run(copies, seen), plain, atol=1e-5)
  np.testing.assert_allclose(run(blocks, ~seen & seen), plain, atol=1e-5)
  assert np.abs(run(blocks, seen) - plain).max() > 0.1


def test_both_sets_train_from_one_start(monkeypatch):
  monkeypatch.setattr(modality, 'CUTS', 2)  # compiles in less time
  case = CASES['eve_v2_parts']
  config = ml_collections.ConfigDict(dict(
      seed=0, dtype='float32', optimizer=dict(
          name='adamw', peak_lr=0.01, schedule='constant', warmup=0,
          min_ratio=0.0, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.0, clip=1.0,
          groups={}, accumulate=1),
      model=dict(decoder=dict(case['decoder'], layers=1),
                 connector=dict(name='identity'),
                 vision=dict(name='conv_patches', width=20, **case['vision']))))
  model = multimodal.build(config)
  params = model.init(jax.random.key(0), multimodal.example_batch(
      model.config, case['size']))['params']
  made = optimizer.make_optimizer(config.optimizer, 9, params)
  step = step_lib.make_train_step(next_token.NextToken(model), made, config)
  state = step_lib.init_state(jax.tree.map(jnp.copy, params), made)
  batch, _ = batches('eve_v2_parts', 'separate')
  losses = []
  for _ in range(3):
    state, metrics = step(state, {}, {'source': batch})
    losses.append(float(metrics['loss']))
  assert losses[0] > losses[1] > losses[2]
  before, after = (tree['decoder']['stack']['blocks']
                   for tree in (params, state['params']))
  for part, leaves in before['visual'].items():
    jax.tree.map(np.testing.assert_array_equal, leaves, before[part])
    for a, b, start in zip(*map(jax.tree.leaves, (
        after['visual'][part], after[part], leaves))):
      assert np.abs(a - b).max() > 1e-4 < np.abs(a - start).max()

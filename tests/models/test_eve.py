"""EVE-7B against its reference: every stage, losses, gradients, answers.

The arrays in tests/golden/eve_7b{,_hd}.npz hold random weights (norms and
biases, too) under the names of the released files, pictures of any size, and
what EVE's own model made of a batch of three of them and a row of text alone,
padded on the right (torch 2.13.0, transformers 4.46.3, fp32, CPU, eager
attention): of the hidden states every fifth channel. In 'hd' the teacher has
one cell for 2 x 2 of the model's. Gradients of the sum of both losses are in
files of their own, of a sample: 23 of the 111 trained tensors, in 'hd' 19 of
81, some of each module. All of them are compared after 200 steps only, in
tests/test_trajectories_decoders.py.
"""

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
from mmgen.models import multimodal
from mmgen.models import sampling
from mmgen.objectives import alignment
from mmgen.weights import eve
from mmgen.weights import layout as layout_lib

# (words, picture, question, answer); a prompt has no answer.
DOCUMENTS = [('', 0, 'ab', 'cde'), ('f', 1, '', 'ghijkl'), ('', 2, 'm', 'nop'),
             ('qrs', None, 't', 'uvwxyz')]
CASES = {
    'eve_7b': dict(
        image=dict(size=(40, 40), fit='pad', kernel='bicubic', grid=(5, 5)),
        vision=dict(patch=4, width=16),
        decoder=dict(vocab=43, layers=8, width=18, heads=3, hidden=26),
        teacher=dict(patch=8, width=16, layers=3, heads=4, hidden=20),
        prompts=[('', 0, 'ab'), ('f', 1, ''), ('qrst', None, '')],
        sampled=(23, 111)),
    'eve_7b_hd': dict(
        image=dict(size=(36, 36), fit='pad_pairs', kernel='bicubic',
                   grid=(6, 6)),
        vision=dict(patch=3, width=24),
        decoder=dict(vocab=45, layers=5, width=20, heads=5, kv_heads=1,
                     hidden=29, norm_eps=1e-3, rope_theta=100.0),
        teacher=dict(patch=12, width=8, layers=2, heads=2, hidden=18,
                     norm_eps=1e-3),
        prompts=[('zy', 0, 'ab'), ('', 1, 'fgabc'), ('', 2, 'q')],
        sampled=(19, 81)),
}


@functools.cache
def golden(name):
  return reference.load(name)


@functools.cache
def build(name):
  """(objective, trained and frozen parameters): nothing but a config."""
  case, tensors = CASES[name], golden(name)[1]
  config = ml_collections.ConfigDict(dict(dtype='float32', model=dict(
      decoder=case['decoder'], vision=dict(name='eve', **case['vision']),
      connector=dict(name='mlp'))))
  teacher = ml_collections.ConfigDict(dict(
      size='clip-l14', image_size=case['image']['size'], **case['teacher']))
  model = multimodal.build(config)
  objective = alignment.build(model, teacher)
  vision, connector = reference.eve(tensors, model.config.vision, 'model.')
  trained = {
      'vision': vision, 'connector': connector,
      'decoder': reference.llama(tensors, model.config.decoder),
      'aligner': reference.patch_aligner(
          tensors, 'model.vision_tower_compressor.')}
  frozen = {'teacher': reference.clip_tower(
      tensors, objective.teacher.config,
      'model.vision_clip.backbone.vision_model.')}
  example = multimodal.example_batch(model.config, case['image']['size'])
  shapes = jax.eval_shape(lambda key: objective.init(key) | model.init(
      key, example)['params'], jax.random.key(0))
  assert jax.tree.map(np.shape, trained | frozen) == jax.tree.map(
      lambda x: x.shape, shapes)
  return objective, *jax.tree.map(jnp.asarray, (trained, frozen))


def documents(name, entries):
  for words, picture, question, *answer in entries:
    spans = [document.text(words, 'input')] if words else []
    if picture is not None:
      spans.append(document.image(golden(name)[0][f'picture/{picture}']))
    spans += [document.text(question, 'input'), *map(document.text, answer)]
    yield image.fit_document(document.Document(tuple(spans)),
                             **CASES[name]['image'])


def layout_of(name):
  return build(name)[0].model.config.vision.image_layout(
      CASES[name]['image']['size'])


def batches(name, arrangement):
  return reference.arranged(
      list(documents(name, DOCUMENTS)), layout_of(name), arrangement,
      dict(packed=(68, 3), separate=(50, 1)), CASES[name]['image']['size'])


@pytest.mark.parametrize('name', CASES)
def test_pixels_equal_the_reference(name):
  arrays, _ = golden(name)
  for i, fitted in enumerate(documents(name, DOCUMENTS[:3])):
    pixels = next(x for x in fitted.spans if x.kind == 'image')
    assert hashlib.sha256(pixels.data).hexdigest() == arrays['canvas'][i]
    assert pixels.valid == tuple(arrays['valid'][i])


@pytest.mark.parametrize('name, arrangement', [
    ('eve_7b', 'packed'), ('eve_7b_hd', 'separate')])
def test_every_stage_and_gradient_equals_the_reference(name, arrangement):
  arrays, _ = golden(name)
  objective, trained, frozen = build(name)
  batch, places = batches(name, arrangement)
  layers = objective.model.config.decoder.layers

  def run(trained):
    sums, _ = objective(trained, frozen, {}, {'source': batch}, None, 0)
    losses = {key: total / weight for key, (total, weight) in sums.items()}
    return losses['next_token'] + losses['alignment'], losses

  def forward(trained):
    return objective.model.apply({'params': trained}, batch,
                                 taps=tuple(range(layers)))

  with jax.default_matmul_precision('highest'):
    (loss, losses), gradient = jax.jit(jax.value_and_grad(
        run, has_aux=True))(trained)
    logits, out = jax.jit(forward)(trained)
  states = out['taps'] | {layers: out['hidden']}
  ordered = functools.partial(reference.in_order, places)
  assert arrays['lengths'].tolist() == [
      slots.sum() for _, (_, slots) in sorted(places.items())]
  visual, inputs = ordered(batch['visual']) >= 0, ordered(out['input'])
  tables = [arrays[f'table/{i}'] for i in range(3)]
  assert reference.error(inputs[visual], np.concatenate(tables)) < 1e-5
  for layer, state in states.items():
    assert reference.error(
        ordered(state)[:, ::5], arrays[f'hidden/{layer}']) < 2e-5, layer
  assert reference.error(ordered(logits), arrays['logits']) < 2e-5
  np.testing.assert_allclose(losses['alignment'], arrays['alignment'],
                             rtol=1e-6)
  np.testing.assert_allclose(loss, arrays['loss'], rtol=1e-6)

  # The aligning layer alone, on the cells of each picture.
  c = objective.aligner.config
  slots, valid = objective._slots(batch)
  hidden = {l: alignment._gather(states[l], slots) for l in c.taps}
  found, _ = objective.aligner.apply({'params': trained['aligner']}, hidden)
  valid = np.asarray(valid).reshape(found.shape[:2])
  wanted = [arrays[f'prediction/{i}'] for i in range(3)]
  cells = np.concatenate([np.asarray(x)[there] for x, there in zip(
      found, valid)])
  by_place = sorted(range(3), key=lambda i: (
      places[i][0], np.flatnonzero(places[i][1])[0]))
  assert reference.error(
      cells, np.concatenate([wanted[i] for i in by_place])) < 2e-5

  config = eve.AlignedConfig(**vars(objective.model.config), aligner=c)
  got = dict(layout_lib.export(
      weights.FAMILIES['eve_aligned'].rules(config),
      flax.traverse_util.flatten_dict(gradient, sep='/'), 'float32'))
  stored = reference.load(f'{name}_gradients')[1]
  assert (len(stored), len(got)) == CASES[name]['sampled']
  for key, wanted in stored.items():
    assert reference.error(got[key], wanted) < 3e-5, key


@pytest.mark.parametrize('name', CASES)
def test_greedy_answers_equal_the_reference(name):
  arrays, _ = golden(name)
  objective, trained, _ = build(name)
  batch, lengths = layout.prompt(
      list(documents(name, CASES[name]['prompts'])), reference.Ids(),
      layout_of(name), 48, 1, CASES[name]['image']['size'])
  assert len(set(lengths.tolist())) == 3
  with jax.default_matmul_precision('highest'):
    tokens = sampling.generate(
        objective.model, trained, batch, lengths, 32, eos=-1)
  # No two best tokens were so close that rounding could swap them.
  assert arrays['gap'] > 1e-3
  np.testing.assert_array_equal(tokens, arrays['generated'])

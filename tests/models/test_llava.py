"""LLaVA-1.5 against its reference: every stage, gradients, and answers.

The arrays in tests/golden/llava_{square,pictures}.npz hold random weights
(norms and biases, too) under the names of the released files, pictures, and
what LlavaForConditionalGeneration of transformers 4.56.2 made of a batch of
three conversations, padded on the right; answers were generated from prompts
padded on the left (torch 2.13.0, fp32, CPU, eager attention). Gradients of the
loss of the answers are in files of their own.
"""

import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import reference

from mmgen.data import document
from mmgen.data import layout
from mmgen.models import multimodal
from mmgen.models import sampling
from mmgen.objectives import next_token

# A conversation is a list of turns (pictures, question, answer); `words` stand
# between the pictures. Two pixels are left over at two edges of 'square'.
CASES = {
    'llava_square': dict(
        vision=dict(image_size=(17, 17), patch=5, layers=3, width=18, heads=3,
                    hidden=31),
        decoder=dict(vocab=43, layers=2, width=28, heads=7, hidden=44),
        words='',
        documents=[[(1, 'ab', 'xyz'), (0, 'cde', 'f')], [(1, 'q', 'rs')],
                   [(0, 'hijklm', 'no')]]),
    'llava_pictures': dict(
        vision=dict(image_size=(8, 8), patch=4, layers=4, width=20, heads=5,
                    hidden=26, norm_eps=1e-3),
        decoder=dict(vocab=47, layers=3, width=24, heads=3, kv_heads=1,
                     hidden=30, norm_eps=1e-3, rope_theta=100.0),
        words=('to', 'uvw', ''),
        documents=[[(2, 'a', 'bcd')], [(1, 'efg', 'h')],
                   [(1, 'i', 'jk'), (1, 'lm', 'n'), (0, '', 'opqr')]]),
}


@functools.cache
def golden(name):
  return reference.load(name)


def parameters(weights, config):
  """Trained and frozen parameters; without weights of the tower, the former."""
  trained = {
      'connector': {
          'up': reference.dense(weights, 'multi_modal_projector.linear_1'),
          'down': reference.dense(weights, 'multi_modal_projector.linear_2')},
      'decoder': reference.llama(weights, config.decoder, 'language_model.')}
  prefix = 'vision_tower.vision_model.'
  if not any(key.startswith(prefix) for key in weights):
    return trained
  return trained, {'vision': reference.clip_tower(
      weights, config.vision, prefix)}


@functools.cache
def build(name):
  """(model, trained and frozen parameters): nothing but a config."""
  config = ml_collections.ConfigDict(dict(dtype='float32', model=dict(
      vision=dict(name='vit', **CASES[name]['vision']),
      connector=dict(name='mlp'), decoder=CASES[name]['decoder'])))
  model = multimodal.build(config)
  trained, frozen = parameters(golden(name)[1], model.config)
  shapes = jax.eval_shape(
      model.init, jax.random.key(0), multimodal.example_batch(
          model.config, model.config.vision.image_size))['params']
  assert jax.tree.map(np.shape, trained | frozen) == jax.tree.map(
      lambda x: x.shape, shapes)
  return model, *jax.tree.map(jnp.asarray, (trained, frozen))


def documents(name):
  case, images = CASES[name], iter(golden(name)[0]['images'])
  between = case['words'] or ('', '', '')
  found = []
  for turns, words in zip(case['documents'], between):
    spans = []
    for i, (pictures, question, answer) in enumerate(turns):
      spans += [document.marks('<eos>', role='target')] if i else []
      spans.append(document.marks('<user>'))
      # 'to' between two pictures, 'uvw' before one.
      for j in range(pictures):
        if words and (j == pictures - 1):
          spans.append(document.text(words, 'input'))
        spans.append(document.image(next(images)))
      spans += [document.text(question, 'input'),
                document.marks('<assistant>'), document.text(answer)]
    found.append(document.Document(tuple(spans)))
  assert next(images, None) is None
  return found


def batches(name, arrangement):
  size = CASES[name]['vision']['image_size']
  return reference.arranged(
      documents(name), build(name)[0].config.vision.image_layout(size),
      arrangement, dict(packed=(50, 4), separate=(31, 3)), size)


@pytest.mark.parametrize('arrangement', ['packed', 'separate'])
@pytest.mark.parametrize('name', CASES)
def test_every_stage_and_gradient_equals_the_reference(name, arrangement):
  arrays, _ = golden(name)
  model, trained, frozen = build(name)
  batch, places = batches(name, arrangement)
  c = model.config
  objective = next_token.NextToken(model)

  @functools.partial(jax.value_and_grad, has_aux=True)
  def run(trained):
    sums, _ = objective(trained, frozen, {}, {'source': batch}, None, 0)
    total, weight = sums['next_token']
    logits, out = model.apply({'params': trained | frozen}, batch,
                              taps=tuple(range(c.decoder.layers)))
    tower, table = model.apply({'params': trained | frozen}, method=lambda m: (
        m.vision(batch['images'], batch['image_box'])[0],
        m.connector(m.vision(batch['images'], batch['image_box'])[0])[0]))
    return total / weight, (logits, out, tower, table)

  with jax.default_matmul_precision('highest'):
    (loss, (logits, out, tower, table)), gradient = jax.jit(run)(trained)

  # The tower: the output of its last block but one, without the class token.
  pictures = {bytes(x): i for i, x in enumerate(arrays['images'])}
  seen = 0
  for b, i in np.ndindex(table.shape[:2]):
    number = pictures.get(bytes(np.asarray(batch['images'][b, i])))
    if number is not None:
      seen += 1
      assert reference.error(tower[b, i], arrays['tower'][number]) < 1e-5
      assert reference.error(table[b, i], arrays['connector'][number]) < 1e-5
  assert seen == len(pictures)

  states = out['taps'] | {c.decoder.layers: out['hidden']}
  for i, (row, slots) in places.items():
    n = arrays['lengths'][i]
    np.testing.assert_array_equal(
        batch['tokens'][row][slots], arrays['tokens'][i, :n])
    # Reference: what is not learnt has the target -100, one place later.
    np.testing.assert_array_equal(
        np.where(batch['weights'][row] > 0, batch['targets'][row], -100)[
            slots][:-1], arrays['targets'][i, 1:n])
    for layer, state in states.items():
      assert reference.error(
          state[row][slots], arrays[f'hidden/{layer}'][i, :n]) < 1e-5, layer
    assert reference.error(
        logits[row][slots], arrays['logits'][i, :n]) < 1e-5
  np.testing.assert_allclose(loss, arrays['loss'], rtol=1e-6)

  wanted = parameters(reference.load(f'{name}_gradients')[0], c)
  assert jax.tree.structure(gradient) == jax.tree.structure(wanted)
  for (path, got), want in zip(jax.tree_util.tree_leaves_with_path(gradient),
                               jax.tree.leaves(wanted)):
    assert reference.error(got, want) < 1e-5, jax.tree_util.keystr(path)


@pytest.mark.parametrize('name', CASES)
def test_greedy_answers_equal_the_reference(name):
  arrays, _ = golden(name)
  model, trained, frozen = build(name)
  size = CASES[name]['vision']['image_size']
  batch, lengths = layout.prompt(
      documents(name), reference.Ids(), model.config.vision.image_layout(size),
      24, 2, size)
  assert len(set(lengths.tolist())) == 3
  with jax.default_matmul_precision('highest'):
    tokens = sampling.generate(
        model, trained | frozen, batch, lengths, 32, eos=-1)
  # No two best tokens were so close that rounding could swap them.
  assert arrays['gap'].min() > 1e-3
  np.testing.assert_array_equal(tokens, arrays['generated'])


@pytest.mark.parametrize('size, count', [
    ('llava-1.5-7b', 7_062_902_784), ('llava-1.5-13b', 13_350_839_296)])
def test_published_sizes_have_their_parameters(size, count):
  config = multimodal.SIZES[size]
  assert (config.vision.tap, config.vision.mlp) == (-2, 'quick_gelu')
  shapes = jax.eval_shape(
      multimodal.MultimodalDecoder(config).init, jax.random.key(0),
      multimodal.example_batch(config, (336, 336)))['params']
  total = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
  assert total(shapes) == count
  # The whole tower is there: the last block and norm, too, which nobody reads.
  assert total(shapes['vision']) == 303_507_456
  assert config.vision.image_layout((336, 336)).table_size == 576

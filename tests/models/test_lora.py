"""Low-rank adapters against PEFT, and what they leave alone.

In tests/golden/weights/peft_{heads,all} PEFT 0.21.2 stored adapters of the
LlamaForCausalLM whose weights are in tests/golden/llama_tiny.npz (grouped
queries): of the projections of attention, rank 16, and of all, rank 5.
tests/golden/lora_llama.npz has what the model gave with each (transformers
4.46.3, torch 2.13.0, float64) for two rows of tokens, and the gradients of its
loss, under the names of the adapters.
"""

import dataclasses
import functools

import flax.errors
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import tiny_lora

from mmgen.models import lora
from mmgen.models import multimodal
from mmgen.models import transformer
from mmgen.objectives import next_token
from mmgen.weights import files


@functools.cache
def base_params():
  return {'decoder': jax.tree.map(jnp.asarray, reference.llama(
      reference.load('llama_tiny')[1], tiny_lora.build().config.decoder))}


@pytest.mark.parametrize('name, unroll', [('heads', False), ('all', True)])
def test_outputs_and_gradients_equal_the_reference(name, unroll):
  arrays, _ = reference.load('lora_llama')
  model = tiny_lora.build(tiny_lora.options(name), unroll=unroll)
  c = model.config
  assert (c.lora.rank, c.lora.alpha) == {'heads': (16, 16), 'all': (5, 7)}[name]
  names = lora.targets(c.lora, c.decoder.stack)
  assert len(names) == {'heads': 4, 'all': 7}[name]
  given = jax.tree.map(jnp.asarray, tiny_lora.ours(files.open(
      reference.GOLDEN / 'weights' / f'peft_{name}'), names))
  inputs, T = tiny_lora.batch(arrays['tokens']), arrays['tokens'].shape[1]
  # Its dropout is off without a key, and in evaluation.
  plain = dataclasses.replace(c, lora=dataclasses.replace(c.lora, dropout=0.0))
  objective = next_token.NextToken(multimodal.MultimodalDecoder(plain))

  @jax.jit
  def run(adapters, params):
    def loss(adapters):
      sums, _ = objective(adapters, params, {}, {'source': inputs}, None, 0)
      return sums['next_token'][0] / sums['next_token'][1]
    logits, _ = model.apply({'params': params | adapters}, inputs)
    # Without dropout the merged model is the same.
    merged = tiny_lora.build(unroll=unroll).apply(
        {'params': lora.merge(params | adapters, c.lora)}, inputs)[0]
    last, _ = model.apply(  # as in generation
        {'params': params | adapters}, inputs, jnp.full(2, T),
        multimodal.init_cache(c, 2, T), method='prefill')
    return logits, merged, last, *jax.value_and_grad(loss)(adapters)

  with jax.default_matmul_precision('highest'):
    logits, merged, last, loss, gradients = run(given, base_params())
  assert reference.error(logits, arrays[f'{name}/logits']) < 1e-5
  assert reference.error(merged, logits) < 1e-5
  assert reference.error(last, logits[:, -1]) < 1e-5
  np.testing.assert_allclose(loss, arrays[f'{name}/loss'], rtol=1e-6)
  wanted = tiny_lora.ours({key.removeprefix(f'{name}/gradient/'): x
                           for key, x in arrays.items()}, names)
  assert jax.tree.structure(gradients) == jax.tree.structure(wanted)
  for (path, got), want in zip(jax.tree_util.tree_leaves_with_path(gradients),
                               jax.tree.leaves(wanted)):
    assert reference.error(got, want) < 1e-5, jax.tree_util.keystr(path)


def test_begins_as_the_model_that_it_adapts():
  model, base = tiny_lora.build(tiny_lora.options('all')), tiny_lora.build()
  inputs = tiny_lora.batch(reference.load('lora_llama')[0]['tokens'])

  @jax.jit
  def run(key):
    params = model.init(key, inputs)['params']
    before = base.init(key, inputs)['params']
    return params, before, model.apply({'params': params}, inputs)[0], (
        base.apply({'params': before}, inputs)[0])

  params, before, logits, wanted = run(jax.random.key(0))
  np.testing.assert_array_equal(logits, wanted)
  adapters = params.pop('lora')
  jax.tree.map(np.testing.assert_array_equal, params, before)
  jax.tree.map(np.testing.assert_array_equal, before, lora.merge(
      {**params, 'lora': adapters}, model.config.lora))
  for name, leaf in flax.traverse_util.flatten_dict(
      adapters['blocks'], sep='/').items():
    if name.endswith('/b'):
      assert not leaf.any(), name
    else:  # as torch's Linear: uniform, and in each layer another
      bound = leaf.shape[1] ** -0.5
      assert 0.9 * bound < np.abs(leaf).max() <= bound, name
      np.testing.assert_allclose(
          np.std(leaf), bound / 3 ** 0.5, rtol=0.15, err_msg=name)
      assert not np.array_equal(leaf[0], leaf[1]), name


# ---------------------------------------------------------------------------
# Dropout


def test_dropout_is_of_what_an_adapter_reads():
  config = lora.LoraConfig(rank=2, alpha=6, dropout=0.25)
  keys = jax.random.split(jax.random.key(5), 3)
  a, b, x, y = (jax.random.normal(key, shape) for key, shape in zip(
      jax.random.split(jax.random.key(6), 4),
      ((2, 40, 2), (2, 2, 12), (3, 50, 40), (3, 50, 4, 3))))
  tree = {'blocks': {'attention': {
      part: {'a': a, 'b': b} for part in ('query', 'key')}}}
  layered = lora.adapters(config, tree, keys)

  def masks(layer, name, rows=slice(None)):
    """What is kept, seen through A and B that pass one channel each."""
    one = dataclasses.replace(
        jax.tree.map(lambda leaf: leaf[layer], layered),
        blocks={'attention': {part: {'a': jnp.eye(40), 'b': jnp.eye(40)}
                              for part in ('query', 'key')}})
    one = dataclasses.replace(one, keys_LB=one.keys_LB[rows])
    ones = jnp.ones((3, 50, 40))[rows]
    return np.asarray(lora.add(jnp.zeros_like(ones), ones, one, name)) / 3

  mask = masks(0, 'attention/query')
  np.testing.assert_allclose(np.unique(mask), [0, 4 / 3], rtol=1e-6)
  np.testing.assert_allclose(np.mean(mask), 1, atol=0.03)
  layer = jax.tree.map(lambda leaf: leaf[0], layered)
  np.testing.assert_allclose(
      lora.add(y, x, layer, 'attention/query'),
      y + 3 * ((x * mask) @ a[0] @ b[0]).reshape(y.shape), rtol=1e-4, atol=1e-4)
  # A row's draws are its own, wherever it stands; each adapter's, too.
  np.testing.assert_array_equal(
      masks(0, 'attention/query', np.array([2])), mask[2:])
  for other in (masks(1, 'attention/query'), masks(0, 'attention/key'),
                mask[[1, 2, 0]]):
    np.testing.assert_allclose(np.mean(other == mask), 0.625, atol=0.03)
  # Where there is no adapter, and without keys, nothing is drawn.
  assert lora.add(y, x, layer, 'mlp/up') is y
  assert lora.adapters(config, tree).keys_LB is None


def test_dropout_is_drawn_in_training_alone():
  model = tiny_lora.build(tiny_lora.options('heads'))
  inputs = tiny_lora.batch(reference.load('lora_llama')[0]['tokens'])
  params = base_params() | {'lora': jax.tree.map(
      lambda x: jnp.full(x.shape, 0.1), jax.eval_shape(
          model.init, jax.random.key(0), inputs)['params']['lora'])}
  objective = next_token.NextToken(model)

  @functools.partial(jax.jit, static_argnums=1)
  def loss(key, source, rows):
    arrays = {name: x[rows] for name, x in inputs.items()}
    return objective(params, {}, {}, {source: arrays}, key, 0)[0]['next_token'][
        0]

  order = np.array([0, 1])
  first = loss(jax.random.key(1), 'a', order)
  assert loss(jax.random.key(1), 'a', order) == first
  assert loss(jax.random.key(2), 'a', order) != first  # another step
  assert loss(jax.random.key(1), 'b', order) != first  # another source
  # The rows of the batch in microbatches.
  parts = [loss(jax.random.key(1), 'a', np.array([i])) for i in (0, 1)]
  np.testing.assert_allclose(sum(parts), first, rtol=1e-6)
  run = jax.jit(functools.partial(model.apply, {'params': params}, inputs))
  np.testing.assert_array_equal(
      run(rngs={'dropout': jax.random.key(0)})[0], run()[0])
  with pytest.raises(flax.errors.InvalidRngError, match='needs PRNG for "drop'):
    model.apply({'params': params}, inputs, train=True)


# ---------------------------------------------------------------------------
# Config


@pytest.mark.parametrize('fields, message', [
    (dict(rank=0), 'model.lora.rank is 0; allowed: 1 or more'),
    (dict(dropout=1.0), r'model.lora.dropout: 1.0; allowed: from 0 up to'),
    (dict(pattern='('), r"model.lora.pattern: '\(' is no regular expression"),
    (dict(pattern='fc1'), 'found in none of attention/query, .*, mlp/down'),
    (dict(r=4), "model.lora has no field 'r'. It has: rank, alpha"),
])
def test_what_is_wrong_is_named(fields, message):
  with pytest.raises(ValueError, match=message):
    tiny_lora.build(dict(rank=2, alpha=4) | fields)


def test_names_of_projections_are_those_of_the_parameters():
  for mlp in ('swiglu', 'gelu'):
    stack = dataclasses.replace(tiny_lora.build().config.decoder.stack, mlp=mlp)
    blocks = jax.eval_shape(functools.partial(
        transformer._init_blocks, config=stack), jax.random.key(0))
    kernels = {
        name.removesuffix('/kernel'): int(np.prod(leaf.shape[1:]))
        for name, leaf in flax.traverse_util.flatten_dict(
            blocks, sep='/').items() if name.endswith('/kernel')}
    assert kernels == {name: int(np.prod(sizes)) for name, sizes in
                       lora.projections(stack).items()}


def test_flops_by_hand():
  forward = lambda *options: multimodal.flops(
      tiny_lora.build(*options).config, 7, 0, None)
  sizes = 36 + 36 + 2 * (36 + 12) + 36 + 36
  added = forward(tiny_lora.options('heads')) - forward()
  assert added == 7 * 2 * 3 * 16 * sizes


def test_two_sets_of_weights_have_no_adapters():
  both = tiny_lora.build(dict(rank=2, alpha=4)).config
  with pytest.raises(ValueError, match='adapters of two sets'):
    dataclasses.replace(both, decoder=dataclasses.replace(
        both.decoder, modality_weights=('mlp',)))

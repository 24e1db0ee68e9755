"""Contrastive losses: by hand, coupled over devices and parts, masked.

tests/golden/contrastive.npz holds random embeddings and what ClipLoss (with
local_loss and gather_with_grad) and SigLipLoss of open_clip 3.3.0 made of them
in 1, 2 and 8 processes: the mean of their losses and of their gradients, as
torch 2.13.0's DistributedDataParallel takes it (fp32, CPU, gloo).
"""

import dataclasses
import math
import pathlib

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import ml_collections
import numpy as np
import optax
import pytest

from mmgen.models import clip
from mmgen.models import text_encoder
from mmgen.models import vision_encoder
from mmgen.objectives import contrastive
from mmgen.training import step as step_lib

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden' / 'contrastive.npz'
B = 8
CONFIG = clip.ClipConfig(
    vision_encoder.VisionEncoderConfig(
        image_size=(8, 4), patch=4, layers=1, width=8, heads=2, hidden=8,
        mlp='gelu', unroll=True),
    text_encoder.TextEncoderConfig(
        vocab=9, length=4, layers=1, width=8, heads=2, hidden=8, mlp='gelu',
        unroll=True),
    embed=6, logit_bias=-1.5)


class Toy:
  """Two towers of one matrix each: compiles at once."""
  config = CONFIG

  def init(self, rng, batch):
    size = batch['images'][0].size
    shapes = dict(image=(size, 6), text=(9, 6), logit_scale=(), logit_bias=())
    return {'params': {k: jnp.zeros(v) for k, v in shapes.items()}}

  def apply(self, variables, batch=None, method='__call__'):
    params = variables['params']
    if method == 'temperature':
      return jnp.exp(params['logit_scale']), params['logit_bias']
    pixels = batch['images'].reshape(batch['images'].shape[0], -1) / 255
    image = jnp.tanh(pixels @ params['image'])
    text = jnp.sum(params['text'][batch['tokens']], axis=1)
    return (clip.normalise(image), clip.normalise(text)), {}


def make_batch(seed=0, count=B, bad=(2, 5)):
  rng = np.random.default_rng(seed)
  lengths = rng.integers(2, 5, count)
  return dict(
      images=rng.integers(0, 256, (count, 8, 4, 3)).astype(np.uint8),
      tokens=rng.integers(1, 9, (count, 4)).astype(np.int32),
      valid=np.arange(4)[None] < lengths[:, None],
      labels=np.zeros(count, np.int64),
      example_valid=~np.isin(np.arange(count), bad))


MODEL = Toy()


def random_params(model):
  tree = jax.jit(model.init)(jax.random.key(0), make_batch())['params']
  rng = np.random.default_rng(1)
  return jax.tree.map(
      lambda p: np.asarray(p + 0.5 * rng.normal(size=p.shape), np.float32),
      tree)


@pytest.fixture(scope='module')
def params():
  return random_params(MODEL)


def unit(seed, count, width=5):
  x = np.random.default_rng(seed).normal(size=(count, width))
  return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def softmax_by_hand(x, y, scale, bias, valid):
  x, y = (np.asarray(z, np.float64)[valid] for z in (x, y))
  total = 0.0
  for i in range(len(x)):
    row = [math.exp(scale * float(x[i] @ y[j])) for j in range(len(y))]
    column = [math.exp(scale * float(x[j] @ y[i])) for j in range(len(x))]
    total -= (math.log(row[i] / sum(row))
              + math.log(column[i] / sum(column))) / 2
  return total


def sigmoid_by_hand(x, y, scale, bias, valid):
  x, y = (np.asarray(z, np.float64)[valid] for z in (x, y))
  total = 0.0
  for i in range(len(x)):
    for j in range(len(y)):
      sign = 1 if i == j else -1
      logit = scale * float(x[i] @ y[j]) + bias
      total -= math.log(1 / (1 + math.exp(-sign * logit)))
  return total


BY_HAND = {'softmax': softmax_by_hand, 'sigmoid': sigmoid_by_hand}


@pytest.mark.parametrize('loss', contrastive.LOSSES)
@pytest.mark.parametrize('bad', [(), (0, 3)])
def test_losses_by_hand(loss, bad):
  x, y = unit(0, 6), unit(1, 6)
  valid = ~np.isin(np.arange(6), bad)
  total, _ = contrastive.LOSSES[loss](x, y, 3.0, -1.2, jnp.asarray(valid))
  np.testing.assert_allclose(
      total, BY_HAND[loss](x, y, 3.0, -1.2, valid), rtol=2e-6)


def test_extreme_temperatures_stay_finite():
  x = unit(0, 4)
  for scale, loss in ((100.0, 'softmax'), (1e4, 'sigmoid')):
    value, gradient = jax.value_and_grad(
        lambda x: contrastive.LOSSES[loss](
            x, -x, scale, 0.0, jnp.ones(4, bool))[0])(jnp.asarray(x))
    assert np.isfinite(value) and np.isfinite(gradient).all()


def evaluate(params, batch, loss='softmax', model=MODEL):
  """((loss, aux), gradients) of a batch {source: arrays}."""
  objective = contrastive.Contrastive(model, loss)
  def run(params, batch):
    sums, (_, aux) = objective(params, {}, {}, batch, None, 0)
    total, weight = sums['contrastive']
    return total / weight, aux
  return jax.jit(jax.value_and_grad(run, has_aux=True))(params, batch)


def assert_close(a, b, rtol=1e-4):
  flat = lambda tree: np.concatenate(
      [np.ravel(x) for x in jax.tree.leaves(tree)])
  a, b = flat(a), flat(b)
  assert np.abs(a - b).max() <= rtol * np.abs(b).max()


def on_devices(shape, *arguments):
  """`evaluate` with the rows of the batch laid over a mesh."""
  mesh = jax.make_mesh(
      (*shape, 1, 1), ('data', 'fsdp', 'tensor', 'sequence'),
      axis_types=(AxisType.Auto,) * 4)
  with jax.set_mesh(mesh):
    params, batch, *rest = arguments
    batch = jax.device_put(
        batch, NamedSharding(mesh, PartitionSpec(('data', 'fsdp'))))
    images = batch['a']['images']
    assert images.addressable_shards[0].data.shape[0] == B // math.prod(shape)
    return evaluate(params, batch, *rest)


@pytest.mark.parametrize('loss', contrastive.LOSSES)
def test_equal_on_1_2_and_8_devices(loss, params):
  batch = {'a': make_batch()}
  (alone, aux), gradient = evaluate(params, batch, loss)
  embeddings, _ = MODEL.apply({'params': params}, batch['a'])
  scale, bias = MODEL.apply({'params': params}, method='temperature')
  by_hand = BY_HAND[loss](*embeddings, float(scale), float(bias),
                          batch['a']['example_valid']) / 6
  np.testing.assert_allclose(alone, by_hand, rtol=1e-5)
  for shape in ((1, 1), (2, 1), (2, 4)):
    (value, found), spread = on_devices(shape, params, batch, loss)
    np.testing.assert_allclose(value, alone, rtol=1e-6)
    assert_close(spread, gradient, 1e-5)
    assert_close(found, aux)


class Table(Toy):
  """Its embeddings are its parameters, a row for each example."""

  def apply(self, variables, batch=None, method='__call__'):
    if method == 'temperature':
      return super().apply(variables, method=method)
    return tuple(clip.normalise(variables['params'][side][batch['labels']])
                 for side in ('image', 'text')), {}


@pytest.mark.parametrize('shape', [(1, 1), (2, 1), (2, 4)])
@pytest.mark.parametrize('loss', contrastive.LOSSES)
def test_equal_to_open_clip_in_as_many_processes(loss, shape):
  with np.load(GOLDEN) as file:
    params = {name.removeprefix('params/'): file[name] for name in file
              if name.startswith('params/')}
    prefix = f'{loss}/{math.prod(shape)}/'
    wanted = {name.removeprefix(prefix): file[name] for name in file
              if name.startswith(prefix)}
  batch = {'a': make_batch(bad=()) | dict(labels=np.arange(B))}
  (value, _), gradient = on_devices(shape, params, batch, loss, Table())
  np.testing.assert_allclose(value, wanted.pop('loss'), rtol=1e-6)
  assert gradient.keys() == wanted.keys()
  for name, want in wanted.items():
    # A constant on all logits changes no softmax.
    assert want.any() == (name != 'logit_bias' or loss == 'sigmoid')
    np.testing.assert_allclose(gradient[name], want, rtol=0,
                               atol=2e-6 * np.abs(want).max())


def test_the_real_model_on_8_devices():
  model = clip.Clip(CONFIG)
  params, batch = random_params(model), {'a': make_batch()}
  (alone, _), gradient = evaluate(params, batch, 'softmax', model)
  (value, _), spread = on_devices((2, 4), params, batch, 'softmax', model)
  np.testing.assert_allclose(value, alone, rtol=1e-6)
  assert_close(spread, gradient)


def test_bad_records_are_not_there(params):
  (value, aux), gradient = evaluate(params, {'a': make_batch()})
  other = make_batch()
  for name in ('images', 'tokens'):
    other[name][[2, 5]] = make_batch(seed=7)[name][[2, 5]]
  assert not np.array_equal(other['images'], make_batch()['images'])
  (changed, _), changed_gradient = evaluate(params, {'a': other})
  np.testing.assert_allclose(changed, value, rtol=1e-6)
  assert_close(changed_gradient, gradient)
  objective = contrastive.Contrastive(MODEL)
  assert objective.weights({'a': make_batch()}) == {'contrastive': 6}


@pytest.mark.parametrize('loss', contrastive.LOSSES)
def test_a_batch_of_bad_records_costs_nothing(loss):
  value, gradient = jax.value_and_grad(
      lambda x: contrastive.LOSSES[loss](
          x, -x, 100.0, -1.0, jnp.zeros(4, bool))[0])(jnp.asarray(unit(0, 4)))
  assert value == 0 and (gradient == 0).all()


def test_sources_share_one_batch_of_negatives(params):
  whole = make_batch(bad=(2,))
  halves = {name: {k: v[part] for k, v in whole.items()}
            for name, part in (('b', slice(0, 4)), ('a', slice(4, 8)))}
  (value, _), gradient = evaluate(params, {'all': whole})
  (split, _), split_gradient = evaluate(params, halves)
  np.testing.assert_allclose(split, value, rtol=1e-6)
  assert_close(split_gradient, gradient)


def test_gradient_cache_equals_the_whole_batch(params):
  batch = {'a': make_batch(), 'b': make_batch(seed=3, count=4, bad=())}
  (value, aux), gradient = evaluate(params, batch, 'sigmoid')
  objective = contrastive.Contrastive(MODEL, 'sigmoid', {'contrastive': 2.0})
  (loss, losses, state, found), cached = jax.jit(
      lambda params: contrastive.gradient_cache(
          objective, params, {}, {'kept': 1}, batch, 4))(params)
  np.testing.assert_allclose(loss, 2 * value, rtol=1e-6)
  np.testing.assert_allclose(losses['contrastive'], value, rtol=1e-6)
  assert_close(cached, jax.tree.map(lambda g: 2 * g, gradient))
  assert state == {'kept': 1}
  assert_close(found, aux)


def test_the_train_step_takes_microbatches_through_the_cache(params):
  def after(accumulate):
    config = ml_collections.ConfigDict(dict(
        seed=0, optimizer=dict(accumulate=accumulate)))
    optimizer = optax.sgd(0.5), lambda step: 0.5
    step = step_lib.make_train_step(
        contrastive.Contrastive(MODEL), optimizer, config)
    state = step_lib.init_state(jax.tree.map(jnp.copy, params), optimizer)
    return step(state, {}, {'a': make_batch()})
  state, metrics = after(4)
  whole_state, whole_metrics = after(1)
  assert_close(state['params'], whole_state['params'])
  assert metrics.keys() == whole_metrics.keys()
  np.testing.assert_allclose(metrics['loss'], whole_metrics['loss'], rtol=1e-6)


class DroppingToy(Toy):
  """Its pictures are the mean of the patches that are kept, 4 of 9."""
  config = dataclasses.replace(CONFIG, vision=dataclasses.replace(
      CONFIG.vision, image_size=(12, 12), patch_dropout=0.5))

  def apply(self, variables, batch=None, method='__call__'):
    if batch is not None:
      patches = vision_encoder.patchify(batch['images'], 4)
      kept = jnp.take_along_axis(patches, batch['kept'][..., None], axis=1)
      batch = {**batch, 'images': jnp.mean(kept.astype(jnp.float32), axis=1)}
    return super().apply(variables, batch, method)


DROPPING = contrastive.Contrastive(DroppingToy())
KEY = jax.random.key(3)


def square_batch(count=B):
  images = np.random.default_rng(8).integers(0, 256, (count, 12, 12, 3))
  return {**make_batch(count=count), 'images': images.astype(np.uint8)}


def test_draws_are_of_the_key_the_source_and_the_example():
  draw = lambda batch, key=KEY: {
      source: np.asarray(arrays['kept']).tolist() for source, arrays in
      DROPPING.draw(batch, key).items()}
  batch = {'a': square_batch(), 'b': square_batch()}
  found = draw(batch)
  assert found == draw(batch)
  assert all(len(set(row)) == 4 for row in found['a'])
  rows = [tuple(row) for source in 'ab' for row in found[source]]
  assert len(set(rows)) == len(rows)  # chance of a clash: 4 %, of this key 0
  # Other sources and later examples change nothing.
  assert draw({'a': square_batch(5)})['a'] == found['a'][:5]
  assert draw(batch, jax.random.key(4)) != found


def test_nothing_is_drawn_without_dropout_and_nothing_dropped_without_a_key():
  batch = {'a': make_batch()}
  assert contrastive.Contrastive(MODEL).draw(batch, KEY) is batch
  with pytest.raises(ValueError, match='patch_dropout is 0.5, but there is no'):
    DROPPING.draw({'a': square_batch()}, None)


def test_branches_are_drawn_for_themselves():
  """By key, source and example, and changing nothing of what else is drawn."""
  def objective(**fields):
    model = DroppingToy()
    model.config = dataclasses.replace(CONFIG, vision=dataclasses.replace(
        DroppingToy.config.vision, layers=3, **fields))
    return contrastive.Contrastive(model)
  batch = {'a': square_batch(), 'b': square_batch()}
  found = objective(drop_path=0.5).draw(batch, KEY)
  kept = DROPPING.draw(batch, KEY)
  for source in batch:
    assert found[source]['factors'].shape == (B, 3, 2)
    np.testing.assert_array_equal(
        found[source]['kept'], kept[source]['kept'])
  alone = objective(drop_path=0.5, patch_dropout=0.0)
  other = alone.draw({'a': square_batch(5)}, KEY)['a']
  assert 'kept' not in other
  np.testing.assert_array_equal(other['factors'], found['a']['factors'][:5])
  rows = lambda arrays: np.asarray(arrays['factors']).tolist()
  assert rows(found['a']) != rows(found['b'])
  assert rows(found['a']) != rows(alone.draw(batch, jax.random.key(4))['a'])
  with pytest.raises(ValueError, match='drop_path is 0.5, but there is no'):
    alone.draw(batch, None)


def test_the_same_patches_are_kept_in_parts_and_on_8_devices():
  batch = {'a': square_batch(), 'b': square_batch(4)}
  rng = np.random.default_rng(1)
  params = dict(image=rng.normal(size=(48, 6)), text=rng.normal(size=(9, 6)),
                logit_scale=np.float64(1), logit_bias=np.float64(0))
  params = jax.tree.map(jnp.float32, params)

  @jax.jit
  @jax.value_and_grad
  def whole(params, batch, key=KEY):
    sums, _ = DROPPING(params, {}, {}, batch, key, 0)
    return sums['contrastive'][0] / sums['contrastive'][1]

  value, gradient = whole(params, batch)
  assert abs(value - whole(params, batch, jax.random.key(4))[0]) > 1e-4
  (loss, *_), cached = jax.jit(lambda params: contrastive.gradient_cache(
      DROPPING, params, {}, {}, batch, 4, KEY))(params)
  np.testing.assert_allclose(loss, value, rtol=1e-6)
  assert_close(cached, gradient)
  mesh = jax.make_mesh(
      (2, 2, 2, 1), ('data', 'fsdp', 'tensor', 'sequence'),
      axis_types=(AxisType.Auto,) * 4)
  with jax.set_mesh(mesh):
    rows = NamedSharding(mesh, PartitionSpec(('data', 'fsdp')))
    other, spread = whole(params, jax.device_put(batch, rows))
  np.testing.assert_allclose(other, value, rtol=1e-6)
  assert_close(spread, gradient)


def test_the_train_step_draws_the_same_patches_in_microbatches():
  rng = np.random.default_rng(1)
  params = jax.tree.map(jnp.float32, dict(
      image=rng.normal(size=(48, 6)), text=rng.normal(size=(9, 6)),
      logit_scale=np.float64(1), logit_bias=np.float64(0)))
  optimizer = optax.sgd(0.1), lambda step: 0.1

  def loss(accumulate, seed=0):
    config = ml_collections.ConfigDict(dict(
        seed=seed, optimizer=dict(accumulate=accumulate)))
    step = step_lib.make_train_step(DROPPING, optimizer, config)
    state = step_lib.init_state(jax.tree.map(jnp.array, params), optimizer)
    return float(step(state, {}, {'a': square_batch()})[1]['loss'])

  assert loss(4) == pytest.approx(loss(1), rel=1e-6)
  assert loss(4, seed=1) != pytest.approx(loss(1), rel=1e-4)


def test_gradient_cache_names_what_does_not_divide(params):
  with pytest.raises(ValueError, match="'a' has 8 examples.*accumulate=3"):
    contrastive.gradient_cache(
        contrastive.Contrastive(MODEL), params, {}, {}, {'a': make_batch()}, 3)


def test_accuracies_count_valid_partners():
  logits = jnp.asarray([[5., 1., 9.], [6., 2., 9.], [0., 0., 0.]])
  valid = jnp.asarray([True, True, False])
  found = contrastive._accuracies(logits, valid)
  # Column 2 is not there: images 0 and 1 both choose text 0; text 0 chooses
  # image 1 and text 1 chooses image 1.
  assert found == {'accuracy/image_to_text': 0.5,
                   'accuracy/text_to_image': 0.5}


@pytest.mark.parametrize('value, expected', [
    (-0.5, 0.0), (2.0, 2.0), (9.0, math.log(100))])
def test_projection_bounds_the_temperature_only(value, expected):
  objective = contrastive.Contrastive(MODEL)
  before = {'logit_scale': jnp.float32(value), 'logit_bias': jnp.float32(-50)}
  after = objective.project(before)
  np.testing.assert_allclose(after['logit_scale'], expected, rtol=1e-6)
  assert after['logit_bias'] == -50
  assert objective.project({'vision': 1}) == {'vision': 1}


def test_frozen_parts_are_read_but_not_trained(params):
  frozen = {'image': params['image']}
  trained = {k: v for k, v in params.items() if k != 'image'}
  objective = contrastive.Contrastive(MODEL)
  sums, _ = objective(trained, frozen, {}, {'a': make_batch()}, None, 0)
  whole, _ = objective(params, {}, {}, {'a': make_batch()}, None, 0)
  np.testing.assert_array_equal(sums['contrastive'], whole['contrastive'])


def test_unknown_loss():
  with pytest.raises(ValueError, match="'hinge'; allowed: softmax, sigmoid"):
    contrastive.Contrastive(MODEL, 'hinge')

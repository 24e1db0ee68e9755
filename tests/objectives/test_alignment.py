"""The alignment objective: the released loss, packing, pictures in slots."""

import dataclasses
import types

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
from PIL import Image
import pytest
import reference

from mmgen.data import document
from mmgen.data import layout
from mmgen.models import alignment as aligner_lib
from mmgen.models import connector
from mmgen.models import decoder
from mmgen.models import multimodal
from mmgen.models import vision_encoder
from mmgen.objectives import alignment
from mmgen.objectives import next_token
from mmgen.training import metrics

# The reference's grid: class token, then rows that end in a split token.
EVE = dict(class_slot=True, newline='table')


class Fixed:
  """Stands for a model or a teacher whose outputs are given."""

  def __init__(self, config, result):
    self.config, self.result = config, result

  def apply(self, variables, *arguments, **options):
    return self.result(variables, *arguments, **options)


def reference_batch(golden, image_layout):
  """One picture a row, at the slots where the reference had it."""
  B, T = golden['hidden'].shape[:2]
  visual = np.full((B, T), -1, np.int32)
  for b, (start, box) in enumerate(zip(golden['starts'], golden['boxes'])):
    table = image_layout.slots(tuple(int(x) for x in box))[1]
    visual[b, start:start + len(table)] = table
  return dict(visual=visual, images=np.zeros((B, 1, 2, 2, 3), np.uint8),
              image_box=golden['boxes'][:, None], weights=np.zeros((B, T)),
              targets=np.zeros((B, T), np.int32))


@pytest.mark.parametrize('name', ['patch_aligner', 'patch_aligner_hd'])
def test_loss_and_gradients_equal_the_reference(name):
  with np.load(reference.GOLDEN / f'{name}.npz') as file:
    golden = dict(file)
  layers, side = int(golden['layers']), int(golden['grid'])
  B, T, _, D = golden['hidden'].shape
  image_layout = layout.ImageLayout(side, side, **EVE)
  teacher_side = side // int(golden['ratio'])
  aligner = aligner_lib.PatchAligner(aligner_lib.PatchAlignerConfig(
      layers, D, golden['teacher'].shape[-1]))

  def model(variables, arrays, train, taps, rngs):
    hidden = variables['params']['hidden']
    return jnp.zeros((B, T, 3)), dict(
        hidden=hidden[:, :, layers], taps={l: hidden[:, :, l] for l in taps})
  def teacher(variables, images, box):
    return variables['params']['features'][:, None], {}
  objective = alignment.Alignment(
      Fixed(types.SimpleNamespace(image_layout=lambda size: image_layout),
            model),
      aligner,
      Fixed(types.SimpleNamespace(
          grid=(teacher_side,) * 2, image_size=(2, 2)), teacher))
  batch = {'s': reference_batch(golden, image_layout)}
  params = {'aligner': reference.patch_aligner(golden, 'param/'),
            'hidden': jnp.asarray(golden['hidden'])}
  frozen = {'teacher': {'features': jnp.asarray(golden['teacher'])}}

  @jax.jit
  @jax.value_and_grad
  def run(params):
    sums, _ = objective(params, frozen, {}, batch, None, 0)
    return sums['alignment'][0] / objective.weights(batch)['alignment']
  value, gradient = run(params)
  np.testing.assert_allclose(value, golden['loss'], rtol=1e-5)
  expected = {'aligner': reference.patch_aligner(golden, 'grad/'),
              'hidden': golden['hidden_grad']}
  for ours, theirs in zip(jax.tree.leaves(gradient),
                          jax.tree.leaves(expected)):
    worst = np.abs(ours - theirs).max() / np.abs(theirs).max()
    assert worst < 1e-4, worst


def test_distance_is_a_mean_over_cells_then_pictures():
  found = np.array([[[[1., 0], [0, 1], [9, 9]], [[1, 0], [1, 0], [1, 0]],
                     [[1, 0], [1, 0], [1, 0]]]])
  wanted = np.array([[[[2., 0], [0, -3], [9, 9]], [[0, 1], [1, 0], [1, 0]],
                      [[1, 0], [1, 0], [1, 0]]]])
  valid = np.array([[[1, 1, 0], [1, 0, 0], [0, 0, 0]]], bool)
  found = alignment.distance(found, wanted, valid)
  np.testing.assert_allclose(found, [[1.0, 1.0, 0.0]], atol=1e-6)


def test_the_next_cell_is_the_next_valid_one_row_by_row():
  # Cells 0 1 2 / 3 4 5 / 6 7 8, of which 1 2 / 4 5 are picture; one cell; none.
  valid = np.zeros((1, 3, 9), bool)
  valid[0, 0, [1, 2, 4, 5]] = valid[0, 1, 8] = True
  cells = np.broadcast_to(np.arange(9.0)[None, None, :, None], (1, 3, 9, 1))
  found, wanted, pairs = alignment.shifted(cells, 10 + cells, valid, 1)
  assert found.shape == wanted.shape == (1, 3, 8, 1)
  assert pairs.sum(axis=-1).tolist() == [[3, 0, 0]]
  np.testing.assert_array_equal(found[0, 0, pairs[0, 0], 0], [1, 2, 4])
  np.testing.assert_array_equal(wanted[0, 0, pairs[0, 0], 0], [12, 14, 15])
  _, wanted, pairs = alignment.shifted(cells, 10 + cells, valid, 2)
  np.testing.assert_array_equal(wanted[0, 0, pairs[0, 0], 0], [14, 15])


class Letters:
  """A tokenizer of single letters."""
  names = ('<pad>', '<bos>', '<eos>', '<image>', '</image>', '<patch>',
           '<newline>', '<class>')

  def id(self, name):
    return self.names.index(name)

  def encode(self, text):
    return [8 + ord(letter) - ord('a') for letter in text]


@pytest.mark.parametrize('options', [
    dict(), EVE, dict(newline='token', border=True)])
def test_cells_are_found_where_the_layout_put_them(options):
  image_layout = layout.ImageLayout(2, 3, **options)
  pixels = np.zeros((4, 6, 3), np.uint8)
  documents = [
      document.Document((document.text('ab'), document.image(pixels),
                         document.image(pixels, (0, 0, 4, 4)))),
      document.Document((document.image(pixels, (2, 2, 2, 4)),
                         document.text('cde')))]
  arrays, stats = layout.sequence(
      documents, Letters(), image_layout, 2, 48, 3)
  assert stats['dropped_documents'] == 0
  slots = np.asarray(alignment.cell_slots(arrays['visual'], 3, image_layout))
  seen = 0
  for b in range(2):
    for i in range(3):
      top, left, rows, cols = arrays['image_box'][b, i]
      # Patches of one picture stand in order of rows.
      there = np.flatnonzero((arrays['image_index'][b] == i)
                             & (arrays['tokens'][b] == 5))
      expected = np.full((2, 3), -1)
      if rows:
        expected[top:top + rows, left:left + cols] = there.reshape(rows, cols)
        seen += 1
      np.testing.assert_array_equal(slots[b, i].reshape(2, 3), expected)
  assert seen == 3


def test_shrink_is_close_to_pillow():
  rng = np.random.default_rng(0)
  image = np.asarray(Image.fromarray(
      rng.integers(0, 256, (6, 4, 3)).astype(np.uint8)).resize((24, 36)))
  ours = alignment.shrink(image[None, None], (18, 12))
  theirs = np.asarray(Image.fromarray(image).resize(
      (12, 18), Image.Resampling.BICUBIC))
  assert ours.dtype == jnp.uint8 and ours.shape == (1, 1, 18, 12, 3)
  assert np.abs(np.asarray(ours[0, 0], int) - theirs.astype(int)).max() <= 1
  assert alignment.shrink(image[None, None], (36, 24)) is not None
  with pytest.raises(ValueError, match='must be whole multiples'):
    alignment.shrink(image[None, None], (17, 12))


# Pictures of 16 x 8 pixels: 4 x 2 cells for the model, 2 x 1 for the teacher.
MODEL = multimodal.MultimodalDecoder(multimodal.MultimodalConfig(
    decoder.DecoderConfig(vocab=40, layers=2, width=16, heads=2, hidden=16,
                          unroll=True),
    vision_encoder.VisionEncoderConfig(
        image_size=(16, 8), patch=4, layers=1, width=8, heads=2, hidden=8,
        tap=-1, unroll=True),
    connector.ConnectorConfig('linear', 16)))
TEACHER = vision_encoder.VisionEncoder(vision_encoder.VisionEncoderConfig(
    image_size=(8, 4), patch=4, layers=1, width=8, heads=2, hidden=8, tap=-1,
    unroll=True))
ALIGNER = aligner_lib.PatchAligner(aligner_lib.PatchAlignerConfig(
    layers=2, decoder_width=16, width=8, interval=1, heads=2))
OBJECTIVE = alignment.Alignment(
    MODEL, ALIGNER, TEACHER, {'next_token': 1.0, 'alignment': 0.5})


def documents(count):
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 256, (count, 16, 8, 3)).astype(np.uint8)
  return [document.Document(
      (document.image(p), document.text('abc'[:1 + i % 3])))
          for i, p in enumerate(pixels)]


def packed(rows, length, images, count=8):
  image_layout = MODEL.config.vision.image_layout((16, 8))
  arrays, stats = layout.sequence(
      documents(count), Letters(), image_layout, rows, length, images)
  assert stats['dropped_documents'] == 0
  return arrays


@pytest.fixture(scope='module')
def trees():
  batch = multimodal.example_batch(MODEL.config, (16, 8))
  params = jax.jit(MODEL.init)(jax.random.key(0), batch)['params']
  params |= jax.jit(OBJECTIVE.init)(jax.random.key(1))
  teacher = jax.jit(TEACHER.init)(
      jax.random.key(2), np.zeros((1, 1, 8, 4, 3), np.uint8),
      np.zeros((1, 1, 4), np.int32))['params']
  rng = np.random.default_rng(3)
  params = jax.tree.map(
      lambda p: np.asarray(p + 0.3 * rng.normal(size=p.shape), np.float32),
      params)
  return params, {'teacher': teacher}


@jax.jit
def evaluate(params, frozen, batch, of_text):
  """(losses by name, gradients of of_text * next_token + alignment)."""
  def run(params):
    sums, _ = OBJECTIVE(params, frozen, {}, batch, None, 0)
    weights = OBJECTIVE.weights(batch)
    losses = {name: sums[name][0] / weights[name] for name in sums}
    return of_text * losses['next_token'] + losses['alignment'], losses
  (_, losses), gradient = jax.value_and_grad(run, has_aux=True)(params)
  return losses, gradient


def test_independent_of_packing(trees):
  batch = {'a': packed(2, 64, 5)}
  sums, _ = jax.jit(lambda params, frozen: OBJECTIVE(
      params, frozen, {}, batch, None, 0))(*trees)
  alone, _ = evaluate(*trees, {'a': packed(8, 16, 1)}, 1.0)
  for name, (total, weight) in sums.items():
    np.testing.assert_allclose(total / weight, alone[name], rtol=1e-5)
  assert OBJECTIVE.weights(batch)['alignment'] == 8


def test_equal_on_8_devices(trees):
  batch = {'a': packed(8, 16, 1)}
  losses, gradient = evaluate(*trees, batch, 1.0)
  mesh = jax.make_mesh(
      (2, 4, 1, 1), ('data', 'fsdp', 'tensor', 'sequence'),
      axis_types=(AxisType.Auto,) * 4)
  with jax.set_mesh(mesh):
    sharded = jax.device_put(
        batch, NamedSharding(mesh, PartitionSpec(('data', 'fsdp'))))
    spread, spread_gradient = evaluate(*trees, sharded, 1.0)
  for name in losses:
    np.testing.assert_allclose(spread[name], losses[name], rtol=1e-5)
  for a, b in zip(jax.tree.leaves(spread_gradient), jax.tree.leaves(gradient)):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5)


def test_alignment_reaches_all_that_is_below_and_no_words(trees):
  _, gradient = evaluate(*trees, {'a': packed(8, 16, 1)}, 0.0)
  used = lambda part: any((leaf != 0).any() for leaf in jax.tree.leaves(part))
  assert used(gradient['aligner']) and used(gradient['vision'])
  assert used(gradient['connector']) and used(gradient['decoder']['stack'])
  assert not used(gradient['decoder']['head'])


def test_text_alone_has_no_alignment_and_the_plain_loss(trees):
  params, frozen = trees
  arrays = packed(2, 64, 5)
  batch = {'text': {k: arrays[k] for k in (
      'tokens', 'targets', 'weights', 'segments', 'positions')}}
  sums, plain = jax.jit(lambda params: [
      objective(params, frozen, {}, batch, None, 0)[0]
      for objective in (OBJECTIVE, next_token.NextToken(MODEL))])(params)
  assert sums['alignment'] == (0, 0)
  np.testing.assert_allclose(
      sums['next_token'], plain['next_token'], rtol=1e-6)
  assert OBJECTIVE.weights(batch) == {
      'alignment': 0, 'next_token': arrays['weights'].sum()}


def test_grids_that_do_not_fit_are_named(trees):
  teacher = vision_encoder.VisionEncoder(dataclasses.replace(
      TEACHER.config, image_size=(12, 4)))
  objective = dataclasses.replace(OBJECTIVE, teacher=teacher)
  with pytest.raises(ValueError, match='teacher sees 3 x 1 cells, the model 4'):
    objective.weights({'a': packed(2, 64, 5)})


def test_a_shifted_target_is_another_loss_over_the_same_pictures(trees):
  batch = {'a': packed(8, 16, 1)}
  shifted = dataclasses.replace(OBJECTIVE, shift=1)
  run = jax.jit(lambda params, frozen: [
      objective(params, frozen, {}, batch, None, 0)[0]['alignment']
      for objective in (OBJECTIVE, shifted)])
  (same, pictures), (following, weight) = run(*trees)
  assert pictures == weight == shifted.weights(batch)['alignment'] == 8
  assert abs(same - following) > 1e-2
  # The teacher has two cells a picture: none has one two cells later.
  assert dataclasses.replace(OBJECTIVE, shift=2).weights(
      batch)['alignment'] == 0
  with pytest.raises(ValueError, match='shift is -1'):
    dataclasses.replace(OBJECTIVE, shift=-1)


def test_flops_by_program():
  teacher, aligner = alignment.flops(OBJECTIVE)
  hidden = {l: jnp.zeros((2, 16)) for l in ALIGNER.config.taps}
  image = jnp.zeros((1, 1, 8, 4, 3), jnp.uint8)
  box = jnp.zeros((1, 1, 4), jnp.int32)
  count = lambda module, *arguments: metrics.count_flops(jax.make_jaxpr(
      lambda params: module.apply({'params': params}, *arguments)[0])(
          jax.eval_shape(module.init, jax.random.key(0), *arguments)['params']))
  assert (teacher, aligner) == (
      count(TEACHER, image, box), count(ALIGNER, hidden))


def test_build_takes_widths_from_model_and_teacher():
  built = alignment.build(
      MODEL, dict(size='mini', width=24, heads=2, tap=-3),
      dict(interval=2, heads=3), shift=1,
      coefficients=dict(next_token=1, alignment=2))
  assert built.shift == 1
  assert built.aligner.config == aligner_lib.PatchAlignerConfig(
      layers=2, decoder_width=16, width=24, interval=2, heads=3)
  assert built.teacher.config == dataclasses.replace(
      vision_encoder.SIZES['mini'], width=24, heads=2, tap=-3)
  assert built.coefficients['alignment'] == 2
  for teacher, said in (
      (dict(size='tiny'), "vision.size: 'tiny'; allowed: mini"),
      (dict(size='mini', widht=3), "'widht'. Did you mean 'width'")):
    with pytest.raises(ValueError, match=said):
      alignment.build(MODEL, teacher)
  with pytest.raises(ValueError, match='aligner.heads is 0; allowed: 1 or mor'):
    alignment.build(MODEL, dict(size='mini'), dict(heads=0))

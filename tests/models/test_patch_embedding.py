import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from mmgen.models import connector
from mmgen.models import patch_embedding

# Arrays of the reference's `VisionTokenizer` and projector with random weights
# (float32): three pictures each, of which two have padding.
EVE = {
    'eve_square': (patch_embedding.EveConfig(width=32, patch=4, pool=2), 40),
    'eve_oblong': (patch_embedding.EveConfig(width=24, patch=5, pool=3), 20),
}


def _eve(name, images, boxes):
  """Table after the connector, stages, layout; pictures in rows of one."""
  config, width = EVE[name]
  vision, projector = reference.eve(reference.load(name)[1], config)
  mlp = connector.Mlp(connector.ConnectorConfig('mlp', width))
  with jax.default_matmul_precision('highest'):
    table, out = patch_embedding.Eve(config).apply(
        {'params': vision}, images[:, None], jnp.asarray(boxes)[:, None])
    return (mlp.apply({'params': projector}, table)[0][:, 0], out,
            config.image_layout(images.shape[1:3]))


@pytest.mark.parametrize('name', EVE)
def test_eve_equals_the_reference_at_every_stage(name):
  golden, _ = reference.load(name)
  table, out, grid = _eve(name, golden['images'], golden['boxes'])
  assert table.shape[1] == grid.table_size
  patches = golden['patches'].transpose(0, 2, 3, 1)
  got = out['patches'][:, 0].reshape(patches.shape)
  assert reference.error(got, patches) < 1e-5
  for i, (top, left, rows, cols) in enumerate(golden['boxes']):
    cells = out['cells'][i, 0].reshape(grid.rows, grid.cols, -1)
    cells = cells[top:top + rows, left:left + cols]
    expected = golden[f'cells/{i}'].reshape(cells.shape)
    assert reference.error(cells, expected) < 1e-5
    assert reference.error(out['class'][i, 0, 0], golden[f'class/{i}']) < 1e-5
    # The slots that the layout picks are the sequence the reference builds.
    _, entries = grid.slots((top, left, rows, cols))
    assert reference.error(table[i][entries], golden[f'table/{i}']) < 1e-5


def _used(table, grid, boxes):
  return [np.asarray(table[i][grid.slots(tuple(box))[1]])
          for i, box in enumerate(boxes)]


def test_eve_does_not_see_the_padding():
  golden, _ = reference.load('eve_square')
  images, boxes = golden['images'], golden['boxes']
  painted = np.zeros_like(images)
  for image, picture, box in zip(painted, images, boxes):
    top, left, rows, cols = box * 8
    inside = np.s_[top:top + rows, left:left + cols]
    image[inside] = picture[inside]
  assert (painted != images).any()
  for a, b in zip(_used(*_eve('eve_square', images, boxes)[::2], boxes),
                  _used(*_eve('eve_square', painted, boxes)[::2], boxes)):
    np.testing.assert_array_equal(a, b)


def test_eve_of_a_padded_picture_is_eve_of_the_crop():
  golden, _ = reference.load('eve_square')
  images, boxes = golden['images'], golden['boxes']
  padded = _used(*_eve('eve_square', images, boxes)[::2], boxes)
  top, left, rows, cols = boxes[1]
  crop = images[1:2, top * 8:(top + rows) * 8, left * 8:(left + cols) * 8]
  box = np.array([[0, 0, rows, cols]])
  table, _, grid = _eve('eve_square', crop, box)
  np.testing.assert_allclose(table[0], padded[1], atol=1e-5)
  assert grid.table_size == len(padded[1])


@pytest.mark.parametrize('option, changed, kept', [
    ('local_attention', ('cells', 'class'), ()),
    ('global_attention', ('class',), ('cells',)),
])
def test_eve_without_an_attention(option, changed, kept):
  golden, weights = reference.load('eve_square')
  config, _ = EVE['eve_square']
  params, _ = reference.eve(weights, config)
  images, box = golden['images'][:, None], golden['boxes'][:, None]
  _, whole = patch_embedding.Eve(config).apply({'params': params}, images, box)
  without = patch_embedding.Eve(dataclasses.replace(config, **{option: False}))
  assert set(jax.eval_shape(
      without.init, jax.random.key(0), images, box)['params']) == {
          *params} - {option}
  del params[option]
  _, out = without.apply({'params': params}, images, box)
  for name in changed:
    assert np.abs(out[name] - whole[name]).max() > 1e-2
  for name in kept:
    np.testing.assert_array_equal(out[name], whole[name])
  if option == 'local_attention':  # the plain average of 2 x 2 raw patches
    cells = config.image_layout(images.shape[2:4])
    raw = np.asarray(out['patches'], np.float64).reshape(
        len(images), cells.rows, 2, cells.cols, 2, config.width)
    np.testing.assert_allclose(
        out['cells'][:, 0], raw.mean(axis=(2, 4)).reshape(
            len(images), -1, config.width), atol=1e-5)
  else:
    for found in out['class'][:, 0, 0]:
      np.testing.assert_array_equal(found, params['class_embedding'])


def test_eve_of_an_empty_slot_is_finite():
  golden, _ = reference.load('eve_square')
  table, _, _ = _eve('eve_square', golden['images'], np.zeros((3, 4), int))
  assert np.isfinite(table).all()


def test_linear_patches_equal_the_reference():
  golden, weights = reference.load('fuyu_patches')
  config = patch_embedding.LinearPatchesConfig(width=24, patch=5)
  params = {'projection': reference.dense(weights, 'vision_embed_tokens')}
  with jax.default_matmul_precision('highest'):
    table, _ = patch_embedding.LinearPatches(config).apply(
        {'params': params}, golden['images'][:, None],
        jnp.zeros((2, 1, 4), jnp.int32))
  assert reference.error(table[:, 0], golden['table']) < 1e-5
  grid = config.image_layout((10, 15))
  assert (grid.rows, grid.cols, grid.table_size) == (2, 3, 6)
  names, _ = grid.slots()
  assert names == ('<patch>', '<patch>', '<patch>', '<newline>') * 2


def test_pixels_of_a_patch_run_by_row_column_channel():
  image = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(1, 1, 4, 6, 3)
  config = patch_embedding.LinearPatchesConfig(
      width=12, patch=2, mean=(0, 0, 0), std=(1 / 255,) * 3)
  table, _ = patch_embedding.LinearPatches(config).apply(
      {'params': {'projection': {
          'kernel': jnp.eye(12), 'bias': jnp.zeros(12)}}},
      image, jnp.zeros((1, 1, 4), jnp.int32))
  np.testing.assert_allclose(
      table[0, 0, 1], [6, 7, 8, 9, 10, 11, 24, 25, 26, 27, 28, 29], rtol=1e-5)
  np.testing.assert_allclose(table[0, 0, 3, 0], 36, rtol=1e-5)


def _count(module, *args):
  shapes = jax.eval_shape(module.init, jax.random.key(0), *args)
  return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def test_eve_7b_has_its_parameters_and_flops():
  config = patch_embedding.EveConfig()
  box = jnp.zeros((1, 1, 4), jnp.int32)
  layer = _count(patch_embedding.Eve(config),
                 jax.ShapeDtypeStruct((1, 1, 56, 56, 3), jnp.uint8), box)
  projection = connector.ConnectorConfig('mlp', 4096)
  mlp = _count(connector.Mlp(projection), jnp.zeros((1, 1024)))
  assert (layer, mlp, layer + mlp) == (9_003_008, 20_979_712, 29_982_720)
  # Table 6 of the paper: 42 GFLOPs at 672 pixels, 170 at 1344.
  for size, entries, published in ((672, 601, 42e9), (1344, 2353, 170e9)):
    assert config.image_layout((size, size)).table_size == entries
    total = patch_embedding.eve_flops(config, (size, size)) + (
        connector.flops(projection, 1024, entries))
    assert abs(total / published - 1) < 0.02


def test_eve_v2_has_its_parameters_and_slots():
  config = patch_embedding.ConvPatchesConfig(3584)
  shapes = jax.ShapeDtypeStruct((1, 1, 64, 32, 3), jnp.uint8)
  assert _count(patch_embedding.ConvPatches(config), shapes,
                jnp.zeros((1, 1, 4), jnp.int32)) == 15_478_272
  for size, cells in ((800, 625), (1600, 2500)):
    grid = config.image_layout((size, size))
    assert (grid.rows * grid.cols, grid.table_size) == (
        cells, 1 + cells + size // 32)
    assert patch_embedding.conv_flops(config, (size, size)) == 2 * cells * (
        4 * 768 * 1024 + 4 * 1024 * 3584)


def test_flops_by_hand():
  linear = patch_embedding.LinearPatchesConfig(width=7, patch=2)
  assert patch_embedding.linear_flops(linear, (4, 6)) == 2 * 6 * 12 * 7
  eve = patch_embedding.EveConfig(width=8, heads=2, patch=2, pool=2)
  # Two cells of four raw patches: stem; CA1 by query and by key; CA2 alike.
  assert patch_embedding.eve_flops(eve, (4, 8)) == 2 * (
      8 * 12 * 8 + (2 * 2 * 64 + 8 * 2 * 64 + 8 * 2 * 8)
      + (2 * 64 + 2 * 2 * 64 + 2 * 2 * 8))
  without = dataclasses.replace(
      eve, local_attention=False, global_attention=False)
  assert patch_embedding.eve_flops(without, (4, 8)) == 2 * (8 * 12 * 8)
  mlp = connector.ConnectorConfig('mlp', 5, hidden=7)
  assert connector.flops(mlp, 3, 2) == 2 * 2 * (3 * 7 + 7 * 5)
  assert connector.flops(connector.ConnectorConfig('linear', 5), 3, 1) == 30
  assert connector.flops(connector.ConnectorConfig('identity', 5), 5, 9) == 0


def test_initial_spread():
  config = patch_embedding.EveConfig(width=512, patch=4)
  params = patch_embedding.Eve(config).init(
      jax.random.key(0), jnp.zeros((1, 1, 8, 8, 3), jnp.uint8),
      jnp.zeros((1, 1, 4), jnp.int32))['params']
  for name in ('class_embedding', 'split_embedding'):
    np.testing.assert_allclose(np.std(params[name]), 1, rtol=0.1)
  for kernel, inputs in (
      (params['patch_embedding']['kernel'], 48),
      (params['local_attention']['key']['kernel'], 512),
      (params['local_attention']['out']['kernel'], 512),
      (params['local_attention']['out']['bias'], 512)):
    np.testing.assert_allclose(np.abs(kernel).max(), inputs ** -0.5, rtol=0.05)
    np.testing.assert_allclose(np.std(kernel), (3 * inputs) ** -0.5, rtol=0.05)


def test_bfloat16_keeps_float32_parameters():
  config = patch_embedding.EveConfig(width=8, heads=2, patch=2,
                                     dtype='bfloat16')
  (table, _), variables = patch_embedding.Eve(config).init_with_output(
      jax.random.key(0), jnp.zeros((1, 1, 4, 4, 3), jnp.uint8),
      jnp.ones((1, 1, 4), jnp.int32))
  assert table.dtype == jnp.bfloat16
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {
      jnp.dtype('float32')}


def test_errors_name_the_field():
  eve = patch_embedding.EveConfig(width=8, heads=2, patch=4)
  with pytest.raises(ValueError, match=r'image.size is \(32, 36\).*pool, 8'):
    eve.image_layout((32, 36))
  with pytest.raises(ValueError, match=r'image.size is \(9, 8\).*patch, 8'):
    patch_embedding.LinearPatchesConfig(width=8, patch=8).image_layout((9, 8))
  with pytest.raises(ValueError, match='vision.heads is 3.*width, 8'):
    patch_embedding.EveConfig(width=8, heads=3)
  with pytest.raises(ValueError, match="'resampler'; allowed: identity"):
    connector.ConnectorConfig('resampler', 8)
  with pytest.raises(ValueError, match="hidden is 4, but 'linear' has no"):
    connector.ConnectorConfig('linear', 8, hidden=4)

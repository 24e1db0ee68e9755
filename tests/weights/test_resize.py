"""Positions of image towers, resized when weights are loaded.

tests/golden/resized.npz holds what the references made of files of golden/ at
another image size: `image`, the normalised embeddings of `images`, in float64,
and where a reference resizes when it loads, the `positions`. They are of
transformers 4.56.2 (interpolate_pos_encoding), open_clip 3.3.0 and timm 1.0.31
(their loaders) and EVA-CLIP's own loader; 'zoom' is scipy.ndimage.zoom of order
1, by which big_vision resizes. timm's loader takes square grids alone, so that
its towers are in a file of their own, timm_resized.npz: weights and config.json
of tiny ones by timm 1.0.31, the `positions` after its loader has made a grid
longer and narrower, and `features` of all tokens.
"""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from mmgen import convert
from mmgen import errors
from mmgen import weights
from mmgen.models import positions
from mmgen.models import vision_encoder
from mmgen.weights import files
from mmgen.weights import two_towers

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden'
EVA = {'vision.placement': 'pre', 'text.mlp': 'gelu', 'text.heads': 3}
CASES = {  # file: (layout, what contents cannot tell)
    'hf_clip_square': ('hf_clip', {}),
    'hf_clip_gelu': ('hf_clip', {}),
    'hf_siglip': ('hf_siglip', {}),
    'hf_siglip_wide': ('hf_siglip', {}),
    'open_clip_square.pt': ('openai_clip', {
        'mlp': 'quick_gelu', 'vision.heads': 3, 'text.heads': 5}),
    'eva_open_clip_rope.safetensors': ('eva_open_clip', EVA | {
        'vision.rope_grid': [16, 16], 'vision.heads': 2}),
    'eva_rope': ('eva_clip', EVA),
}


def golden():
  with np.load(GOLDEN / 'resized.npz') as file:
    return dict(file)


def error(ours, theirs):
  ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
  assert ours.shape == theirs.shape
  return np.abs(ours - theirs).max() / np.abs(theirs).max()


def source(name, folder):
  """A path of the weights; those of EVA are within golden arrays."""
  if name != 'eva_rope':
    return GOLDEN / 'weights' / name
  with np.load(GOLDEN / f'{name}.npz') as file:
    files.write(folder / 'in.safetensors', {
        key.removeprefix('param/'): x for key, x in file.items()
        if key.startswith('param/')})
  return folder / 'in.safetensors'


@pytest.mark.parametrize('name', CASES)
def test_a_resized_tower_gives_the_references_outputs(name, tmp_path):
  layout, said = CASES[name]
  arrays = golden()
  stem = name.partition('.')[0]
  images = arrays[f'{stem}/images']
  path = source(name, tmp_path)
  loaded = weights.load(
      path, said=said | {'vision.image_size': images.shape[1:3]})
  vision = loaded.model.config.vision
  assert loaded.layout == layout and vision.image_size == images.shape[1:3]
  assert weights.recognise(path, said)[1].vision.grid != vision.grid
  if f'{stem}/positions' in arrays:
    assert error(loaded.params['vision']['position_embedding'],
                 arrays[f'{stem}/positions']) < 2e-6
  found = jax.jit(lambda params: loaded.model.apply(
      {'params': params}, images, method='encode_image')[0])(loaded.params)
  assert error(found, arrays[f'{stem}/image']) < 1e-5
  assert loaded.image['size'] == images.shape[1:3]


@pytest.mark.parametrize('layout, said', [
    ('timm_eva', {'vision.placement': 'pre', 'vision.rope_grid': [16, 16]}),
    ('timm_eva_avg', {'vision.placement': 'pre', 'vision.rope_grid': [16, 16]}),
    ('timm_siglip', {})])
def test_a_tower_of_timm_is_resized_as_its_loader_does(layout, said, tmp_path):
  with np.load(GOLDEN / 'timm_resized.npz') as file:
    arrays = {key.removeprefix(f'{layout}/'): x for key, x in file.items()
              if key.startswith(f'{layout}/')}
  files.write(tmp_path / 'in', {
      key.removeprefix('weights/'): x for key, x in arrays.items()
      if key.startswith('weights/')})
  (tmp_path / 'in' / 'config.json').write_text(str(arrays['config']))
  images = arrays['images']
  loaded = weights.load(tmp_path / 'in', said=said | {
      'vision.image_size': images.shape[1:3]})
  vision = loaded.model.config.vision
  assert loaded.layout == layout and vision.image_size == images.shape[1:3]
  grid = weights.recognise(tmp_path / 'in', said)[1].vision.grid
  assert sorted([vision.grid[0] > grid[0], vision.grid[1] > grid[1]]) == [
      False, True] and grid[0] == grid[1]
  assert error(loaded.params['vision']['position_embedding'],
               arrays['positions']) < 2e-6
  last = vision.layers
  _, out = jax.jit(lambda params: loaded.model.apply(
      {'params': params}, images, (last,), method='encode_image'))(
          loaded.params)
  # What averages has its norm after that.
  found = out['taps'][last] if layout == 'timm_eva_avg' else out['hidden']
  assert error(found, arrays['features']) < 1e-5


def test_big_vision_is_zoomed(tmp_path):
  arrays = golden()
  for i in range(3):
    table, old, new, theirs = (arrays[f'zoom{i}/{k}'] for k in (
        'table', 'old', 'new', 'linear'))
    found = positions.resize_positions(table, old, new, 'linear')
    assert error(found, theirs) < 1e-6
  # The grid of 4 x 4 is read off the table.
  path = GOLDEN / 'weights' / 'big_vision.npz'
  whole = weights.load(path, said={'vision.image_size': (14, 13)})
  assert whole.model.config.vision.image_size == (14, 13)
  loaded = weights.load(path, said={'vision.image_size': (25, 10)})
  old = whole.model.config.vision.grid
  assert loaded.model.config.vision.grid != old
  np.testing.assert_array_equal(
      loaded.params['vision']['position_embedding'],
      positions.resize_positions(
          whole.params['vision']['position_embedding'], old,
          loaded.model.config.vision.grid, 'linear'))


@pytest.mark.parametrize('dtype', ['float32', 'float16'])
def test_what_is_exported_has_the_new_size(dtype, tmp_path):
  tensors = {name: tensor.array().astype(dtype) for name, tensor in files.open(
      GOLDEN / 'weights' / 'hf_siglip').items()}
  files.write(tmp_path / 'in', tensors)
  shutil.copy(GOLDEN / 'weights' / 'hf_siglip' / 'config.json', tmp_path / 'in')
  (tmp_path / 'in' / 'preprocessor_config.json').write_text(json.dumps(dict(
      image_mean=[0.5] * 3, size=dict(height=13, width=13), do_resize=True)))
  convert.main([f'--from={tmp_path}/in', '--say=vision.image_size=[20, 11]',
                f'--to={tmp_path}/run'])
  convert.main([f'--from={tmp_path}/run', f'--to={tmp_path}/out'])
  after = files.open(tmp_path / 'out')
  assert after.keys() == tensors.keys()
  name = 'vision_model.embeddings.position_embedding.weight'
  for key, tensor in after.items():
    if key == name:
      expected = positions.resize_positions(
          tensors[key].astype(np.float32), (4, 4), (6, 3))
      assert tensor.dtype == dtype
      np.testing.assert_array_equal(tensor.array(), expected.astype(dtype))
    else:
      assert tensor.array().tobytes() == tensors[key].tobytes()
  _, config = weights.recognise(tmp_path / 'out')
  assert config.vision.image_size == (20, 11)
  beside = json.loads((tmp_path / 'out' / 'preprocessor_config.json'
                       ).read_text())
  assert beside == dict(image_mean=[0.5] * 3, do_resize=True,
                        size=dict(height=20, width=11))


def test_json_files_are_restated():
  beside = {
      'config.json': dict(
          model_type='x', image_size=3, text_config=dict(image_size=1),
          vision_config=dict(image_size=224, hidden_size=8),
          pretrained_cfg=dict(input_size=[3, 224, 224], mean=[1, 2, 3])),
      'open_clip_config.json': dict(
          model_cfg=dict(vision_cfg=dict(image_size=224)),
          preprocess_cfg=dict(size=[224, 224])),
      'preprocessor_config.json': dict(
          size=dict(shortest_edge=224), crop_size=224)}
  found = two_towers.restated(beside, (448, 448))
  assert found['config.json'] == beside['config.json'] | dict(
      vision_config=dict(image_size=448, hidden_size=8),
      pretrained_cfg=dict(input_size=[3, 448, 448], mean=[1, 2, 3]))
  assert found['open_clip_config.json'] == dict(
      model_cfg=dict(vision_cfg=dict(image_size=448)),
      preprocess_cfg=dict(size=448))
  assert found['preprocessor_config.json'] == dict(
      size=dict(shortest_edge=448), crop_size=448)


def test_rotary_positions_are_stretched_over_the_new_grid(tmp_path):
  loaded = weights.load(source('eva_rope', tmp_path), said=EVA | {
      'vision.image_size': [40, 20]})
  vision = loaded.model.config.vision
  assert (vision.grid, vision.rope_grid) == ((8, 4), (16, 16))
  np.testing.assert_array_equal(vision.places[1:6], [
      [0, 0], [0, 4], [0, 8], [0, 12], [2, 0]])


def test_impossible_sizes():
  path = GOLDEN / 'weights' / 'hf_clip_square'
  for size in 448, [448], ['a', 'b'], [0, 9], 'big':
    with pytest.raises(errors.UserError, match='image_size is said to be .*; a'
                       r'llowed: \[rows, columns\]'):
      weights.load(path, said={'vision.image_size': size})
  with pytest.raises(errors.UserError, match='smaller than vision.patch, 4'):
    weights.load(path, said={'vision.image_size': [3, 9]})


def test_a_grid_that_nothing_tells_is_what_is_said(tmp_path):
  """A bare table of 4 x 2 cells, or of 16, which need not be 4 x 4."""
  path = GOLDEN / 'weights' / 'open_clip_oblong.pt'
  said = {'mlp': 'gelu', 'vision.heads': 1, 'text.heads': 3}
  _, config = weights.recognise(path, said | {'vision.image_size': (10, 20)})
  with pytest.raises(errors.UserError, match='positional_embedding is'):
    weights.load(path, said=said | {'vision.image_size': (40, 40)})
  sizes = {'vision.image_size': (16, 16), 'vision.patch': 4,
           'vision.width': 18}
  asks = two_towers.asks_to_resize
  assert not asks(sizes, {}, (8, 32)) and not asks(sizes, {}, (19, 19))
  assert asks(sizes, {}, (8, 28)) and asks(sizes, sizes, (8, 32))
  # Of the size of a published tower: a square.
  c = vision_encoder.SIZES['clip-l14']
  sizes = {f'vision.{field}': getattr(c, field)
           for field in ('image_size', 'patch', 'width')}
  assert asks(sizes, {}, (112, 448)) and not asks(sizes, {}, (230, 224))

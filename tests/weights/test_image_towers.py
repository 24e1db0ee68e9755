"""Image towers by themselves, as timm and the authors of EVA publish them.

`golden/weights/` holds tiny random models: timm_* as timm 1.0.31 saves them,
eva0?_mim*.pt of the authors' code of EVA and EVA-02; and `tower_outputs.npz`
what these gave in float64: features of all tokens, of images that are not
hidden in part, and what is predicted of them or how they are pooled.
"""

import dataclasses
import json
import logging
import re
import shutil

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import published_files
import pytest
import reference

from mmgen import errors
from mmgen import weights
from mmgen.models import clip
from mmgen.models import image_tower
from mmgen.models import vision_encoder
from mmgen.training import inherit
from mmgen.training import sharding
from mmgen.weights import files
from mmgen.weights import image_towers
from mmgen.weights import two_towers

GOLDEN = reference.GOLDEN / 'weights'
PLAIN = {'vision.placement': 'pre', 'vision.rope_grid': 'none'}
CASES = {  # file: (layout, dtype, what contents cannot tell)
    'timm_eva_clip': ('timm_eva', 'float16', {
        'vision.placement': 'pre', 'vision.rope_grid': [16, 16],
        'vision.heads': 3}),
    'timm_eva_packed': ('timm_eva_avg', 'float32', {
        'vision.placement': 'pre', 'vision.rope_grid': [16, 16],
        'vision.heads': 2}),
    'timm_siglip': ('timm_siglip', 'float32', {}),
    'eva01_mim.pt': ('eva_tower', 'float16', PLAIN | {
        'vision.heads': 4, 'vision.image_size': [17, 17]}),
    # Heads and grid stand in the tables of angles.
    'eva02_mim.pt': ('eva_tower', 'float32', {'vision.placement': 'pre'}),
    'eva02_mim_post.pt': ('eva_tower', 'float32', {
        'vision.placement': 'post', 'vision.rope_grid': 'none',
        'vision.heads': 5}),
}


@pytest.mark.parametrize('name', CASES)
def test_a_tower_gives_the_references_features(name):
  layout, dtype, said = CASES[name]
  loaded = weights.load(GOLDEN / name, said=said)
  expected = reference.outputs('tower_outputs', name)
  config = loaded.model.config
  assert loaded.layout == layout
  assert {str(d) for d in loaded.dtypes.values()} == {dtype}
  run = jax.jit(lambda params, taps: loaded.model.apply(
      {'params': params}, expected['images'], taps, method='encode_image'),
                static_argnums=1)
  pooled, out = run(loaded.params, (config.vision.layers,))
  if layout == 'timm_eva_avg':  # its norm comes after the average
    reference.close(out['taps'][config.vision.layers], expected['features'])
  else:
    reference.close(out['hidden'], expected['features'])
  if layout in ('timm_eva', 'timm_siglip'):
    reference.close(pooled, expected['pooled'])
  if layout == 'eva_tower':
    _, out = loaded.model.apply({'params': loaded.params}, expected['images'])
    reference.close(out['predicted'], expected['predicted'])
    assert loaded.params['mask_token'].shape == (config.vision.width,)
  assert loaded.image['size'] == expected['images'].shape[1:3]


@pytest.mark.parametrize('dtype', published_files.DTYPES)
@pytest.mark.parametrize('name', CASES)
def test_export_after_import_is_identical(name, dtype, tmp_path):
  layout, _, said = CASES[name]
  tensors = {key: tensor.array() for key, tensor in files.open(
      GOLDEN / name).items() if 'freqs' not in key}
  own = {file.name: file for file in (GOLDEN / name).glob('*.json')}
  (tmp_path / 'in').mkdir()
  for file in own.values():
    shutil.copy(file, tmp_path / 'in')
  if name == 'eva02_mim.pt':
    said = said | {'vision.heads': 3, 'vision.rope_grid': [5, 5]}
  published_files.round_trip(tensors, tmp_path, None, layout, dtype, said)


# ---------------------------------------------------------------------------
# Recognition


# size: (norm within the attention, parameters by timm of a bare tower)
EVA = {
    'eva02-ti14': (False, 5_502_144), 'eva02-s14': (False, 21_621_120),
    'eva02-b16': (True, 0), 'eva02-l14': (True, 0), 'eva01-g14': (False, 0),
    'eva02-e14': (False, 0), 'eva-8b': (False, 0), 'eva-18b': (False, 0)}


@pytest.mark.parametrize('size', EVA)
def test_published_towers_are_told_by_their_shapes(size):
  """Before they become an EVA-CLIP they have no norm in the attention."""
  inner, parameters = EVA[size]
  vision = dataclasses.replace(
      vision_encoder.SIZES[size], inner_attention_norm=False)
  recognised = published_files.recognised
  for layout, fields in (
      ('eva_tower', dict(predicted=1024, mask=True)),
      ('timm_eva_avg', {}), ('timm_eva', dict(embed=768))):
    config = image_tower.ImageTowerConfig(vision, **fields)
    tensors, count = published_files.shapes(layout, config)
    assert recognised(tensors) == (layout, config)
    if parameters and layout == 'timm_eva_avg':
      assert count == parameters
  if size == 'eva02-b16':  # as it was pretrained, in patches of 14
    base = dataclasses.replace(vision, patch=14)
    config = image_tower.ImageTowerConfig(base)
    tensors, count = published_files.shapes('timm_eva_avg', config)
    assert recognised(tensors)[1] == config and count == 85_758_720
  if inner:
    config = image_tower.ImageTowerConfig(
        vision_encoder.SIZES[size], embed=768, embed_bias=False)
    shapes, _ = published_files.shapes('timm_eva', config)
    assert recognised(shapes)[1] == config


@pytest.mark.parametrize('size', ['siglip-b16', 'siglip-so400m-384'])
def test_published_siglip_towers_are_told(size):
  exact = dataclasses.replace(vision_encoder.SIZES[size], mlp='gelu')
  tower = image_tower.ImageTowerConfig(exact)
  tensors, _ = published_files.shapes('timm_siglip', tower)
  own = {'config.json': dict(
      architecture='vit_base_patch16_siglip_224', pretrained_cfg=dict(
          input_size=[3, *exact.image_size], mean=[0.5] * 3))}
  recognised = published_files.recognised
  assert recognised(tensors, own) == ('timm_siglip', tower)
  assert recognised(tensors, said={'vision.mlp': 'gelu'})[1] == tower
  own['config.json']['architecture'] = 'vit_so400m_patch16_siglip_384.v2_webli'
  assert recognised(tensors, own)[1].vision == vision_encoder.SIZES[size]
  with pytest.raises(errors.Unsaid, match='tell vision.mlp'):
    recognised(tensors)


def test_names_of_packed_matrices():
  """By hand, from the code of EVA-02 and of timm."""
  config = image_tower.ImageTowerConfig(vision_encoder.SIZES['eva02-ti14'])
  authors, _ = published_files.shapes('eva_tower', config)
  timm, _ = published_files.shapes('timm_eva_avg', config)
  block = 'blocks.11.'
  assert authors[f'{block}mlp.w12.weight'].shape == (1024, 192)
  assert authors[f'{block}mlp.w3.weight'].shape == (192, 512)
  assert timm[f'{block}mlp.fc1.bias'].shape == (1024,)
  assert timm[f'{block}attn.qkv.weight'].shape == (576, 192)
  assert 'fc_norm.bias' in timm and 'norm.bias' in authors
  assert not {f'{block}mlp.w1.weight', f'{block}mlp.fc1_g.weight',
              f'{block}attn.k_bias'} & (authors.keys() | timm.keys())


def test_other_towers_are_refused():
  config = image_tower.ImageTowerConfig(vision_encoder.SIZES['eva02-b16'])
  tensors, _ = published_files.shapes('timm_eva_avg', config)
  tensors['head.weight'] = tensors['fc_norm.weight']
  with pytest.raises(errors.UserError, match='weights of a classifier'):
    published_files.recognised(tensors)
  # A plain ViT of timm has all three biases in one.
  tensors = {re.sub('attn.q_bias', 'attn.qkv.bias', name): x
             for name, x in tensors.items() if 'q_proj' not in name}
  tensors['blocks.0.attn.qkv.bias'] = None
  assert not any(family.recognise(tensors, {}, {})
                 for family in weights.FAMILIES.values())


def test_what_nothing_tells_is_asked():
  with pytest.raises(errors.Unsaid, match='--say=vision.heads') as caught:
    weights.recognise(GOLDEN / 'eva01_mim.pt')
  assert caught.value.fields == [
      'vision.heads', 'vision.placement', 'vision.rope_grid']
  with pytest.raises(errors.UserError, match='cannot be said of an image tower'
                     '; what can: vision.placement'):
    weights.recognise(GOLDEN / 'eva01_mim.pt', {'text.heads': 3})
  with pytest.raises(errors.UserError, match='rope_grid is said to be'):
    weights.recognise(GOLDEN / 'eva01_mim.pt', {'vision.rope_grid': 16})


def test_all_that_is_wrong_is_one_error(tmp_path):
  tensors = {key: tensor.array() for key, tensor in files.open(
      GOLDEN / 'eva02_mim.pt').items()}
  tensors['blocks.1.mlp.w2.wait'] = tensors.pop('blocks.1.mlp.w2.weight')
  del tensors['norm.weight'], tensors['lm_head.bias']
  tensors['cls_token'] = np.zeros((1, 1, 25), np.float32)
  files.write(tmp_path / 'a.safetensors', tensors)
  with pytest.raises(errors.UserError) as caught:
    weights.load(tmp_path / 'a.safetensors', said=CASES['eva02_mim.pt'][2])
  for part in ('blocks.1.mlp.w2.weight is missing (nearest there: blocks.1.mlp'
               '.w2.wait)', 'norm.weight is missing', 'lm_head.bias is missing',
               'blocks.1.mlp.w2.wait is extra',
               'cls_token is [1, 1, 25], not [1, 1, 24]'):
    assert part in str(caught.value)
  assert str(caught.value).count(';') == 4


# ---------------------------------------------------------------------------
# Starting from them


def eva_clip_like(name, **vision):
  """An EVA-CLIP whose image tower is that of a file, with what it adds."""
  _, config = weights.recognise(GOLDEN / name, CASES[name][2])
  return dataclasses.replace(
      clip.SIZES['eva02-b16'], vision=dataclasses.replace(
          config.vision, **vision),
      text=dataclasses.replace(clip.SIZES['mini'].text, vocab=9), embed=6)


@pytest.mark.parametrize('name', ['eva01_mim.pt', 'eva02_mim.pt',
                                  'timm_eva_packed'])
def test_an_eva_clip_starts_from_a_tower(name, caplog):
  """At another size, with a norm that the tower has not got."""
  config = eva_clip_like(name, image_size=(24, 20), inner_attention_norm=True)
  mesh = sharding.make_mesh(dict(data=1, fsdp=1, tensor=1, sequence=1),
                            jax.devices()[:1])
  _, ours = two_towers.build(config, 'float32')
  where = sharding.shardings(mesh, ours)
  fresh = {key: jax.device_put(jnp.full(leaf.shape, 7.0), where[key])
           for key, leaf in ours.items()}
  with caplog.at_level(logging.WARNING):
    params, report = inherit.inherit(
        fresh, {'vision': GOLDEN / name}, mesh, None, vars(config))
  report = report['vision']
  assert report['fresh'] == [f'vision/stack/blocks/attention/norm/{leaf}'
                             for leaf in ('bias', 'scale')]
  assert report['resized'] == ['vision/position_embedding']
  assert not report['differs'] and not report['unused'] and not caplog.text
  loaded = weights.load(GOLDEN / name, said=CASES[name][2] | {
      'vision.image_size': (24, 20)})
  flat = flax.traverse_util.flatten_dict(loaded.params, sep='/')
  for key, leaf in params.items():
    np.testing.assert_array_equal(
        leaf, flat[key] if key in report['copied'] + report['resized']
        else fresh[key], err_msg=key)
  assert len(report['copied']) > 12
  # Another norm that is missing is no such thing.
  del fresh['vision/stack/final_norm/scale']
  with pytest.raises(errors.UserError, match='final_norm/scale .*is only in'):
    inherit.inherit(fresh, {'vision': GOLDEN / name}, mesh, None, vars(config))


def test_layouts_are_all_tried():
  assert {case[0] for case in CASES.values()} == image_towers.LAYOUTS.keys()
  assert image_towers.LAYOUTS.keys() <= weights.FAMILIES.keys()
  assert json.loads((GOLDEN / 'timm_eva_clip' / 'config.json').read_text())[
      'architecture'] == 'eva02_base_patch16_clip_224'

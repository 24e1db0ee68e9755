"""EVE and EVEv2 from files as their authors write them, and back.

The files are made here of the arrays in `golden/`, which hold weights under the
names of the released files, those of training included, and what EVE's own
model gave with them.
"""

import dataclasses
import json

import jax
import numpy as np
import published_files
import pytest
import reference

from mmgen import errors
from mmgen import weights
from mmgen.models import alignment
from mmgen.models import multimodal
from mmgen.models import vision_encoder

CONFIGS = {
    'eve_7b': dict(model_type='eve', num_attention_heads=3, rms_norm_eps=1e-5,
                   mm_projector_type='mlp2x_gelu'),
    'eve_7b_hd': dict(model_type='eve', num_attention_heads=5,
                      rms_norm_eps=1e-3, rope_theta=100.0)}
CLIP = 'model.vision_clip.backbone.vision_model.'
COPY = 'model.vision_tower_compressor.clip_layer.backbone.vision_model.'


def tensors_of(name, layout):
  """Weights of inference, or with the aligning layer; never with CLIP."""
  return {key: x for key, x in reference.load(name)[1].items()
          if not key.startswith(CLIP) and (
              layout == 'eve_aligned' or 'compressor' not in key)}


def with_clip(tensors, name):
  """What a file of training holds besides, and is not read."""
  _, whole = reference.load(name)
  clip = {key: x for key, x in whole.items() if key.startswith(CLIP)}
  buffer = 'model.layers.0.self_attn.rotary_emb.inv_freq'
  return tensors | clip | {buffer: np.ones(2)} | {
      COPY + key.removeprefix(CLIP): x for key, x in clip.items()}


@pytest.mark.parametrize('name, layout', [
    ('eve_7b', 'eve'), ('eve_7b_hd', 'eve_aligned')])
def test_import_gives_the_references_parameters(name, layout, tmp_path):
  # That these give its outputs is seen in tests/models/test_eve.py.
  tensors = tensors_of(name, layout)
  loaded = weights.load(published_files.save(
      tmp_path / 'in', with_clip(tensors, name), CONFIGS[name]))
  assert loaded.layout == layout
  assert weights.FAMILIES[layout].style == 'vicuna_v1'
  c = loaded.model.config
  vision, projector = reference.eve(tensors, c.vision, 'model.')
  expected = {'vision': vision, 'connector': projector,
              'decoder': reference.llama(tensors, c.decoder)}
  if layout == 'eve_aligned':
    expected['aligner'] = reference.patch_aligner(
        tensors, 'model.vision_tower_compressor.')
  jax.tree.map(np.testing.assert_array_equal, loaded.params, expected)
  assert (c.decoder.heads, c.decoder.norm_eps, c.decoder.rope_theta) == (
      (3, 1e-5, 1e4) if name == 'eve_7b' else (5, 1e-3, 100.0))


@pytest.mark.parametrize('name, layout, dtype', [
    (name, layout, dtype)
    for i, layout in enumerate(('eve', 'eve_aligned'))
    for j, dtype in enumerate(published_files.DTYPES)
    for name in [list(CONFIGS)[(i + j) % 2]]])
def test_export_after_import_is_identical(name, layout, dtype, tmp_path):
  published_files.round_trip(tensors_of(name, layout), tmp_path, CONFIGS[name],
                             layout, dtype)


def test_eve_7b():
  config = multimodal.SIZES['eve-7b']
  tensors, count = published_files.shapes('eve', config)
  assert count == 6_768_398_336
  D, tower = 1024, 'model.vision_tower.'
  wanted = {
      'lm_head.weight': (32000, 4096),
      'model.embed_tokens.weight': (32000, 4096),
      'model.layers.31.self_attn.o_proj.weight': (4096, 4096),
      'model.layers.31.mlp.down_proj.weight': (4096, 11008),
      f'{tower}patch_embedding.weight': (D, 3, 14, 14),
      f'{tower}class_embedding': (D,), f'{tower}split_embedding': (D,),
      'model.mm_projector.0.weight': (4096, D),
      'model.mm_projector.2.weight': (4096, 4096),
      'model.mm_projector.2.bias': (4096,)}
  for name in ('local_attention', 'global_attention'):
    wanted |= {f'{tower}{name}.{part}': shape for part, shape in {
        'q.0.weight': (D,), 'q.0.bias': (D,), 'q.1.weight': (D, D),
        'kv.0.weight': (D,), 'kv.0.bias': (D,), 'kv.1.weight': (2 * D, D),
        'proj.weight': (D, D), 'proj.bias': (D,)}.items()}
  assert wanted == {name: tensors[name].shape for name in wanted}
  assert published_files.recognised(tensors) == ('eve', config)
  of_tower = [x for name, x in tensors.items() if name.startswith(tower)]
  assert sum(np.prod(x.shape) for x in of_tower) == 9_003_008

  aligned = weights.eve.AlignedConfig(
      **vars(config), aligner=alignment.SIZES['eve-7b'])
  tensors, count = published_files.shapes('eve_aligned', aligned)
  assert count == 6_811_465_728
  layer = 'model.vision_tower_compressor.'
  wanted = {f'{layer}input_layer.weight': (D, 4096),
            f'{layer}output_layer.weight': (D, D),
            f'{layer}output_layer.bias': (D,)} | {
                f'{layer}norm_layer.{j}.{part}': shape for j in range(9)
                for part, shape in (('0.weight', (4096,)), ('0.bias', (4096,)),
                                    ('1.weight', (D, 4096)))}
  assert wanted == {name: tensors[name].shape for name in wanted}
  for own in {}, CONFIGS['eve_7b'] | dict(num_attention_heads=32):
    assert published_files.recognised(
        tensors, {'config.json': own}) == ('eve_aligned', aligned)


def test_pictures_are_as_the_files_beside_say():
  image = weights.FAMILIES['eve'].image
  of = lambda **files: image(multimodal.SIZES['eve-7b'], {
      f'{name}.json': content for name, content in files.items()})
  assert of() == dict(
      size=(672, 672), fit='pad', kernel='bicubic',
      mean=vision_encoder.CLIP_MEAN, std=vision_encoder.CLIP_STD)
  name = dict(mm_vision_tower='openai/eve-patch14-anypixel-1344')
  for found in (of(config=name), of(preprocessor_config=dict(
      image_size=1344, image_size_clip=336, patch_stride_clip=14))):
    assert (found['size'], found['fit']) == ((1344, 1344), 'pad_pairs')
  with pytest.raises(errors.UserError, match='36 x 36 cells .* 24 x 24 of'):
    of(preprocessor_config=dict(image_size=1008))
  tensors, _ = published_files.shapes('eve', multimodal.SIZES['eve-7b'])
  _, found = published_files.recognised(tensors, {
      'preprocessor_config.json': dict(
          conv_stride=3, image_mean=[0.1, 0.2, 0.3])})
  assert found.vision == dataclasses.replace(
      multimodal.SIZES['eve-7b'].vision, pool=3, mean=(0.1, 0.2, 0.3))


@pytest.mark.parametrize('name, fields', [
    ('eve_v2', dict(max_size='a')), ('eve_v2', dict(max_size=-6)),
    ('eve_v2', dict(max_size=6 * 10**8)),
    ('eve_7b', dict(patch_stride_clip=0)), ('eve_7b', dict(conv_stride=10**9)),
    ('eve_7b', dict(image_mean=[1, 'a', 3]))])
def test_pictures_that_cannot_be_are_one_error(name, fields, tmp_path):
  path = published_files.save(
      tmp_path / 'in', tensors_of(name, 'eve'), (V2 | CONFIGS)[name])
  (path / 'preprocessor_config.json').write_text(json.dumps(fields))
  with pytest.raises(errors.UserError) as caught:
    weights.load(path)
  assert '\n' not in str(caught.value)


def test_what_is_wrong_is_said(tmp_path):
  tensors = tensors_of('eve_7b', 'eve')
  for more, message in (
      (dict(model_type='llava_llama'), "'llava_llama', and the tensors have"),
      (dict(mm_projector_type='linear'), "type='linear', which is not")):
    with pytest.raises(errors.UserError, match=message):
      published_files.recognised(
          tensors, {'config.json': CONFIGS['eve_7b'] | more})
  with pytest.raises(errors.UserError, match='tell decoder.heads'):
    published_files.recognised(tensors)
  tensors['model.vision_tower.local_attention.kv.1.weight'] = np.zeros((31, 16))
  del tensors['model.mm_projector.2.bias']
  with pytest.raises(errors.UserError) as caught:
    weights.load(published_files.save(tmp_path / 'in', tensors,
                                      CONFIGS['eve_7b']))
  for part in ('mm_projector.2.bias is missing',
               'local_attention.kv.1.weight is [31, 16], not [32, 16]'):
    assert part in str(caught.value)
  assert str(caught.value).count(';') == 1


# ---------------------------------------------------------------------------
# EVEv2


V2 = {'eve_v2': dict(model_type='eve-qwen2', num_attention_heads=3,
                     rms_norm_eps=1e-6, rope_theta=1e6, add_moe=True),
      'eve_v2_parts': dict(model_type='eve-qwen2', num_attention_heads=5,
                           rms_norm_eps=1e-3, rope_theta=100.0)}


@pytest.mark.parametrize('name', V2)
def test_import_of_both_sets(name, tmp_path):
  # That these give the reference's outputs is seen in test_eve_v2.py.
  _, tensors = reference.load(name)
  loaded = weights.load(published_files.save(tmp_path / 'in', tensors,
                                             V2[name]))
  assert loaded.layout == 'eve_v2'
  c = loaded.model.config
  assert c.decoder.modality_weights == (
      ('norms', 'attention', 'mlp') if name == 'eve_v2'
      else ('attention', 'mlp'))
  assert (c.vision.patch, c.vision.pool, c.vision.hidden) == (
      (3, 2, 14) if name == 'eve_v2' else (4, 2, 10))
  blocks = loaded.params['decoder']['stack']['blocks']
  for of, mark in ((blocks, ''), (blocks['visual'], 'moe_')):
    for i in range(c.decoder.layers):
      block = f'model.layers.{i}.'
      np.testing.assert_array_equal(
          of['mlp']['down']['kernel'][i],
          tensors[f'{block}{mark}mlp.down_proj.weight'].T)
      np.testing.assert_array_equal(
          of['attention']['key']['bias'][i].ravel(),
          tensors[f'{block}self_attn.{mark}k_proj.bias'])
      if 'attention_norm' in of:
        np.testing.assert_array_equal(
            of['attention_norm']['scale'][i],
            tensors[f'{block}{mark}input_layernorm.weight'])
  assert ('mlp_norm' in blocks['visual']) == (name == 'eve_v2')


@pytest.mark.parametrize('name, dtype', [
    (list(V2)[i % 2], dtype) for i, dtype in enumerate(published_files.DTYPES)])
def test_export_of_both_sets_is_identical(name, dtype, tmp_path):
  published_files.round_trip(reference.load(name)[1], tmp_path, V2[name],
                             'eve_v2', dtype)


def test_eve_v2():
  config = multimodal.SIZES['eve-7b-hd-v2.0']
  tensors, count = published_files.shapes('eve_v2', config)
  assert count == 14_156_712_960
  D, F, block, tower = 3584, 18944, 'model.layers.27.', 'model.vision_tower.'
  wanted = {
      'lm_head.weight': (152064, D), f'{tower}class_embedding': (D,),
      f'{tower}split_embedding': (D,),
      f'{tower}patch_embedding.0.weight': (1024, 3, 16, 16),
      f'{tower}patch_embedding.0.bias': (1024,),
      f'{tower}patch_embedding.2.weight': (D, 1024, 2, 2),
      f'{tower}patch_embedding.2.bias': (D,)}
  for mark in ('', 'moe_'):
    wanted |= {f'{block}{part}': shape for part, shape in {
        f'self_attn.{mark}q_proj.weight': (D, D),
        f'self_attn.{mark}q_proj.bias': (D,),
        f'self_attn.{mark}k_proj.weight': (512, D),
        f'self_attn.{mark}v_proj.bias': (512,),
        f'self_attn.{mark}o_proj.weight': (D, D),
        f'{mark}mlp.gate_proj.weight': (F, D),
        f'{mark}mlp.down_proj.weight': (D, F),
        f'{mark}input_layernorm.weight': (D,),
        f'{mark}post_attention_layernorm.weight': (D,)}.items()}
  assert wanted == {name: tensors[name].shape for name in wanted}
  of_block = [x for name, x in tensors.items() if name.startswith(block)]
  assert sum(np.prod(x.shape) for x in of_block) == 2 * 233_057_792
  for own in {}, V2['eve_v2'] | dict(num_attention_heads=28):
    assert published_files.recognised(
        tensors, {'config.json': own}) == ('eve_v2', config)
  for parts in ('norms',), ('mlp',), ():  # as EVEv2's ablations have them
    fewer = dataclasses.replace(config, decoder=dataclasses.replace(
        config.decoder, modality_weights=parts))
    assert published_files.recognised(published_files.shapes(
        'eve_v2', fewer)[0]) == ('eve_v2', fewer)
  image = weights.FAMILIES['eve_v2'].image
  assert image(config, {}) == dict(
      size=(3200, 3200), fit='area_up', kernel='bicubic',
      mean=vision_encoder.CLIP_MEAN, std=vision_encoder.CLIP_STD)
  of = lambda edge: image(config, {
      'preprocessor_config.json': dict(max_size=edge)})
  assert of(800)['size'] == (1600, 1600)
  with pytest.raises(errors.UserError, match='max_size 777; twice of it must'):
    of(777)
  with pytest.raises(errors.UserError, match="'eve', and the tensors have the"):
    published_files.recognised(
        tensors, {'config.json': dict(model_type='eve')})

"""Fuyu-8B from files as transformers writes them, and back.

The files are made here of the arrays in `golden/`, which hold weights under the
names of the published files, and what transformers' model gave with them.
"""

import dataclasses

import jax
import numpy as np
import published_files
import pytest
import reference

from mmgen import errors
from mmgen import weights
from mmgen.models import multimodal

# Beside sizes, which shapes tell; of old they stood at the top.
CONFIGS = {
    'fuyu_wide': dict(model_type='fuyu', text_config=dict(
        model_type='persimmon', num_attention_heads=3, hidden_act='relu2')),
    'fuyu_tall': dict(model_type='fuyu', rope_theta=100.0, qk_layernorm=True,
                      partial_rotary_factor=0.75, layer_norm_eps=1e-3)}
SAID = {
    'fuyu_wide': {'decoder.rope_theta': 25e3, 'decoder.rope_share': 0.5,
                  'decoder.norm_eps': 1e-5},
    'fuyu_tall': {'decoder.rope_theta': 100.0, 'decoder.rope_share': 0.75,
                  'decoder.norm_eps': 1e-3}}
CANVAS = {'fuyu_wide': (15, 35), 'fuyu_tall': (20, 12)}
NEW = {'language_model.model.': 'model.language_model.',
       'language_model.lm_head': 'lm_head',
       'vision_embed_tokens': 'model.vision_embed_tokens'}


def renamed(tensors, layout):
  if layout == 'hf_fuyu':
    return tensors
  made = {}
  for name, tensor in tensors.items():
    old = next(old for old in NEW if name.startswith(old))
    made[NEW[old] + name.removeprefix(old)] = tensor
  return made


@pytest.mark.parametrize('layout, with_config', [
    ('hf_fuyu', True), ('hf_fuyu', False), ('hf_fuyu_new', True)])
@pytest.mark.parametrize('name', CONFIGS)
def test_import_gives_the_references_outputs(name, layout, with_config,
                                             tmp_path):
  arrays, tensors = reference.load(name)
  loaded = weights.load(published_files.save(
      tmp_path / 'in', renamed(tensors, layout),
      CONFIGS[name] if with_config else None),
                        said={} if with_config else SAID[name])
  assert loaded.layout == layout
  cols = loaded.model.config.vision.image_layout(CANVAS[name]).cols
  run = jax.jit(lambda batch: loaded.model.apply(
      {'params': loaded.params}, batch)[0])
  for i in (0, 1):
    tokens, visual = arrays[f'tokens/{i}'], arrays[f'visual/{i}']
    # Reference: numbers of the patches that are picture; ours: of the canvas.
    y, x = np.divmod(visual, (tokens == 9).sum() // (tokens == 10).sum())
    batch = dict(
        tokens=tokens, segments=np.ones_like(tokens),
        positions=np.arange(len(tokens)),
        visual=np.where(visual < 0, -1, y * cols + x),
        images=arrays[f'canvas/{i}'][None],
        image_box=np.zeros((1, 4), np.int32))
    with jax.default_matmul_precision('highest'):
      logits = run({key: value[None] for key, value in batch.items()})[0]
    assert reference.error(logits, arrays[f'logits/{i}']) < 1e-5


@pytest.mark.parametrize('name, layout, dtype', [
    (name, layout, dtype) for i, layout in enumerate(('hf_fuyu', 'hf_fuyu_new'))
    for j, dtype in enumerate(published_files.DTYPES)
    for name in [list(CONFIGS)[(i + j) % 2]]])
def test_export_after_import_is_identical(name, layout, dtype, tmp_path):
  published_files.round_trip(
      renamed(reference.load(name)[1], layout), tmp_path, CONFIGS[name], layout,
      dtype)


@pytest.mark.parametrize('layout', ['hf_fuyu', 'hf_fuyu_new'])
def test_fuyu_8b(layout):
  config = multimodal.SIZES['fuyu-8b']
  tensors, count = published_files.shapes(layout, config)
  assert count == 9_408_238_592
  block, D = 'language_model.model.layers.{}.', 4096
  wanted = {
      'language_model.model.embed_tokens.weight': (262144, D),
      'language_model.lm_head.weight': (262144, D),
      'vision_embed_tokens.weight': (D, 2700), 'vision_embed_tokens.bias': (D,)}
  for name, shape in {
      'self_attn.query_key_value': (3 * D, D), 'self_attn.dense': (D, D),
      'self_attn.q_layernorm': (64,), 'self_attn.k_layernorm': (64,),
      'mlp.dense_h_to_4h': (4 * D, D), 'mlp.dense_4h_to_h': (D, 4 * D),
      'input_layernorm': (D,), 'post_attention_layernorm': (D,)}.items():
    for i in range(36):
      wanted |= {f'{block}{name}.weight'.format(i): shape,
                 f'{block}{name}.bias'.format(i): shape[:1]}
  for leaf in ('weight', 'bias'):
    wanted[f'language_model.model.final_layernorm.{leaf}'] = (D,)
  assert renamed(wanted, layout) == {
      name: tensor.shape for name, tensor in tensors.items()}
  own = dict(model_type='fuyu', num_attention_heads=64)
  for beside in {}, {'config.json': own}:
    assert published_files.recognised(tensors, beside) == (layout, config)
  assert weights.FAMILIES[layout].image(config, {}) == dict(
      size=(1080, 1920), fit='fuyu', kernel='bilinear', mean=(0.5,) * 3,
      std=(0.5,) * 3)
  size = dict(size=dict(height=30, width=60))
  assert weights.FAMILIES[layout].image(
      config, {'preprocessor_config.json': size})['size'] == (30, 60)


def test_a_config_decides_what_shapes_do_not():
  _, tensors = reference.load('fuyu_wide')
  find = lambda **more: published_files.recognised(tensors, {
      'config.json': CONFIGS['fuyu_wide'] | more})[1].decoder
  found = find(text_config=None, num_hidden_layers=2, rope_parameters=dict(
      rope_type='default', rope_theta=9.0, partial_rotary_factor=1.0))
  assert found == dataclasses.replace(
      find(), rope_theta=9.0, rope_share=1.0)
  for more, message in (
      (dict(model_type='eve'), "has model_type 'eve', and the tensors have"),
      (dict(text_config=dict(hidden_act='gelu')), "hidden_act='gelu', which"),
      (dict(text_config=dict(qk_layernorm=False)), 'qk_layernorm=False, which'),
      (dict(text_config=None, rope_scaling=dict(type='linear')), "'linear'"),
      (dict(text_config=None, num_hidden_layers=3), r'layers 3 \(they have 2'),
      (dict(text_config=None, num_attention_heads=2), r'2 \(they have 3\)')):
    with pytest.raises(errors.UserError, match=message):
      find(**more)
  with pytest.raises(errors.UserError, match='tell decoder.norm_eps .* and '
                     'decoder.rope_share .* and decoder.rope_theta'):
    published_files.recognised(tensors)
  with pytest.raises(errors.UserError, match='decoder.heads cannot be said'):
    published_files.recognised(tensors, said={'decoder.heads': 3})


def test_all_that_is_wrong_is_one_error(tmp_path):
  _, tensors = reference.load('fuyu_wide')
  del tensors['language_model.lm_head.weight']
  block = 'language_model.model.layers.1.'
  tensors[f'{block}self_attn.query_key_value.bias'] = np.zeros(107)
  tensors['vision_embed_tokens.extra'] = np.zeros(1)
  with pytest.raises(errors.UserError) as caught:
    weights.load(published_files.save(tmp_path / 'in', tensors,
                                      CONFIGS['fuyu_wide']))
  for part in ('lm_head.weight is missing', 'embed_tokens.extra is extra',
               f'{block}self_attn.query_key_value.bias is [107], not [108]'):
    assert part in str(caught.value)
  assert str(caught.value).count(';') == 2

"""EVA-CLIP from published files, and back.

tests/golden/eva_*.npz are of the authors' code, see models/test_eva_clip.py.
`golden/weights/eva_open_clip_*` were written by open_clip_torch 3.3.0 around
trunks of timm 1.0.31 (outputs in float64), and eva_wrapped.pt, the weights of
eva_rope.npz in bfloat16 as an older training run has them, by torch 2.13.0.
"""

import functools
import math
import re
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import reference

from mmgen import errors
from mmgen import weights
from mmgen.models import clip
from mmgen.models import vision_encoder
from mmgen.weights import eva_clip
from mmgen.weights import files
from mmgen.weights import two_towers

GOLDEN = reference.GOLDEN
SIZES = [size for size in clip.SIZES if size.startswith('eva')]
LAYOUTS = list(eva_clip.LAYOUTS)
POST = {'vision.placement': 'post', 'vision.rope_grid': 'none',
        'text.mlp': 'gelu'}
PRE = POST | {'vision.placement': 'pre'}
# What a user has to say of these sizes, which were never published.
SAID = {
    # Heads and grid stand in the tables of angles; a pixel is cut off.
    'eva_rope': {'vision.placement': 'pre', 'vision.image_size': [26, 26],
                 'text.mlp': 'gelu', 'text.heads': 3},
    'eva_gelu': PRE | {'vision.image_size': [20, 20], 'vision.heads': 3,
                       'text.heads': 5},
    'eva_post': POST | {'vision.heads': 5, 'text.heads': 1},
    'eva_rms': PRE | {'vision.heads': 3, 'text.heads': 2},
    'eva_rms_post': POST | {'vision.image_size': [17, 17], 'vision.heads': 3,
                            'text.heads': 2},
    'eva_layer_scale': PRE | {'vision.heads': 3, 'text.heads': 2},
    'eva_open_clip_rope': {
        'vision.placement': 'pre', 'vision.rope_grid': [16, 16],
        'vision.image_size': [21, 21], 'vision.heads': 2, 'text.mlp': 'gelu',
        'text.heads': 3},
    'eva_open_clip_post': POST | {'vision.heads': 5, 'text.heads': 2},
}
# No tables there.
HF_ROPE = SAID['eva_rope'] | {'vision.rope_grid': [16, 16], 'vision.heads': 3}
CASES = [(name, 'eva_clip', SAID[name]) for name in SAID
         if 'open_clip' not in name] + [
    ('eva_rope', 'eva_clip_old', SAID['eva_rope']),
    ('eva_gelu', 'eva_clip_old_scale', SAID['eva_gelu']),
    ('eva_rope', 'eva_hf', HF_ROPE),
    ('eva_rms_post', 'eva_hf', SAID['eva_rms_post'])]
RENAMED = {
    'eva_clip': (),
    'eva_clip_old': ((r'text\.', ''),),
    'eva_clip_old_scale': ((r'logit_scale', 'text.logit_scale'),),
    'eva_hf': (
        (r'visual\.(?=cls|pos|patch)', 'vision_model.embeddings.'),
        ('cls_token', 'class_embedding'),
        ('pos_embed', 'position_embedding.weight'),
        (r'patch_embed\.proj', 'patch_embedding'),
        (r'visual\.blocks', 'vision_model.encoder.layers'),
        (r'(layers.*)\.norm', r'\1.layer_norm'),
        (r'attn\.proj', 'attn.out_proj'),
        (r'([qv])_bias', r'\1_proj.bias'), (r'\.attn', '.self_attn'),
        (r'mlp\.w(\d)', r'mlp.fc\1'), (r'visual\.norm',
                                       'vision_model.post_layernorm'),
        (r'visual\.head', 'visual_projection'),
        (r'text\.token', 'text_model.embeddings.token'),
        (r'text\.positional_embedding',
         'text_model.embeddings.position_embedding.weight'),
        (r'text\.transformer\.resblocks', 'text_model.encoder.layers'),
        (r'\.ln_([12])', r'.layer_norm\1'), (r'mlp\.c_fc', 'mlp.fc1'),
        (r'mlp\.c_proj', 'mlp.fc2'), (r'text\.ln_final',
                                      'text_model.final_layer_norm'),
        (r'text\.text_projection', 'text_projection.weight'))}


def golden(name, layout):
  """(tensors as the layout names them, the golden arrays)."""
  with np.load(GOLDEN / f'{name}.npz') as file:
    arrays = dict(file)
  tensors = {}
  for key, array in arrays.items():
    key, is_param = key.removeprefix('param/'), key.startswith('param/')
    if layout == 'eva_hf' and 'freqs' in key or not is_param:
      continue
    old = key
    for pattern, new in RENAMED[layout]:
      key = re.sub(pattern, new, key)
    fused = re.search(r'qkv\.|in_proj_', key)
    if layout == 'eva_hf' and fused:
      end = 'bias' if key.endswith('bias') else 'weight'
      for part, piece in zip('qkv', np.split(array, 3)):
        tensors[f'{key[:fused.start()]}{part}_proj.{end}'] = piece
    elif layout == 'eva_hf' and re.search('cls_token|pos_embed', old):
      tensors[key] = array.squeeze(0) if 'pos' in old else array[0, 0]
    elif layout == 'eva_hf' and old == 'text.text_projection':
      tensors[key] = array.T
    else:
      tensors[key] = array
  return tensors, arrays


def embed(loaded, images, tokens):
  # The highest id ends a text, and what follows is padding.
  valid = np.arange(tokens.shape[1])[None] <= tokens.argmax(1)[:, None]
  apply = lambda params, method, *x: loaded.model.apply(
      {'params': params}, *x, method=method)
  return jax.jit(lambda params: (
      apply(params, 'encode_image', images)[0],
      apply(params, 'encode_text', tokens, valid)[0],
      apply(params, 'temperature')[0]))(loaded.params)


@pytest.mark.parametrize('name, layout, said', CASES)
def test_import_gives_the_references_outputs(name, layout, said, tmp_path):
  tensors, arrays = golden(name, layout)
  files.write(tmp_path / 'a.safetensors', tensors)
  loaded = weights.load(tmp_path / 'a.safetensors', said=said)
  assert loaded.layout == layout
  image, text, scale = embed(loaded, arrays['images'], arrays['tokens'])
  reference.close(image, arrays['image_embeds'])
  reference.close(text, arrays['text_embeds'])
  reference.close(scale * image @ text.T, arrays['logits'])
  assert loaded.image == dict(
      size=arrays['images'].shape[1:3],
      fit='clip' if layout == 'eva_hf' else 'open_clip', kernel='bicubic',
      mean=vision_encoder.CLIP_MEAN, std=vision_encoder.CLIP_STD)


@pytest.mark.parametrize('file', [
    'eva_open_clip_rope.safetensors', 'eva_open_clip_post.pt'])
def test_import_of_open_clips_files(file):
  name = file.partition('.')[0]
  loaded = weights.load(GOLDEN / 'weights' / file, said=SAID[name])
  assert loaded.layout == 'eva_open_clip'
  with np.load(GOLDEN / 'weights' / f'{name}_outputs.npz') as file:
    expected = dict(file)
  image, text, _ = embed(loaded, expected['images'], expected['tokens'])
  reference.close(image, expected['image'], 2e-6)
  reference.close(text, expected['text'], 2e-6)


def test_a_wrapped_older_file():
  loaded = weights.load(GOLDEN / 'weights' / 'eva_wrapped.pt',
                        said=SAID['eva_rope'])
  assert loaded.layout == 'eva_clip_old'
  assert loaded.model.config.vision.rope_grid == (16, 16)
  tensors, _ = golden('eva_rope', 'eva_clip_old')
  for name, array in weights.export('eva_clip_old', loaded.model.config,
                                    loaded.params, 'float32'):
    np.testing.assert_array_equal(
        array, tensors.pop(name).astype(ml_dtypes.bfloat16).astype(np.float32))
  assert tensors and all('freqs' in name for name in tensors)


@pytest.mark.parametrize('dtype', ['float32', 'float16', 'bfloat16'])
@pytest.mark.parametrize('name, layout, said', [
    *CASES, ('eva_open_clip_rope.safetensors', 'eva_open_clip', None),
    ('eva_open_clip_post.pt', 'eva_open_clip', None)])
def test_export_after_import_is_identical(name, layout, said, dtype, tmp_path):
  if said is None:
    tensors = {key: tensor.array() for key, tensor in files.open(
        GOLDEN / 'weights' / name).items()}
    said = SAID[name.partition('.')[0]]
  else:
    tensors, _ = golden(name, layout)
  tensors = {key: array.astype(jnp.dtype(dtype))
             for key, array in tensors.items()}
  files.write(tmp_path / 'in.safetensors', tensors)
  loaded = weights.load(tmp_path / 'in.safetensors', said=said)
  files.write(tmp_path / 'out.safetensors', weights.export(
      layout, loaded.model.config, loaded.params, loaded.dtypes))
  after = files.open(tmp_path / 'out.safetensors')
  assert after.keys() == {key for key in tensors if 'freqs' not in key}
  for key, tensor in after.items():
    assert (tensor.dtype, tensor.shape) == (dtype, tensors[key].shape)
    assert tensor.array().tobytes() == tensors[key].tobytes(), key


# ---------------------------------------------------------------------------
# Recognition


@functools.cache
def ours(size):
  return two_towers.build(clip.SIZES[size], 'float32')[1]


def published(size, layout):
  """Names and shapes of a published model."""
  rules = weights.FAMILIES[layout].rules(clip.SIZES[size])
  assert {name for rule in rules for name in rule.ours} == ours(size).keys()
  return {name: types.SimpleNamespace(shape=shape, dtype=np.dtype('float32'))
          for name, shape in weights.layout_lib.expected(
              rules, ours(size)).items()}


def recognised(tensors, beside=None, said=None):
  return next((name, config) for name, family in weights.FAMILIES.items() if (
      config := family.recognise(tensors, beside or {}, said or {})))


@pytest.mark.parametrize('size', SIZES)
def test_published_sizes_are_told_by_their_shapes(size):
  assert len(SIZES) == 10 and len(LAYOUTS) == 5
  for layout in LAYOUTS:
    tensors = published(size, layout)
    assert recognised(tensors) == (layout, clip.SIZES[size])
    assert sum(math.prod(t.shape) for t in tensors.values()) == sum(
        leaf.size for leaf in ours(size).values())


def test_the_authors_names_of_published_models():
  """By hand, from the code: what is special about each."""
  b, e, g, huge = (published(size, 'eva_clip') for size in (
      'eva02-b16', 'eva02-e14', 'eva01-g14', 'eva-8b-448'))
  block = 'visual.blocks.11.'
  for name, shape in {
      'attn.inner_attn_ln.bias': (768,), 'attn.q_proj.weight': (768, 768),
      'attn.k_proj.weight': (768, 768), 'attn.q_bias': (768,),
      'mlp.w1.weight': (2048, 768), 'mlp.w3.weight': (768, 2048),
      'mlp.ffn_ln.weight': (2048,)}.items():
    assert b[block + name].shape == shape
  assert 'visual.head.bias' in b and block + 'attn.k_bias' not in b
  assert e['visual.blocks.63.attn.qkv.weight'].shape == (3 * 1792, 1792)
  assert g['visual.pos_embed'].shape == (1, 257, 1408)
  assert huge['visual.pos_embed'].shape == (1, 1025, 4096)
  assert huge['visual.cls_token'].shape == (1, 1, 4096)
  for name in ('visual.head.bias', block + 'norm1.bias', block + 'attn.q_bias',
               'visual.norm.bias'):
    assert name not in huge and name in g
  assert block + 'mlp.fc1.bias' in huge
  timm = published('eva02-b16', 'eva_open_clip')
  for name in ('attn.norm.bias', 'mlp.norm.weight', 'attn.q_proj.bias',
               'mlp.fc1_g.weight', 'mlp.fc1_x.bias', 'mlp.fc2.weight'):
    assert f'visual.trunk.blocks.11.{name}' in timm
  assert 'visual.trunk.blocks.11.attn.k_proj.bias' not in timm


def test_what_nothing_tells_is_asked(tmp_path):
  path = GOLDEN / 'weights' / 'eva_open_clip_rope.safetensors'
  with pytest.raises(errors.UserError) as caught:
    weights.recognise(path)
  for part in ("vision.placement (of the norms: 'pre', or 'post' as in E/14",
               'vision.rope_grid ([16, 16] for', 'vision.heads (they differ',
               'text.heads (of 64', "text.mlp ('gelu' in all",
               '--say=text.heads=...'):
    assert part in str(caught.value)
  assert ' mlp' not in str(caught.value)
  said = SAID['eva_open_clip_rope']
  for grid in 16, [16], [0, 16], ['a', 'b'], 'some':
    with pytest.raises(errors.UserError, match='rope_grid is said to be'):
      weights.recognise(path, said | {'vision.rope_grid': grid})
  with pytest.raises(errors.UserError, match="placement: 'sub'; allowed"):
    weights.recognise(path, said | {'vision.placement': 'sub'})
  with pytest.raises(errors.UserError, match='^mlp cannot be said of CLIP'):
    weights.recognise(path, {'mlp': 'gelu'})
  _, config = weights.recognise(path, said | {'vision.rope_grid': 'none'})
  assert config.vision.rope_grid is None
  # B/16 of three layers fewer is not B/16, in whatever its shapes agree.
  tensors = {name: tensor for name, tensor in published(
      'eva02-b16', 'eva_clip').items()
             if not re.match(r'visual\.blocks\.(9|10|11)\.', name)}
  with pytest.raises(errors.UserError, match='tell text.mlp .*placement'):
    recognised(tensors)


@pytest.mark.parametrize('side, grid, H', [
    (5, 16, 8), (14, 16, 64), (16, 16, 64), (24, 16, 64), (32, 14, 64),
    (2, 16, 4)])
@pytest.mark.parametrize('dtype', ['float32', 'float16', 'bfloat16'])
def test_tables_of_angles_tell_the_grid(side, grid, H, dtype):
  tensors = published('eva02-b16', 'eva_clip')
  config = vision_encoder.sized(
      'eva02-b16', image_size=(16 * side, 16 * side), rope_grid=(grid, grid))
  places = config.places[1:]
  frequencies = np.repeat(1e4 ** (-np.arange(0, H // 2, 2) / (H // 2)), 2)
  angles = np.concatenate([places[:, i:i + 1] * frequencies for i in (0, 1)], 1)
  def told(array):
    array = array.astype(jnp.dtype(dtype))
    tensors['visual.rope.freqs_sin'] = types.SimpleNamespace(
        shape=array.shape, array=lambda: array)
    found = recognised(tensors)[1].vision
    return found.rope_grid, found.heads
  expected = (grid, grid), 768 // H
  if H == 4:  # one frequency, which is past half a turn at the second cell
    with pytest.raises(errors.UserError, match='tell vision.rope_grid'):
      told(np.sin(angles))
    return
  assert told(np.sin(angles)) == expected
  assert told(np.sin(angles).reshape(side, side, H)) == expected
  for other in (np.cos(angles), np.sin(angles[:, ::-1]), np.sin(angles[1:])):
    with pytest.raises(errors.UserError, match='tell vision.rope_grid'):
      told(other)


def test_open_clips_config_decides():
  tensors = published('eva02-e14', 'eva_open_clip')
  own = dict(
      model_cfg=dict(
          embed_dim=1024, quick_gelu=True, custom_text=True,
          vision_cfg=dict(image_size=[230, 225], timm_pool='token',
                          timm_proj=None, timm_model_name='x'),
          text_cfg=dict(width=1024, heads=8, layers=24)),
      preprocess_cfg=dict(mean=[0.5] * 3, std=[0.25] * 3, resize_mode='squash'))
  beside = {'open_clip_config.json': own}
  layout, config = recognised(tensors, beside)
  assert config.vision.image_size == (230, 225)
  assert (config.vision.mean, config.vision.std) == ((0.5,) * 3, (0.25,) * 3)
  assert (config.text.heads, config.text.mlp) == (8, 'quick_gelu')
  assert config.vision.placement == 'post'
  assert weights.FAMILIES[layout].image(config, beside)['fit'] == 'square'
  del own['model_cfg']['quick_gelu']
  assert recognised(tensors, beside)[1].text.mlp == 'gelu'
  assert recognised(tensors, beside, {'text.mlp': 'quick_gelu'}
                    )[1].text.mlp == 'quick_gelu'  # the user goes first
  own['model_cfg']['vision_cfg']['timm_pool'] = 'avg'
  with pytest.raises(errors.UserError, match="timm_pool='avg', which is not"):
    recognised(tensors, beside)


def test_the_config_of_the_code_for_transformers_decides():
  tensors = published('eva02-l14', 'eva_hf')
  vision = dict(num_attention_heads=8, image_size=229, post_layernorm=True,
                use_rope=True, pretrained_seq_len=14, layer_norm_eps=1e-3)
  own = dict(architectures=['EvaCLIPModel'], vision_config=vision,
             text_config=dict(num_attention_heads=6, layer_norm_eps=1e-4))
  beside = {'config.json': own}
  _, config = recognised(tensors, beside)
  v, t = config.vision, config.text
  assert (v.heads, v.image_size, v.placement, v.rope_grid, v.norm_eps) == (
      8, (229, 229), 'post', (14, 14), 1e-3)
  assert (t.heads, t.norm_eps, t.mlp) == (6, 1e-4, 'gelu')
  del vision['post_layernorm'], vision['use_rope'], vision['layer_norm_eps']
  v = recognised(tensors, beside)[1].vision
  assert (v.placement, v.rope_grid, v.norm_eps) == ('pre', None, 1e-6)
  own['architectures'] = ['CLIPModel']  # a config of something else
  assert recognised(tensors, beside)[1] == clip.SIZES['eva02-l14']
  own['architectures'] = ['EvaCLIPModel']
  vision['hidden_act'] = 'relu'
  with pytest.raises(errors.UserError, match="hidden_act='relu', which is not"):
    recognised(tensors, beside)


def test_all_that_is_wrong_is_one_error(tmp_path):
  tensors, _ = golden('eva_post', 'eva_clip')
  block = 'visual.blocks.1.'
  del tensors[f'{block}norm2.bias'], tensors['visual.head.weight']
  tensors[f'{block}attn.qbias'] = tensors.pop(f'{block}attn.q_bias')
  tensors[f'{block}mlp.fc1.weight'] = np.zeros((51, 20), np.float32)
  tensors[f'{block}mlp.ffn_ln.weight'] = np.zeros(52, np.float32)
  tensors['visual.pos_embed'] = np.zeros((1, 26, 21), np.float32)
  tensors['visual.freqs_cosine'] = np.zeros(1, np.float32)
  files.write(tmp_path / 'a.safetensors', tensors)
  with pytest.raises(errors.UserError) as caught:
    weights.load(tmp_path / 'a.safetensors', said=SAID['eva_post'])
  for part in (
      'norm2.bias is missing', 'visual.head.weight is missing',
      'attn.q_bias is missing (nearest there: visual.blocks.1.attn.qbias)',
      'attn.qbias is extra', 'fc1.weight is [51, 20], not [52, 20]',
      'ffn_ln.weight is extra', 'pos_embed is [1, 26, 21], not [1, 26, 20]',
      'visual.freqs_cosine is extra'):
    assert part in str(caught.value), part
  assert str(caught.value).count(';') == 7


def test_a_layout_that_cannot_hold_a_model(tmp_path):
  tensors, _ = golden('eva_layer_scale', 'eva_clip')
  files.write(tmp_path / 'a.safetensors', tensors)
  loaded = weights.load(tmp_path / 'a.safetensors',
                        said=SAID['eva_layer_scale'])
  with pytest.raises(errors.UserError, match='open_clip cannot hold this model'
                     '.*attention_scale'):
    weights.export('open_clip', loaded.model.config, loaded.params, 'float32')

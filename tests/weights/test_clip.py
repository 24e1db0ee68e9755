"""CLIP and SigLIP from the files of their own trainers, and back.

`golden/weights/` holds tiny random models, written by open_clip_torch 3.3.0
(with SigLIP's image towers of timm 1.0.31), transformers 4.56.2 and big_vision
(commit of May 2025), and in `outputs.npz` the embeddings that these gave, in
float64 (open_clip) or float32.
"""

import dataclasses
import json
import shutil
import types

import flax.traverse_util
import jax
import numpy as np
import published_files
import pytest
import reference

from mmgen import errors
from mmgen import weights
from mmgen.models import clip
from mmgen.weights import files
from mmgen.weights import two_towers

GOLDEN = reference.GOLDEN / 'weights'
HEADS = {'vision.heads': 3, 'text.heads': 5}
CASES = {  # file: (layout, dtype, what contents cannot tell)
    'open_clip_square.pt': ('openai_clip', 'float32', {
        'mlp': 'quick_gelu', 'vision.image_size': [15, 15], **HEADS}),
    'open_clip_oblong.pt': ('open_clip', 'float16', {
        'mlp': 'gelu', 'vision.image_size': (10, 20), 'vision.heads': 1,
        'text.heads': 3}),
    'open_clip_siglip': ('open_clip_siglip', 'float32', {'vision.heads': 3}),
    'open_clip_siglip_tanh': ('open_clip_siglip', 'bfloat16', {
        'vision.heads': 5}),
    'hf_clip_square': ('hf_clip', 'float32', {}),
    'hf_clip_gelu': ('hf_clip', 'float16', {}),
    'hf_siglip': ('hf_siglip', 'bfloat16', {}),
    'hf_siglip_wide': ('hf_siglip', 'float32', {}),
    'big_vision.npz': ('big_vision', 'float32', {
        'vision.image_size': (13, 13)}),
    'big_vision_scanned.npz': ('big_vision_scanned', 'bfloat16', {
        'vision.image_size': (9, 15)}),
}


@pytest.mark.parametrize('name', CASES)
def test_import_gives_the_references_outputs(name):
  layout, dtype, said = CASES[name]
  loaded = weights.load(GOLDEN / name, said=said)
  assert loaded.layout == layout
  assert {str(d) for d in loaded.dtypes.values()} == {dtype}
  expected = reference.outputs('outputs', name)
  tokens = expected['tokens']
  # CLIP's texts end with the highest id; SigLIP reads whatever stands last.
  end = tokens.argmax(1) if loaded.model.config.text.causal else np.full(4, 99)
  valid = np.arange(tokens.shape[1])[None] <= end[:, None]

  @jax.jit
  def run(params):
    apply = lambda method, *x: loaded.model.apply({'params': params}, *x,
                                                  method=method)
    return (apply('encode_image', expected['images'])[0],
            apply('encode_text', tokens, valid)[0], apply('temperature'))

  image, text, temperature = run(loaded.params)
  reference.close(image, expected['image'], 2e-6)
  reference.close(text, expected['text'], 2e-6)
  reference.close(temperature, expected['temperature'], 2e-6)


@pytest.mark.parametrize('name', CASES)
def test_export_after_import_is_identical(name, tmp_path):
  layout, _, said = CASES[name]
  loaded = weights.load(GOLDEN / name, said=said)
  files.write(tmp_path / 'a.safetensors', weights.export(
      layout, loaded.model.config, loaded.params, loaded.dtypes))
  before, after = files.open(GOLDEN / name), files.open(tmp_path)
  assert before.keys() == after.keys()
  for key, tensor in before.items():
    assert (after[key].dtype, after[key].shape) == (tensor.dtype, tensor.shape)
    assert after[key].array().tobytes() == tensor.array().tobytes()
  assert len(loaded.report) == len(flax.traverse_util.flatten_dict(
      loaded.params))


def test_load_into_shardings_and_another_dtype():
  mesh = jax.make_mesh((8,), ('fsdp',))
  def place(leaves):
    return {name: jax.NamedSharding(mesh, jax.P(
        *(None,) * (leaf.ndim - 1), 'fsdp') if leaf.shape and not
        leaf.shape[-1] % 8 else jax.P()) for name, leaf in leaves.items()}
  loaded = weights.load(GOLDEN / 'hf_clip_gelu', place=place, dtype='bfloat16')
  assert loaded.model.config.vision.dtype == 'bfloat16'
  leaves = jax.tree.leaves(loaded.params)
  assert {str(leaf.dtype) for leaf in leaves} == {'bfloat16'}
  assert sum(not leaf.is_fully_replicated for leaf in leaves) > 10
  plain = weights.load(GOLDEN / 'hf_clip_gelu')
  for a, b in zip(leaves, jax.tree.leaves(plain.params)):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b).astype(a.dtype))


# ---------------------------------------------------------------------------
# Recognition


def published(size, layout):
  """Names and shapes of a published model: (config, tensors)."""
  config = clip.SIZES[size]
  family = weights.FAMILIES[layout]
  _, ours = family.build(config, 'float32')
  shapes = weights.layout_lib.expected(family.rules(config), ours)
  return config, {name: types.SimpleNamespace(shape=shape)
                  for name, shape in shapes.items()}


def recognised(tensors, beside=None, said=None):
  return next((name, config) for name, family in weights.FAMILIES.items() if (
      config := family.recognise(tensors, beside or {}, said or {})))


@pytest.mark.parametrize('size', [
    'clip-b32', 'clip-b16', 'clip-l14', 'clip-l14-336', 'siglip-b16',
    'siglip-l16-256', 'siglip-so400m', 'siglip-so400m-384'])
def test_published_sizes_are_told_by_their_shapes(size):
  layouts = (('openai_clip', 'open_clip', 'hf_clip') if 'clip-' in size[:5]
             else ('hf_siglip', 'big_vision', 'big_vision_scanned'))
  for layout in layouts:
    config, tensors = published(size, layout)
    said = {'mlp': 'quick_gelu'} if size.startswith('clip') else {}
    assert recognised(tensors, said=said) == (layout, config)
    if layout == 'openai_clip':  # OpenAI's own need not be asked
      tensors['input_resolution'] = types.SimpleNamespace(shape=())
      assert recognised(tensors) == (layout, config)


@pytest.mark.parametrize('size', [
    'siglip-b16', 'siglip-l16-256', 'siglip-so400m', 'siglip-so400m-384'])
def test_open_clips_published_siglips_are_told(size):
  config = clip.SIZES[size]
  exact = dataclasses.replace(
      config, vision=dataclasses.replace(config.vision, mlp='gelu'),
      text=dataclasses.replace(config.text, mlp='gelu'))
  tensors, _ = published_files.shapes('open_clip_siglip', exact)
  own = dict(model_cfg=dict(
      vision_cfg=dict(image_size=config.vision.image_size[0], timm_pool='map',
                      timm_proj='none',
                      timm_model_name='vit_base_patch16_siglip_224'),
      text_cfg=dict(no_causal_mask=True, proj_bias=True, pool_type='last',
                    heads=config.text.heads, norm_kwargs=dict(eps=1e-6))))
  beside = {'open_clip_config.json': own}
  assert recognised(tensors, beside) == ('open_clip_siglip', exact)
  assert recognised(tensors, said={'mlp': 'gelu'}) == (
      'open_clip_siglip', exact)
  with pytest.raises(errors.Unsaid, match="tell mlp .*'gelu_tanh'") as caught:
    recognised(tensors)
  assert caught.value.fields == ['mlp']
  model = own['model_cfg']
  model['vision_cfg']['timm_model_name'] = 'vit_so400m_patch16_siglip_384'
  model['text_cfg']['act_kwargs'] = dict(approximate='tanh')
  assert recognised(tensors, beside)[1] == config
  model['text_cfg']['pool_type'] = 'first'
  with pytest.raises(errors.UserError, match="pool_type='first', which is not"):
    recognised(tensors, beside)


@pytest.mark.parametrize('size, layout, model_type', [
    ('clip-b32', 'hf_clip', 'clip'), ('siglip-b16', 'hf_siglip', 'siglip')])
def test_what_a_config_leaves_out_is_transformers_default(size, layout,
                                                          model_type):
  config, tensors = published(size, layout)
  own = dict(model_type=model_type, vision_config={}, text_config=None)
  assert recognised(tensors, {'config.json': own}) == (layout, config)


def test_a_config_decides_what_shapes_do_not():
  config, tensors = published('clip-b32', 'hf_clip')
  own = dict(
      model_type='clip',
      text_config={'hidden_act': 'no such'},  # superseded by the next
      text_config_dict={'hidden_act': 'gelu', 'num_attention_heads': 4},
      vision_config={'hidden_act': 'gelu_pytorch_tanh', 'image_size': 239,
                     'layer_norm_eps': 1e-3})
  preprocessor = dict(image_mean=[0.1, 0.2, 0.3], image_std=[1.0, 2.0, 3.0],
                      resample=2, do_center_crop=False)
  beside = {'config.json': own, 'preprocessor_config.json': preprocessor}
  _, found = recognised(tensors, beside)
  assert found == dataclasses.replace(
      config, text=dataclasses.replace(config.text, mlp='gelu', heads=4),
      vision=dataclasses.replace(
          config.vision, mlp='gelu_tanh', image_size=(239, 239), norm_eps=1e-3,
          mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0)))
  assert weights.FAMILIES['hf_clip'].image(found, beside) == dict(
      size=(239, 239), fit='square', kernel='bilinear', mean=(0.1, 0.2, 0.3),
      std=(1.0, 2.0, 3.0))
  _, found = recognised(tensors, beside, {'mlp': 'gelu'})  # the user goes first
  assert found.vision.mlp == 'gelu'
  own['model_type'] = 'llava'  # a config of something else tells nothing
  with pytest.raises(errors.UserError, match='tell mlp'):
    recognised(tensors, beside)
  own['model_type'] = 'clip'
  own['vision_config']['hidden_act'] = 'gelu_new'
  with pytest.raises(errors.UserError, match="hidden_act 'gelu_new'; known"):
    recognised(tensors, beside)


def test_open_clip_configs_decide(tmp_path):
  shutil.copy(GOLDEN / 'open_clip_square.pt', tmp_path / 'a.pt')
  vision = dict(image_size=15, patch_size=4, layers=3, width=18, head_width=6)
  config = dict(
      model_cfg=dict(embed_dim=10, quick_gelu=True, vision_cfg=vision,
                     text_cfg=dict(width=20, heads=5, layers=2)),
      preprocess_cfg=dict(mean=[0.5] * 3, std=[0.5] * 3, resize_mode='squash',
                          interpolation='bilinear'))
  def write():
    (tmp_path / 'open_clip_config.json').write_text(json.dumps(config))
  write()
  _, found = weights.recognise(tmp_path)
  _, said = weights.recognise(
      GOLDEN / 'open_clip_square.pt', CASES['open_clip_square.pt'][2])
  assert found == dataclasses.replace(said, vision=dataclasses.replace(
      said.vision, mean=(0.5,) * 3, std=(0.5,) * 3))
  assert weights.load(tmp_path).image == dict(
      size=(15, 15), fit='square', kernel='bilinear', mean=(0.5,) * 3,
      std=(0.5,) * 3)
  config['preprocess_cfg']['resize_mode'] = 'longest'
  write()
  with pytest.raises(errors.UserError, match="resize_mode 'longest', which is"):
    weights.load(tmp_path)
  config['preprocess_cfg'] = {}
  vision['pool_type'] = 'avg'
  write()
  with pytest.raises(errors.UserError, match="pool_type='avg', which is not"):
    weights.recognise(tmp_path)


def test_what_nothing_tells_is_asked():
  with pytest.raises(errors.UserError) as caught:
    weights.recognise(GOLDEN / 'open_clip_oblong.pt')
  said = str(caught.value)
  for part in ('mlp (', 'vision.heads (', 'text.heads (', '--say=mlp=...',
               'vision.image_size ([rows, columns]'):
    assert part in said
  with pytest.raises(errors.UserError, match='width cannot be said of CLIP'):
    weights.recognise(GOLDEN / 'hf_clip_gelu', {'width': 3})
  with pytest.raises(errors.UserError, match="mlp: 'tanh'; allowed"):
    weights.recognise(GOLDEN / 'hf_clip_gelu', {'mlp': 'tanh'})
  # A head of each 64 channels would be 20 of H/14; it has 16.
  _, tensors = published('clip-b32', 'openai_clip')
  tensors = {name: types.SimpleNamespace(shape=tuple(
      {768: 1280, 3072: 5120, 2304: 3840}.get(n, n) for n in tensor.shape)
      if name.startswith('visual') else tensor.shape)
             for name, tensor in tensors.items()}
  with pytest.raises(errors.UserError, match=r'tell vision.heads \(of 64'):
    recognised(tensors, said={'mlp': 'gelu'})
  _, found = recognised(tensors, said={'mlp': 'gelu', 'vision.heads': 16})
  assert (found.vision.heads, found.vision.width) == (16, 1280)


@pytest.mark.parametrize('layout', ['openai_clip', 'open_clip', 'hf_clip'])
def test_heads_are_never_guessed(layout):
  config = clip.SIZES['clip-b32']
  fields = dict(layers=2, width=128, heads=8, hidden=256)
  config = dataclasses.replace(
      config, embed=24, vision=dataclasses.replace(
          config.vision, image_size=(32, 32), patch=8, **fields),
      text=dataclasses.replace(config.text, vocab=99, **fields))
  tensors, _ = published_files.shapes(layout, config)
  with pytest.raises(errors.Unsaid) as caught:
    recognised(tensors, said={'mlp': 'quick_gelu'})
  assert caught.value.fields == ['text.heads', 'vision.heads']
  said = {'mlp': 'quick_gelu', 'vision.heads': 8, 'text.heads': 8}
  assert recognised(tensors, said=said) == (layout, config)
  if layout == 'openai_clip':  # their program has one rule for all
    tensors['input_resolution'] = types.SimpleNamespace(shape=())
    _, found = recognised(tensors)
    assert (found.vision.heads, found.text.heads) == (2, 2)


def test_other_files_are_not_recognised(tmp_path):
  with pytest.raises(errors.UserError, match='no layout known here.*inner.0'):
    weights.load(GOLDEN / 'script.pt')
  (tmp_path / 'config.json').write_text('{')
  files.write(tmp_path / 'model.safetensors', {'a': np.zeros(1)})
  with pytest.raises(errors.UserError, match='config.json is broken'):
    weights.load(tmp_path)
  shutil.copytree(GOLDEN / 'hf_clip_gelu', tmp_path / 'in')
  for content in '[]', '{"model_type": "clip", "vision_config": 3}':
    (tmp_path / 'in' / 'config.json').write_text(content)
    with pytest.raises(errors.UserError, match='config.json beside .* not as'):
      weights.load(tmp_path / 'in')


# ---------------------------------------------------------------------------


def damaged(name, tmp_path, changes):
  """The error of a copy with changes {name: None, new name or array}."""
  arrays = {key: t.array() for key, t in files.open(GOLDEN / name).items()}
  for key, change in changes.items():
    if change is None:
      del arrays[key]
    elif isinstance(change, str):
      arrays[change] = arrays.pop(key)
    else:
      arrays[key] = change
  files.write(tmp_path / 'model.safetensors', arrays)
  if (GOLDEN / name / 'config.json').exists():
    shutil.copy(GOLDEN / name / 'config.json', tmp_path)
  with pytest.raises(errors.UserError) as caught:
    weights.load(tmp_path, said=CASES[name][2])
  return str(caught.value)


@pytest.mark.parametrize('with_config', [True, False])
def test_all_that_is_wrong_is_one_error(tmp_path, with_config, monkeypatch):
  """Also without a config, where the other tensors tell which one is wrong."""
  if not with_config:
    said = dict(CASES['hf_clip_square'][2], mlp='gelu', **HEADS)
    monkeypatch.setitem(CASES, 'hf_clip_square', (None, None, said))
    monkeypatch.setattr(weights, 'BESIDE', ())
  said = damaged('hf_clip_square', tmp_path, {
      'visual_projection.weight': None,
      'vision_model.pre_layrnorm.bias': 'vision_model.pre_layernorm.bias',
      'text_model.encoder.layers.1.mlp.fc1.bias': np.zeros(32, np.float32),
      'vision_model.encoder.layers.2.layer_norm1.weight': np.zeros((1, 18)),
      'vision_model.encoder.layers.0.mlp.fc2.weight': np.zeros((9, 29)),
      'vision_model.encoder.layers.9.layer_norm1.weight': np.zeros(18),
      'text_model.embeddings.position_ids': np.zeros(9),  # follow from the rest
      'logit_scale': None})
  for part in (
      'visual_projection.weight is missing',
      'vision_model.pre_layrnorm.bias is missing (nearest there: '
      'vision_model.pre_layernorm.bias)',
      'vision_model.pre_layernorm.bias is extra',
      'layers.9.layer_norm1.weight is extra',
      'fc1.bias is [32], not [31]', 'layer_norm1.weight is [1, 18], not [18]',
      'fc2.weight is [9, 29], not [18, 29]', 'logit_scale is missing'):
    assert part in said
  assert said.count(';') == 7


@pytest.mark.parametrize('tower, field, values', [
    ('vision', 'num_hidden_layers', (0, 4000, 'a')),
    ('vision', 'num_attention_heads', (0, -1, 5, None, 'a', True)),
    ('vision', 'patch_size', (0, 10**9, None)),
    ('vision', 'image_size', (0, 10**9, [15], 'a')),
    ('vision', 'layer_norm_eps', (0, -1, float('nan'), 'a')),
    ('text', 'max_position_embeddings', (0, 10**9, 'a')),
    ('text', 'vocab_size', (-1, 10**9, [1]))])
def test_a_wrong_config_is_one_error(tower, field, values, tmp_path):
  source = GOLDEN / 'hf_clip_square'
  shutil.copytree(source, tmp_path / 'in')
  own = json.loads((source / 'config.json').read_text())
  for value in values:
    fields = own[f'{tower}_config'] | {field: value}
    (tmp_path / 'in' / 'config.json').write_text(json.dumps(
        own | {f'{tower}_config': fields, f'{tower}_config_dict': None}))
    with pytest.raises(errors.UserError) as caught:
      weights.load(tmp_path / 'in')
    assert '\n' not in str(caught.value) and len(str(caught.value)) < 600


def test_a_missing_size_is_one_error_too(tmp_path):
  said = damaged('open_clip_square.pt', tmp_path, {
      'token_embedding.weight': 'token_embed.weight', 'visual.proj': None,
      'visual.conv1.weight': None, 'visual.positional_embedding': None,
      'visual.transformer.resblocks.2.ln_1.bias': None})
  for part in ('token_embedding.weight is missing (nearest there: '
               'token_embed.weight)', 'visual.proj is missing',
               'visual.conv1.weight is missing',
               'visual.positional_embedding is missing',
               'visual.transformer.resblocks.2.ln_1.bias is missing',
               'token_embed.weight is extra'):
    assert part in said
  assert said.count(';') == 5


def test_a_cut_off_shard_is_an_error(tmp_path):
  shutil.copytree(GOLDEN / 'hf_clip_square', tmp_path / 'in')
  path = tmp_path / 'in' / 'model-00002-of-00004.safetensors'
  path.write_bytes(path.read_bytes()[:-10])
  with pytest.raises(errors.UserError, match='its tensors take'):
    weights.load(tmp_path / 'in')
  path.unlink()
  with pytest.raises(errors.UserError, match='model-00002.*No such file'):
    weights.load(tmp_path / 'in')


def test_a_layout_that_cannot_hold_a_model():
  loaded = weights.load(GOLDEN / 'hf_siglip')
  with pytest.raises(errors.UserError, match='hf_clip cannot hold this model: '
                     '.*vision/class_embedding, .*vision/head/'):
    weights.export('hf_clip', loaded.model.config, loaded.params, 'float32')


def test_towers_are_those_of_the_models():
  assert {*two_towers.TOWERS} <= {f.name for f in dataclasses.fields(
      clip.ClipConfig)}

"""LLaVA-1.5 from files as its authors and transformers write them, and back.

The files are made here of the arrays in `golden/`, which hold weights under the
names of transformers' files, and what its model gave with them. In
`golden/weights/mm_projector.bin` torch 2.13.0 stored the connector of one of
them in bfloat16.
"""

import dataclasses
import json

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import published_files
import pytest
import reference

from mmgen import errors
from mmgen import weights
from mmgen.models import connector
from mmgen.models import multimodal
from mmgen.models import positions
from mmgen.models import vision_encoder
from mmgen.weights import files

PROJECTOR = reference.GOLDEN / 'weights' / 'mm_projector.bin'
TEXT = {  # as transformers writes them
    'llava_square': dict(model_type='llama', num_attention_heads=7,
                         rms_norm_eps=1e-5),
    'llava_pictures': dict(model_type='llama', num_attention_heads=3,
                           num_key_value_heads=1, rms_norm_eps=1e-3,
                           rope_theta=100.0)}
VISION = {
    'llava_square': dict(model_type='clip_vision_model', num_attention_heads=3,
                         image_size=17, patch_size=5),
    'llava_pictures': dict(model_type='clip_vision_model', image_size=8,
                           num_attention_heads=5, layer_norm_eps=1e-3)}
# What the authors' config does not say of a tower.
SAID = {
    'llava_square': {'vision.heads': 3, 'vision.mlp': 'quick_gelu',
                     'vision.image_size': [17, 17]},
    'llava_pictures': {'vision.heads': 5, 'vision.mlp': 'quick_gelu',
                       'vision.norm_eps': 1e-3}}
# Of each layout: how names of transformers' files begin there.
HF_NEW = {'language_model.model.': 'model.language_model.',
          'language_model.lm_head': 'lm_head',
          'multi_modal_projector.': 'model.multi_modal_projector.',
          'vision_tower.': 'model.vision_tower.'}
OWN = {'language_model.model.': 'model.', 'language_model.lm_head': 'lm_head',
       'multi_modal_projector.linear_1': 'model.mm_projector.0',
       'multi_modal_projector.linear_2': 'model.mm_projector.2',
       'vision_tower.': 'model.vision_tower.vision_tower.'}
NAMES = {'hf_llava': {}, 'hf_llava_new': HF_NEW, 'llava_tower': OWN,
         'llava': OWN, 'hf_llava_flat': {
             'vision_tower.vision_model.': 'vision_tower.'}}


def renamed(tensors, layout):
  """Tensors of transformers' files in another layout."""
  made = {}
  for name, tensor in tensors.items():
    old = next((old for old in NAMES[layout] if name.startswith(old)), '')
    made[NAMES[layout].get(old, '') + name.removeprefix(old)] = tensor
  return {name: tensor for name, tensor in made.items()
          if layout != 'llava' or 'vision_tower' not in name}


def config(name, layout):
  """The config.json of that layout, and what has to be said beside it."""
  if layout.startswith('hf'):
    return dict(model_type='llava', text_config=TEXT[name],
                vision_config=VISION[name], projector_hidden_act='gelu',
                vision_feature_layer=-2, image_token_index=9,
                vision_feature_select_strategy='default'), {}
  own = TEXT[name] | dict(
      model_type='llava_llama', mm_projector_type='mlp2x_gelu',
      mm_vision_select_feature='patch', mm_vision_select_layer=-2,
      mm_vision_tower='openai/none', image_aspect_ratio='pad')
  return own, SAID[name] if layout == 'llava_tower' else {'vision.size': 'tiny'}


def tower_config(name):
  said = SAID[name] | {'vision.norm_eps': VISION[name].get(
      'layer_norm_eps', 1e-5)}
  sizes = dict(
      llava_square=dict(patch=5, layers=3, width=18, hidden=31),
      llava_pictures=dict(patch=4, layers=4, width=20, hidden=26))[name]
  return vision_encoder.VisionEncoderConfig(**sizes | {
      field.removeprefix('vision.'): value for field, value in said.items()
  } | {'image_size': (VISION[name]['image_size'],) * 2})


def batch(arrays):
  """The rows of the reference, padded on the right, and their pictures."""
  tokens = arrays['tokens']
  slots = np.arange(tokens.shape[1])[None]
  used = slots < arrays['lengths'][:, None]
  patch = (tokens == 9) & used
  images = iter(arrays['images'])
  P = arrays['connector'].shape[1]
  pictures = np.zeros((len(tokens), 2, *arrays['images'].shape[1:]), np.uint8)
  for row, count in enumerate(patch.sum(1) // P):
    for i in range(count):
      pictures[row, i] = next(images)
  assert next(images, None) is None
  visual = np.where(patch, np.cumsum(patch, axis=1) - 1, -1)
  return jax.tree.map(jnp.asarray, dict(
      tokens=tokens, segments=used.astype(np.int32),
      positions=np.broadcast_to(slots, tokens.shape), visual=visual,
      images=pictures, image_box=np.zeros((len(tokens), 2, 4), np.int32)))


def check_outputs(loaded, params, arrays):
  with jax.default_matmul_precision('highest'):
    logits, _ = jax.jit(loaded.model.apply)({'params': params}, batch(arrays))
  for row, n in enumerate(arrays['lengths']):
    assert reference.error(logits[row][:n], arrays['logits'][row][:n]) < 1e-5


@pytest.mark.parametrize('layout', NAMES)
@pytest.mark.parametrize('name', TEXT)
def test_import_gives_the_references_outputs(name, layout, tmp_path,
                                             monkeypatch):
  monkeypatch.setitem(vision_encoder.SIZES, 'tiny', tower_config(name))
  arrays, tensors = reference.load(name)
  own, said = config(name, layout)
  buffer = 'language_model.model.layers.0.self_attn.rotary_emb.inv_freq'
  loaded = weights.load(published_files.save(tmp_path / 'in', renamed(
      tensors | {buffer: np.ones(2)}, layout), own), said=said)
  assert loaded.layout == layout
  assert loaded.image == dict(
      size=arrays['images'].shape[1:3], fit='expand', kernel='bicubic',
      mean=vision_encoder.CLIP_MEAN, std=vision_encoder.CLIP_STD)
  params = loaded.params
  if layout == 'llava':  # without the tower
    assert params.keys() == {'connector', 'decoder'}
    params = params | {'vision': jax.tree.map(jnp.asarray, reference.clip_tower(
        tensors, loaded.model.config.vision, 'vision_tower.vision_model.'))}
  check_outputs(loaded, params, arrays)


@pytest.mark.parametrize('layout, name, dtype', [
    (layout, name, dtype) for i, layout in enumerate(NAMES) for j, dtype in
    enumerate(published_files.DTYPES) for name in [list(TEXT)[(i + j) % 2]]])
def test_export_after_import_is_identical(layout, name, dtype, tmp_path,
                                          monkeypatch):
  monkeypatch.setitem(vision_encoder.SIZES, 'tiny', tower_config(name))
  own, said = config(name, layout)
  published_files.round_trip(
      renamed(reference.load(name)[1], layout), tmp_path, own, layout, dtype,
      said)


def test_the_projector_alone(tmp_path):
  arrays, tensors = reference.load('llava_square')
  loaded = weights.load(PROJECTOR)
  assert loaded.layout == 'llava_projector'
  assert loaded.model.config == connector.ConnectorConfig('mlp', 28)
  shapes = {name: x.shape for name, x in flax.traverse_util.flatten_dict(
      loaded.params, sep='/').items()}
  assert shapes == {
      'connector/up/kernel': (18, 28), 'connector/up/bias': (28,),
      'connector/down/kernel': (28, 28), 'connector/down/bias': (28,)}
  got, _ = loaded.model.apply({'params': loaded.params['connector']},
                           arrays['tower'])
  assert reference.error(got, arrays['connector']) < 1e-2  # of bfloat16
  names = {'connector/up': 'multi_modal_projector.linear_1',
           'connector/down': 'multi_modal_projector.linear_2'}
  for ours, theirs in names.items():
    for name, x in reference.dense(tensors, theirs).items():
      assert reference.error(loaded.params['connector'][ours[10:]][name],
                             x) < 4e-3
  files.write(tmp_path / 'a.safetensors', weights.export(
      'llava_projector', loaded.model.config, loaded.params, loaded.dtypes))
  before, after = files.open(PROJECTOR), files.open(tmp_path)
  assert before.keys() == after.keys()
  for name, tensor in before.items():
    assert after[name].dtype == tensor.dtype
    assert after[name].array().tobytes() == tensor.array().tobytes()


# ---------------------------------------------------------------------------
# Recognition


@pytest.mark.parametrize('size, count', [
    ('llava-1.5-7b', 7_062_902_784), ('llava-1.5-13b', 13_350_839_296)])
def test_published_sizes(size, count):
  expected = multimodal.SIZES[size]
  D = expected.decoder.width
  for layout, tower, first in (
      ('llava', None, 'model.mm_projector.0'),
      ('llava_tower', 'model.vision_tower.vision_tower.vision_model.',
       'model.mm_projector.0'),
      ('hf_llava', 'vision_tower.vision_model.',
       'multi_modal_projector.linear_1'),
      ('hf_llava_new', 'model.vision_tower.vision_model.',
       'model.multi_modal_projector.linear_1')):
    tensors, found = published_files.shapes(layout, expected)
    assert found == count - (0 if tower else 303_507_456)
    wanted = {f'{first}.weight': (D, 1024), f'{first}.bias': (D,)}
    if tower:
      wanted |= {
          f'{tower}embeddings.class_embedding': (1024,),
          f'{tower}embeddings.patch_embedding.weight': (1024, 3, 14, 14),
          f'{tower}embeddings.position_embedding.weight': (577, 1024),
          f'{tower}pre_layrnorm.bias': (1024,),
          f'{tower}encoder.layers.23.self_attn.out_proj.weight': (1024, 1024),
          f'{tower}encoder.layers.23.layer_norm2.weight': (1024,),
          f'{tower}encoder.layers.23.mlp.fc1.weight': (4096, 1024),
          f'{tower}post_layernorm.weight': (1024,)}
    assert wanted == {name: tensors[name].shape for name in wanted}
    assert published_files.recognised(tensors) == (layout, expected)


def test_a_padded_vocabulary_is_kept():
  config = multimodal.SIZES['llava-1.5-7b']
  config = dataclasses.replace(
      config, decoder=dataclasses.replace(config.decoder, vocab=32064))
  tensors, count = published_files.shapes('hf_llava', config)
  assert count == 7_063_427_072
  assert tensors['language_model.lm_head.weight'].shape == (32064, 4096)
  # As published: little is said, and that of the vocabulary is wrong.
  own = dict(
      model_type='llava', vision_config=dict(
          model_type='clip_vision_model', hidden_size=1024, image_size=336,
          intermediate_size=4096, num_attention_heads=16, num_hidden_layers=24,
          patch_size=14), text_config=dict(
              model_type='llama', rms_norm_eps=1e-5, vocab_size=32000))
  for beside in {'config.json': own}, {}:
    assert published_files.recognised(tensors, beside) == ('hf_llava', config)


def test_a_config_decides_what_shapes_do_not():
  expected = multimodal.SIZES['llava-1.5-7b']
  tensors, _ = published_files.shapes('llava', expected)
  own, _ = config('llava_square', 'llava')
  own |= dict(num_attention_heads=32)
  find = lambda said=None, **more: published_files.recognised(
      tensors, {'config.json': own | more,
                'preprocessor_config.json': dict(image_mean=[0.1, 0.2, 0.3])},
      said)[1]
  with pytest.raises(errors.UserError, match=r'tell vision.size \(published'):
    find()
  small = find(mm_vision_tower='openai/clip-vit-large-patch14',
               mm_vision_select_layer=-1)
  assert small.vision == dataclasses.replace(
      vision_encoder.sized('clip-l14'), tap=-1, mean=(0.1, 0.2, 0.3))
  assert small.decoder == expected.decoder
  assert find({'vision.size': 'clip-l14-336'}).vision.image_size == (336, 336)
  tower = dict(mm_vision_tower='openai/clip-vit-large-patch14-336')
  for more, message in (
      (dict(mm_vision_select_feature='cls_patch'), "feature='cls_patch', w"),
      (dict(mm_projector_type='mlp3x_gelu'), "type='mlp3x_gelu', which"),
      (dict(mm_use_im_start_end=True), 'im_start_end=True, which'),
      (dict(mm_vision_select_layer=[-2, -5]), r'takes the layers \[-2, -5\]'),
      (dict(mm_vision_select_layer=3), 'no such model exists: vision.tap is 3'),
      (dict(model_type='other'), "has model_type 'other', and the tensors")):
    with pytest.raises(errors.UserError, match=message):
      find(**tower | more)
  image = weights.FAMILIES['llava'].image
  assert image(expected, {'config.json': dict(image_aspect_ratio=None)})[
      'fit'] == 'clip'

  tensors, _ = published_files.shapes('hf_llava', expected)
  own, _ = config('llava_pictures', 'hf_llava')
  own |= dict(text_config=None, vision_config=dict(
      model_type='clip_vision_model', num_attention_heads=16, image_size=340))
  assert find() == dataclasses.replace(
      expected, decoder=dataclasses.replace(expected.decoder, norm_eps=1e-6),
      vision=dataclasses.replace(expected.vision, image_size=(340, 340),
                                 mean=(0.1, 0.2, 0.3)))
  for more, message in (
      (dict(vision_feature_select_strategy='full'), "strategy='full', which"),
      (dict(projector_hidden_act='relu'), "hidden_act='relu', which"),
      (dict(text_config=dict(model_type='mistral')), "type='mistral', which"),
      (dict(vision_config=dict(hidden_act='relu')), "hidden_act='relu', which"),
  ):
    with pytest.raises(errors.UserError, match=message):
      find(**more)


@pytest.mark.parametrize('fields', [
    dict(num_attention_heads=4), dict(num_attention_heads='a'),
    dict(image_size=10**9), dict(patch_size=0), dict(num_hidden_layers=4000),
    dict(layer_norm_eps=-1)])
def test_a_wrong_config_of_the_tower_is_one_error(fields, tmp_path):
  own, _ = config('llava_square', 'hf_llava')
  with pytest.raises(errors.UserError) as caught:
    weights.load(published_files.save(
        tmp_path / 'in', reference.load('llava_square')[1],
        own | dict(vision_config=VISION['llava_square'] | fields)))
  assert '\n' not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize('layout', ['hf_llava', 'llava_tower'])
def test_the_tower_can_be_resized(layout, tmp_path):
  _, tensors = reference.load('llava_square')
  own, said = config('llava_square', layout)
  path = published_files.save(tmp_path / 'in', renamed(tensors, layout), own)
  loaded = weights.load(path, said=said | {'vision.image_size': [11, 25]})
  vision = loaded.model.config.vision
  assert (vision.image_size, vision.heads) == ((11, 25), 3)
  np.testing.assert_array_equal(
      loaded.params['vision']['position_embedding'],
      positions.resize_positions(
          tensors['vision_tower.vision_model.embeddings.position_embedding'
                  '.weight'], (3, 3), (2, 5), 'plain'))
  if layout == 'hf_llava':  # the authors' config does not describe the tower
    files.write(tmp_path / 'out', weights.export(
        layout, loaded.model.config, loaded.params, loaded.dtypes))
    (tmp_path / 'out' / 'config.json').write_text(
        json.dumps(loaded.beside['config.json']))
    assert weights.recognise(tmp_path / 'out')[1] == loaded.model.config

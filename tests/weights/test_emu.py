"""Emu and Emu2 from files as their authors write them, and back.

The files are made here of the arrays in `golden/`, see models/test_emu.py,
where the same rules fill the models that are compared with the references.
"""

import dataclasses

import flax.traverse_util
import ml_dtypes
import numpy as np
import published_files
import pytest
import reference
import tiny_lora

from mmgen import errors
from mmgen import weights
from mmgen.models import multimodal
from mmgen.models import vision_encoder

# What no file tells of sizes that were never published.
SAID = {
    'emu_oblong': {
        'vision.heads': 3, 'vision.image_size': [10, 15], 'decoder.heads': 5,
        'decoder.norm_eps': 1e-6, 'decoder.rope_theta': 1e4,
        'connector.max_distance': 8},
    'emu_square': {
        'vision.heads': 5, 'vision.image_size': [14, 14], 'decoder.heads': 3,
        'decoder.norm_eps': 1e-3, 'decoder.rope_theta': 1e4,
        'connector.max_distance': 6},
    'emu2_nine': {
        'vision.heads': 3, 'vision.pool': 2, 'decoder.heads': 5,
        'decoder.norm_eps': 1e-6, 'decoder.rope_theta': 1e4},
    'emu2_four': {
        'vision.heads': 5, 'vision.image_size': [32, 32], 'vision.pool': 3,
        'decoder.heads': 3, 'decoder.norm_eps': 1e-3,
        'decoder.rope_theta': 1e4}}
# Of each layout: a golden file, and how names begin there.
LAYOUTS = {
    'emu': ('emu_oblong', {}),
    'emu2': ('emu2_nine', {}),
    'emu2_gen': ('emu2_four', {
        name: f'multimodal_encoder.{name}'
        for name in ('visual.', 'decoder.', 'project_')}),
    'hf_emu2': ('emu2_nine', {'visual.': 'model.visual.',
                              'decoder.': 'model.decoder.'})}
# What lies in such files and no model reads; the first are in the golden ones.
UNREAD = ('visual.norm.weight', 'visual.norm.bias', 'visual.head.weight',
          'visual.head.bias', 'cformer.cformer.embed_tokens.weight')
BESIDE = {'emu': 'decoder.lm.model.layers.0.self_attn.rotary_emb.inv_freq',
          'emu2': 'decoder.lm.model.layers.1.self_attn.rotary_emb.inv_freq',
          'emu2_gen': 'unet.conv_in.weight',
          'hf_emu2': 'model.decoder.lm.model.layers.0.self_attn.rotary_emb.'
                     'inv_freq'}
WRAPPED = 'decoder.lm.base_model.model.'


def tensors_of(layout):
  name, begins = LAYOUTS[layout]
  return SAID[name], {
      next((new + key.removeprefix(old) for old, new in begins.items()
            if key.startswith(old)), key): x
      for key, x in reference.load(name)[1].items()}


@pytest.mark.parametrize('layout', LAYOUTS)
def test_export_after_import_is_identical(layout, tmp_path):
  said, tensors = tensors_of(layout)
  read = {name: x for name, x in tensors.items() if name not in UNREAD}
  assert (len(read) < len(tensors)) == (layout == 'emu')
  for dtype in published_files.DTYPES:
    published_files.round_trip(
        read, tmp_path / np.dtype(dtype).name, None, layout, dtype, said)
  # What is not read changes nothing.
  more = tensors | {BESIDE[layout]: np.ones(2, np.float32)}
  loaded = []
  for found in (read, more):
    path = published_files.save(tmp_path / str(len(found)), found)
    loaded.append(flax.traverse_util.flatten_dict(
        weights.load(path, said=said).params))
  assert loaded[0].keys() == loaded[1].keys()
  for name, x in loaded[0].items():
    np.testing.assert_array_equal(x, loaded[1][name])


@pytest.mark.parametrize('layout, base, dtype', [
    ('emu_instruct', '', np.float16),
    ('emu_instruct_new', '.base_layer', ml_dtypes.bfloat16),
    ('emu_instruct_new', '.base_layer', np.float32)])
def test_adapters_stay_apart_until_they_are_merged(layout, base, dtype,
                                                   tmp_path):
  # That they give the reference's outputs is seen in models/test_emu.py.
  said, plain = tensors_of('emu')
  plain = {name: x.astype(dtype) for name, x in plain.items()
           if name not in UNREAD}
  tensors, merged = tiny_lora.emu_instruct(plain, base), {}
  published_files.round_trip(tensors, tmp_path, None, layout, dtype, said)
  loaded = weights.load(tmp_path / 'in', said=said)
  c = loaded.model.config
  assert c.lora == multimodal.SIZES['emu-i'].lora
  assert len(loaded.params['lora']['blocks']['attention']) == 4
  for name, x in plain.items():
    theirs = name.replace('decoder.lm.', WRAPPED).removesuffix('.weight')
    if f'{theirs}.lora_A.default.weight' in tensors:
      down, up = (tensors[f'{theirs}.lora_{side}.default.weight'].astype('f4')
                  for side in 'AB')
      x = (x.astype('f4') + up @ down)
    merged[name] = x.astype('f4')
  one = weights.merge(loaded)
  assert one.layout == 'emu' and one.model.config == dataclasses.replace(
      c, lora=None)
  expected = weights.load(published_files.save(tmp_path / 'plain', merged),
                          said=said)
  for name, x in flax.traverse_util.flatten_dict(expected.params).items():
    np.testing.assert_allclose(
        flax.traverse_util.flatten_dict(one.params)[name], x, rtol=1e-6,
        atol=1e-6)
  out = dict(weights.export('emu', one.model.config, one.params, one.dtypes))
  assert out.keys() == plain.keys()
  assert {x.dtype for x in out.values()} == {np.dtype(dtype)}
  for config, of in ((c, 'emu'), (one.model.config, layout)):
    with pytest.raises(errors.UserError, match="--merge|layout is 'emu'"):
      weights.export(of, config, loaded.params, 'float32')


def test_adapters_of_another_rank_are_asked_about():
  said, plain = tensors_of('emu')
  tensors = {name: x[:3] if 'lora_A' in name else x[:, :3] if 'lora_B' in name
             else x for name, x in tiny_lora.emu_instruct(plain).items()}
  with pytest.raises(errors.UserError, match='tell lora.alpha .*lora.dropout'):
    published_files.recognised(tensors, said=said)
  _, config = published_files.recognised(
      tensors, said=said | {'lora.alpha': 6, 'lora.dropout': 0})
  assert (config.lora.rank, config.lora.alpha) == (3, 6)


# Of released files: of Emu's 14,208,419,072 parameters 26,119,936 are never
# read, the final norm and the head of the tower and the word embedding of T5.
@pytest.mark.parametrize('layout, size, count', [
    ('emu', 'emu', 14_208_419_072 - 26_119_936),
    ('emu_instruct', 'emu-i', 14_208_419_072 - 26_119_936 + 2 * 2 * 5120
     + 40 * 4 * 2 * 16 * 5120),
    ('emu2', 'emu2', 36_906_513_152),
    ('emu2_gen', 'emu2-gen', 36_906_513_152),
    ('hf_emu2', 'emu2-chat', 36_906_513_152 + 2 * 2 * 6656)])
def test_published_sizes(layout, size, count):
  config = multimodal.SIZES[size]
  tensors, found = published_files.shapes(layout, config)
  assert found == count
  assert published_files.recognised(tensors) == (layout, config)
  family = weights.FAMILIES[layout]
  assert [family.of(field, config) for field in ('style', 'family')] == {
      'emu': ['emu', 'emu'], 'emu-i': ['emu_instruct'] * 2,
      'emu2-chat': ['emu2_chat'] * 2}.get(size, ['emu', 'emu2'])
  lm = dict(emu='decoder.lm.', emu_instruct=WRAPPED, emu2='decoder.lm.',
            emu2_gen='multimodal_encoder.decoder.lm.',
            hf_emu2='model.decoder.lm.')[layout]
  V, D = config.decoder.vocab, config.decoder.width
  wanted = {f'{lm}model.embed_tokens.weight': (V, D),
            f'{lm}lm_head.weight': (V, D), f'{lm}model.norm.weight': (D,)}
  block = 'cformer.cformer.block.11.layer.'
  if size in ('emu', 'emu-i'):
    wanted |= {
        'visual.pos_embed': (1, 257, 1408), 'visual.cls_token': (1, 1, 1408),
        'visual.patch_embed.proj.weight': (1408, 3, 14, 14),
        'visual.blocks.39.attn.qkv.weight': (4224, 1408),
        'visual.blocks.39.attn.q_bias': (1408,),
        'visual.blocks.39.mlp.fc1.weight': (6144, 1408),
        'ln_visual.weight': (1408,), 'ln_visual.bias': (1408,),
        'cformer.causal_tokens': (1, 32, 768),
        f'{block}0.SelfAttention.q.weight': (768, 768),
        f'{block}1.EncDecAttention.k.weight': (768, 1408),
        f'{block}2.DenseReluDense.wo.weight': (768, 3072),
        f'{block}2.layer_norm.weight': (768,),
        'cformer.cformer.block.0.layer.0.SelfAttention.relative_attention_bias.'
        'weight': (32, 12),
        'cformer.cformer.final_layer_norm.weight': (768,),
        'cformer.projection.weight': (5120, 768),
        'cformer.projection.bias': (5120,),
        f'{lm}stu_regress_head.weight': (5120, 5120)}
    # The released class has 1096, of which 40 are tables of angles.
    assert len(tensors) == 40 * 8 * (layout != 'emu') + 1056 - len(UNREAD)
  else:
    root = 'multimodal_encoder.' if layout == 'emu2_gen' else ''
    tower = lm.removesuffix('decoder.lm.')
    wanted |= {f'{root}project_up.weight': (6656, 1792),
               f'{root}project_down.weight': (1792, 6656),
               f'{tower}visual.pos_embed': (1, 1025, 1792),
               f'{tower}visual.blocks.63.norm2.bias': (1792,)}
  assert wanted == {name: tensors[name].shape for name in wanted}


def test_what_a_config_tells_and_a_user_has_to_say():
  config = dataclasses.replace(
      multimodal.SIZES['emu2'], decoder=dataclasses.replace(
          multimodal.SIZES['emu2'].decoder, vocab=32300))
  tensors, _ = published_files.shapes('hf_emu2', config)
  with pytest.raises(errors.UserError, match=r'tell vision.pool \(patches al'):
    published_files.recognised(tensors)
  assert published_files.recognised(
      tensors, said={'vision.pool': 4}) == ('hf_emu2', config)
  own = dict(num_attention_heads=52, rms_norm_eps=1e-5, hidden_size=6656,
             vision_config=dict(head_width=64, image_size=448, n_query=256))
  _, found = published_files.recognised(tensors, {'config.json': own})
  assert (found.vision.heads, found.vision.pool, found.decoder.norm_eps) == (
      28, 2, 1e-5)
  with pytest.raises(errors.UserError, match="hidden_act='gelu', which is not"):
    published_files.recognised(
        tensors, {'config.json': own | dict(hidden_act='gelu')})


def test_pictures_are_stretched():
  for size, edge in (('emu', 224), ('emu2-chat', 448)):
    config = multimodal.SIZES[size]
    assert weights.FAMILIES['emu'].image(config, {}) == dict(
        size=(edge, edge), fit='square', kernel='bicubic',
        mean=vision_encoder.CLIP_MEAN, std=vision_encoder.CLIP_STD)

"""`convert --check` on tiny models that the reference libraries wrote.

Each family in odd sizes; with one tensor perturbed each check must fail.
"""

import dataclasses
import json
import shutil

import published_files
import pytest
import tiny
import torch

from mmgen import convert
from mmgen import errors
from mmgen import references
from mmgen import weights
from mmgen.models import vision_encoder
from mmgen.weights import files

LLAMA = dict(vocab_size=61, hidden_size=28, intermediate_size=44,
             num_hidden_layers=2, num_attention_heads=7, rms_norm_eps=1e-5)
TEXT = dict(vocab_size=37, max_position_embeddings=9, num_hidden_layers=2,
            hidden_size=20, num_attention_heads=5, intermediate_size=31,
            eos_token_id=36)
TOWER = dict(num_hidden_layers=3, hidden_size=18, num_attention_heads=3,
             intermediate_size=31)
PAIR = dict(context_length=9, vocab_size=37, width=20, heads=5, layers=2,
            mlp_ratio=1.6)
PERSIMMON = dict(vocab_size=61, num_hidden_layers=2, hidden_size=36,
                 num_attention_heads=3, intermediate_size=50)

# {name: (layout, its maker, --say)}
CASES = {
    # Pixels are left over at two edges.
    'clip': ('hf_clip', lambda folder: tiny.clip(
        folder, embed=10, vision=dict(TOWER, image_size=15, patch_size=4),
        text=TEXT), ()),
    'clip_gelu': ('hf_clip', lambda folder: tiny.clip(
        folder, 1, embed=7, size=dict(shortest_edge=10), image_std=[.3, .4, .5],
        crop_size=dict(height=10, width=10), resample=2, text=dict(
            TEXT, hidden_act='gelu', eos_token_id=2, layer_norm_eps=1e-3),
        vision=dict(TOWER, hidden_act='gelu', image_size=10, patch_size=5,
                    num_attention_heads=9)), ()),
    'siglip': ('hf_siglip', lambda folder: tiny.siglip(
        folder, vision=dict(TOWER, image_size=13, patch_size=3),
        text=dict(TEXT, hidden_size=18, num_attention_heads=3)), ()),
    'siglip_bfloat16': ('hf_siglip', lambda folder: tiny.siglip(
        folder, 1, dtype=torch.bfloat16,
        vision=dict(TOWER, image_size=8, patch_size=4, hidden_size=20,
                    num_attention_heads=5),
        text=dict(TEXT, hidden_size=20, num_attention_heads=2)), ()),
    'openai': ('openai_clip', lambda folder: tiny.open_clip_folder(
        folder, wrap='clip.pt', embed_dim=10, quick_gelu=True, text_cfg=PAIR,
        vision_cfg=dict(image_size=15, patch_size=4, layers=3, width=18,
                        head_width=6, mlp_ratio=1.7)),
               ('mlp=quick_gelu', 'vision.heads=3', 'text.heads=5',
                'vision.image_size=[15, 15]')),
    'openai_config': ('openai_clip', lambda folder: tiny.open_clip_folder(
        folder, 1, embed_dim=7, text_cfg=PAIR, vision_cfg=dict(
            image_size=15, patch_size=4, layers=2, width=20, head_width=4)),
                      ()),
    # 2 x 4 patches, a bias of the logits.
    'open_clip_oblong': ('open_clip', lambda folder: tiny.open_clip_folder(
        folder, custom=True, embed_dim=7, init_logit_bias=-3., text_cfg=PAIR,
        vision_cfg=dict(image_size=[10, 20], patch_size=5, layers=2, width=12,
                        head_width=4),
        preprocess=dict(resize_mode='squash', interpolation='bilinear',
                        mean=[.5, .4, .3], std=[.2, .3, .4])), ()),
    'open_clip': ('open_clip', lambda folder: tiny.open_clip_folder(
        folder, 1, custom=True, wrap='model.pt', embed_dim=10, text_cfg=PAIR,
        vision_cfg=dict(image_size=12, patch_size=3, layers=2, width=20,
                        head_width=4)),
                  ('mlp=gelu', 'vision.heads=5', 'text.heads=5')),
    'eva02': ('eva_open_clip', lambda folder: tiny.open_clip_folder(
        folder, 2, custom=True, embed_dim=6, text_cfg=PAIR,
        vision_cfg=dict(image_size=[20, 12]), preprocess=dict(
            resize_mode='squash'),
        trunk=dict(
            img_size=(20, 12), patch_size=4, embed_dim=24, depth=2, num_heads=2,
            mlp_ratio=1.9, qkv_fused=False, swiglu_mlp=True, scale_mlp=True,
            scale_attn_inner=True, use_rot_pos_emb=True,
            ref_feat_shape=(16, 16))),
              ('vision.placement=pre', 'vision.rope_grid=[16, 16]',
               'vision.heads=2')),
    'eva02_post': ('eva_open_clip', lambda folder: tiny.open_clip_folder(
        folder, 3, custom=True, embed_dim=7, text_cfg=PAIR,
        vision_cfg=dict(image_size=15),
        trunk=dict(img_size=15, patch_size=5, embed_dim=20, depth=3,
                   num_heads=5, mlp_ratio=2.6, use_post_norm=True)),
              ('vision.placement=post', 'vision.rope_grid=none',
               'vision.heads=5')),
    'open_clip_siglip': ('open_clip_siglip', lambda folder:
                         tiny.open_clip_folder(
        folder, 4, custom=True, embed_dim=18, init_logit_bias=-3.,
        vision_cfg=dict(image_size=[13, 8]),
        preprocess=dict(resize_mode='squash', mean=[.5] * 3, std=[.5] * 3),
        text_cfg=dict(
            PAIR, no_causal_mask=True, proj_bias=True, pool_type='last',
            norm_kwargs=dict(eps=1e-6)),
        kind=tiny.siglip_trunk, pool='map', trunk=dict(
            img_size=(13, 8), patch_size=3, embed_dim=18, depth=2, num_heads=3,
            mlp_ratio=1.7)), ('vision.heads=3',)),
    'timm_eva': ('timm_eva', lambda folder: tiny.timm_folder(
        folder, architecture='eva02_base_patch16_clip_224', img_size=(20, 12),
        patch_size=4, embed_dim=24, depth=2, num_heads=2, num_classes=7,
        mlp_ratio=1.9, global_pool='token', pictures=dict(
            input_size=(3, 20, 12), crop_mode='squash')),
                 ('vision.placement=pre', 'vision.rope_grid=[16, 16]')),
    'timm_eva_avg': ('timm_eva_avg', lambda folder: tiny.timm_folder(
        folder, 1, architecture='eva02_tiny_patch14_224', img_size=15,
        patch_size=5, embed_dim=20, depth=3, num_heads=5, num_classes=0),
                     ('vision.placement=pre', 'vision.rope_grid=[16, 16]')),
    'timm_siglip': ('timm_siglip', lambda folder: tiny.timm_folder(
        folder, 2, architecture='vit_base_patch16_siglip_224', depth=2,
        img_size=(10, 13), patch_size=3, embed_dim=15, num_heads=5,
        mlp_ratio=1.5, num_classes=0), ()),
    'llama': ('llama', lambda folder: tiny.llama(folder, **LLAMA), ()),
    'llama_bfloat16': ('llama', lambda folder: tiny.llama(
        folder, 1, **dict(LLAMA, num_attention_heads=6, num_key_value_heads=2,
                          hidden_size=36), dtype=torch.bfloat16), ()),
    'qwen2': ('llama', lambda folder: tiny.qwen2(
        folder, **dict(LLAMA, num_key_value_heads=1), rope_parameters=dict(
            rope_type='default', rope_theta=1e6)), ()),
    'qwen2_wide': ('llama', lambda folder: tiny.qwen2(
        folder, 1, **dict(LLAMA, num_attention_heads=6, num_key_value_heads=3,
                          hidden_size=24, num_hidden_layers=3)), ()),
    'llava': ('hf_llava_flat', lambda folder: tiny.llava(
        folder, picture=33, text=LLAMA, vision=dict(
            TOWER, image_size=17, patch_size=5)), ()),
    'llava_bfloat16': ('hf_llava_flat', lambda folder: tiny.llava(
        folder, 1, picture=60, dtype=torch.bfloat16,
        text=dict(LLAMA, num_attention_heads=6, num_key_value_heads=2,
                  hidden_size=36),
        vision=dict(TOWER, image_size=8, patch_size=4, hidden_size=20,
                    num_attention_heads=5, hidden_act='gelu')), ()),
    'fuyu': ('hf_fuyu', lambda folder: tiny.fuyu(
        folder, canvas=(30, 70), patch=5, picture=9, text=PERSIMMON), ()),
    # Of 6 channels of a head 4 turn.
    'fuyu_high': ('hf_fuyu', lambda folder: tiny.fuyu(
        folder, 1, canvas=(60, 24), patch=4, picture=60, text=dict(
            PERSIMMON, hidden_size=30, num_attention_heads=5,
            partial_rotary_factor=0.75)), ()),
}


@pytest.fixture(scope='session')
def made(tmp_path_factory):
  """Function from a name of `CASES` to the folder of its files."""
  base, folders = tmp_path_factory.mktemp('made'), {}

  def make(name):
    if name not in folders:
      folders[name] = base / name
      CASES[name][1](folders[name])
    return folders[name]

  return make


def check(path, name, *options):
  return convert.main([f'--check={path}', *options] + [
      f'--say={field}' for field in CASES[name][2]])


@pytest.mark.parametrize('name', CASES)
def test_every_stage_is_that_of_the_library(name, made, capsys):
  assert check(made(name), name, '--tolerance=1e-5') == 0, (
      capsys.readouterr().out)
  said = capsys.readouterr().out
  assert f'({CASES[name][0]}' in said
  assert ('logits' in said or 'timm' in name) and 'worse' not in said
  assert 'vision/2' in said or 'decoder/2' in said


@pytest.mark.parametrize('name, layout', [
    ('clip', 'hf_clip'), ('clip_gelu', 'hf_clip'), ('siglip', 'hf_siglip'),
    ('open_clip_oblong', 'open_clip'), ('clip', 'openai_clip'),
    ('openai', 'hf_clip'),
    ('llama', 'llama'), ('qwen2_wide', 'llama'), ('llava', 'hf_llava'),
    ('llava', 'hf_llava_flat')])
def test_the_library_reads_what_a_run_became(name, layout, made, tmp_path,
                                             capsys):
  """Nothing is said of it: the files that are exported tell all."""
  convert.main([f'--from={made(name)}', f'--to={tmp_path / "run"}'] + [
      f'--say={field}' for field in CASES[name][2]])
  published_files.go_on(tmp_path / 'run', tmp_path / 'on')
  convert.main([f'--from={tmp_path / "on"}', f'--to={tmp_path / "out"}',
                f'--layout={layout}'])
  code = convert.main([f'--check={tmp_path / "out"}', '--tolerance=1e-5'])
  assert code == 0, capsys.readouterr().out
  said = capsys.readouterr().out
  assert f'({layout})' in said and 'logits' in said and 'worse' not in said


def published(folder, to):
  """A LLaVA with the names of released files, which version 5 changed."""
  shutil.copytree(folder, to, ignore=shutil.ignore_patterns('*.safetensors*'))
  files.write(to / 'model.safetensors', (
      (name.replace('vision_tower.', 'vision_tower.vision_model.'),
       tensor.array()) for name, tensor in files.open(folder).items()),
              metadata={'format': 'pt'})
  return to


def test_names_of_released_files(made, tmp_path, capsys):
  folder = published(made('llava'), tmp_path / 'llava')
  assert check(folder, 'llava', '--tolerance=1e-5') == 0
  assert '(hf_llava)' in capsys.readouterr().out


# How names of transformers' files begin in those of LLaVA's authors.
OWN = {'language_model.lm_head': 'lm_head', 'language_model.': '',
       'multi_modal_projector.linear_1': 'model.mm_projector.0',
       'multi_modal_projector.linear_2': 'model.mm_projector.2',
       'vision_tower.': 'model.vision_tower.vision_tower.vision_model.'}


def authors(folder, to, tower):
  """A LLaVA as its authors publish it, with its tower or without."""
  config = json.loads((folder / 'config.json').read_text())
  files.write(to, (
      (OWN[old] + name.removeprefix(old), tensor.array())
      for name, tensor in files.open(folder).items()
      for old in [next(filter(name.startswith, OWN))]
      if tower or old != 'vision_tower.'), max_shard_bytes=60_000)
  (to / 'config.json').write_text(json.dumps(config['text_config'] | dict(
      model_type='llava_llama', mm_projector_type='mlp2x_gelu',
      mm_vision_tower='openai/tiny', mm_vision_select_layer=-2,
      mm_vision_select_feature='patch', image_aspect_ratio='pad')))
  return to


@pytest.mark.parametrize('name', ['llava', 'llava_bfloat16'])
def test_files_of_llavas_authors(name, made, tmp_path, capsys, monkeypatch):
  """Without a tower a CLIP is attached, in bits of its own."""
  vision = weights.load(made(name)).model.config.vision
  monkeypatch.setitem(vision_encoder.SIZES, 'tiny', vision)
  tiny.clip(tmp_path / 'clip', 2, embed=6, text=TEXT, vision=dict(
      image_size=vision.image_size[0], patch_size=vision.patch,
      num_hidden_layers=vision.layers, hidden_size=vision.width,
      intermediate_size=vision.hidden, num_attention_heads=vision.heads,
      hidden_act=vision.mlp))
  whole = authors(made(name), tmp_path / 'whole', True)
  assert convert.main([
      f'--check={whole}', '--tolerance=1e-5', f'--say=vision.mlp={vision.mlp}',
      f'--say=vision.heads={vision.heads}',
      f'--say=vision.image_size={list(vision.image_size)}']) == 0, (
          capsys.readouterr().out)
  own = authors(made(name), tmp_path / 'own', False)
  args = [f'--check={own}', '--say=vision.size=tiny', '--tolerance=1e-5']
  with pytest.raises(errors.UserError, match='Its image tower is a CLIP'):
    convert.main(args)
  args.append(f'--attach={tmp_path / "clip"}')
  assert convert.main(args) == 0, capsys.readouterr().out
  said = capsys.readouterr().out
  assert said.count('(llava_tower)') == 2 and 'only ' not in said
  # The tower is that of the CLIP: with another one it is the first to differ.
  run = references.REFERENCES['llava'].run
  monkeypatch.setitem(
      references.REFERENCES, 'llava_tower', dataclasses.replace(
          references.REFERENCES['llava'],
          run=lambda path, *rest: run(whole, *rest[:2])))
  assert convert.main(args) == 1
  assert 'vision/0 is the first of ' in capsys.readouterr().out


# The tensor whose numbers change, and the first stage that shows it.
PERTURBED = {
    'clip': ('text_model.encoder.layers.1.mlp.fc2.weight', 'text/2'),
    'siglip': ('vision_model.head.probe', 'vision/pooled'),
    'openai_config': ('visual.transformer.resblocks.0.attn.in_proj_weight',
                      'vision/1'),
    'open_clip_oblong': ('logit_scale', 'logits'),
    'eva02': ('visual.trunk.blocks.1.attn.v_proj.bias', 'vision/2'),
    'timm_siglip': ('attn_pool.kv.bias', 'vision/embedding'),
    'llama': ('model.layers.0.self_attn.v_proj.weight', 'decoder/1'),
    'qwen2': ('model.layers.1.self_attn.k_proj.bias', 'decoder/2'),
    'llava': ('multi_modal_projector.linear_1.bias', 'connector'),
    'fuyu': ('language_model.model.final_layernorm.weight', 'decoder/hidden'),
}


@pytest.mark.parametrize('name', PERTURBED)
def test_one_tensor_that_differs_is_found(name, made, tmp_path, capsys,
                                          monkeypatch):
  other, stage = PERTURBED[name]
  assert other in files.open(made(name))
  shutil.copytree(made(name), tmp_path / 'other',
                  ignore=shutil.ignore_patterns('*.safetensors*'))
  files.write(tmp_path / 'other' / 'model.safetensors', (
      (key, (tensor.array() * (1.01 if key == other else 1)).astype('f4'))
      for key, tensor in files.open(made(name)).items()))
  # The reference reads what it was, all of it.
  run = references.REFERENCES[CASES[name][0]].run
  monkeypatch.setitem(
      references.REFERENCES, CASES[name][0], dataclasses.replace(
          references.REFERENCES[CASES[name][0]],
          run=lambda path, *rest: run(made(name), *rest)))
  assert check(tmp_path / 'other', name) == 1
  assert f'{stage} is the first of ' in capsys.readouterr().out

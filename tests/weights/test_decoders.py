"""LLaMA and Qwen2 from files as transformers writes them, and back.

The files are made here of the arrays in `golden/`, which hold weights under
transformers' own names, and what its models gave with them.
"""

import json

import jax
import numpy as np
import published_files
import pytest
import reference

from mmgen import errors
from mmgen import weights
from mmgen.models import decoder
from mmgen.models import multimodal

# What transformers' config.json has beside sizes, which shapes tell.
CONFIGS = {
    'llama_tiny': dict(model_type='llama', num_attention_heads=9,
                       rms_norm_eps=1e-5),
    'qwen2_tiny': dict(model_type='qwen2', num_attention_heads=5,
                       num_hidden_layers=2, rope_theta=1e6, hidden_act='silu',
                       use_sliding_window=False),
}
SAID = {'llama_tiny': {'decoder.heads': 9, 'decoder.norm_eps': 1e-5,
                       'decoder.rope_theta': 1e4},
        'qwen2_tiny': {'decoder.heads': 5, 'decoder.norm_eps': 1e-6,
                       'decoder.rope_theta': 1e6}}


@pytest.mark.parametrize('with_config', [True, False])
@pytest.mark.parametrize('name', CONFIGS)
def test_import_gives_the_references_outputs(name, with_config, tmp_path):
  arrays, tensors = reference.load(name)
  tensors['model.layers.0.self_attn.rotary_emb.inv_freq'] = np.ones(2, 'f4')
  path = published_files.save(
      tmp_path / 'in', tensors, CONFIGS[name] if with_config else None)
  loaded = weights.load(path, said={} if with_config else SAID[name])
  assert (loaded.layout, loaded.image) == ('llama', {})
  batch = {key: arrays[key] for key in ('tokens', 'segments', 'positions')}
  with jax.default_matmul_precision('highest'):
    logits, out = jax.jit(loaded.model.apply)({'params': loaded.params}, batch)
  assert reference.error(logits, arrays['logits']) < 1e-5
  last = max(key for key in arrays if key.startswith('hidden/'))
  assert reference.error(out['hidden'], arrays[last]) < 1e-5


@pytest.mark.parametrize('dtype', published_files.DTYPES)
@pytest.mark.parametrize('name', CONFIGS)
def test_export_after_import_is_identical(name, dtype, tmp_path):
  published_files.round_trip(
      reference.load(name)[1], tmp_path, CONFIGS[name], 'llama', dtype)


# ---------------------------------------------------------------------------
# Recognition


@pytest.mark.parametrize('size, count, said', [
    ('llama-7b', 6_738_415_616, {'decoder.norm_eps': 1e-6}),
    ('vicuna-7b', 6_738_415_616, {'decoder.norm_eps': 1e-5}),
    ('llama-13b', 13_015_864_320, {'decoder.norm_eps': 1e-6}),
    ('vicuna-13b', 13_015_864_320, {'decoder.norm_eps': 1e-5}),
    ('llama-33b', 32_528_943_616, {}), ('vicuna-33b', 32_528_943_616, {}),
    ('qwen2.5-7b', 7_615_616_512, {})])
def test_published_sizes(size, count, said):
  config = multimodal.MultimodalConfig(decoder.sized(size))
  tensors, found = published_files.shapes('llama', config)
  assert found == count
  last = config.decoder.layers - 1
  c = config.decoder
  for name, shape in {
      'model.embed_tokens.weight': (c.vocab, c.width),
      'lm_head.weight': (c.vocab, c.width), 'model.norm.weight': (c.width,),
      f'model.layers.{last}.self_attn.k_proj.weight': (
          c.stack.K * 128, c.width),
      f'model.layers.{last}.mlp.down_proj.weight': (c.width, c.hidden),
  }.items():
    assert tensors[name].shape == shape
  assert published_files.recognised(tensors, said=said) == ('llama', config)
  if said:  # LLaMA and Vicuna differ in nothing else
    with pytest.raises(errors.UserError, match=r'tell decoder.norm_eps \(of '
                       r'all.*--say=decoder.norm_eps='):
      published_files.recognised(tensors)


def test_a_config_decides_what_shapes_do_not(tmp_path):
  _, tensors = reference.load('llama_tiny')
  tensors['model.embed_tokens.weight'] = np.zeros((64, 36))  # as in the file
  tensors['lm_head.weight'] = np.zeros((64, 36))
  own = dict(CONFIGS['llama_tiny'], vocab_size=53)
  find = lambda **more: published_files.recognised(
      tensors, {'config.json': own | more})[1].decoder
  expected = decoder.DecoderConfig(vocab=64, layers=3, width=36, heads=9,
                                   kv_heads=3, hidden=52)
  assert find() == expected
  new = dict(rope_type='default', rope_theta=7.0)
  assert find(rope_parameters=new, rope_theta=None).rope_theta == 7
  heads = find(num_attention_heads=6)
  assert (heads.heads, heads.kv_heads, heads.stack.H) == (6, 2, 6)
  del own['rms_norm_eps']
  assert (find().norm_eps, find().rope_theta) == (1e-6, 1e4)
  assert published_files.recognised(tensors, {'config.json': own}, {
      'decoder.norm_eps': 0.5})[1].decoder.norm_eps == 0.5
  for more, message in (
      (dict(model_type='gemma'), "model_type 'gemma', whose.*known: llama, qw"),
      (dict(hidden_act='gelu'), "hidden_act='gelu', which is not supported"),
      (dict(use_sliding_window=True), 'use_sliding_window=True, which'),
      (dict(rope_scaling=dict(type='linear', factor=2)), "the type 'linear'"),
      (dict(num_attention_heads=7), 'no such model exists: model.decoder.kv_'),
      (dict(num_hidden_layers=4, hidden_size=36, intermediate_size=53),
       r'says num_hidden_layers 4 \(they have 3\), intermediate_size 53 \(they '
       r'have 52\)\.')):
    with pytest.raises(errors.UserError, match=message):
      find(**more)
  with pytest.raises(errors.UserError, match='decoder.width cannot be said of'):
    published_files.recognised(tensors, said={'decoder.width': 3})


@pytest.mark.parametrize('field, values', [
    ('num_hidden_layers', (0, -1, 4000, 10**9, None, 'a', [3], True, 3.5)),
    ('hidden_size', (0, -1, 10**30, None, 'a', {}, float('nan'))),
    ('num_attention_heads', (0, -1, 10**9, None, 'a', [9], 9.5)),
    ('intermediate_size', (0, None, 'a', float('inf'))),
    ('rms_norm_eps', (0, -1, 1e9, 10**400, None, 'a', True, float('nan'))),
    ('rope_theta', (0, -1, 1, 10**30, None, 'a', float('nan')))])
def test_a_wrong_config_is_one_error(field, values, tmp_path):
  path = published_files.save(
      tmp_path / 'in', reference.load('llama_tiny')[1], {})
  for value in values:
    (path / 'config.json').write_text(json.dumps(
        CONFIGS['llama_tiny'] | {field: value}))
    with pytest.raises(errors.UserError) as caught:
      weights.load(path)
    said = str(caught.value)
    assert '\n' not in said and len(said) < 600, said
    assert any(word in said for word in (
        field, 'config.json', 'heads', 'norm_eps', 'rope_theta')), said


def test_all_that_is_wrong_is_one_error(tmp_path):
  _, tensors = reference.load('qwen2_tiny')
  tensors['model.layers.1.mlp.up_proj.weight'] = np.zeros((56, 41))
  tensors['model.layers.5.mlp.up_proj.weight'] = np.zeros((56, 40))
  del tensors['lm_head.weight'], tensors['model.embed_tokens.weight']
  del tensors['model.layers.0.self_attn.k_proj.bias']
  with pytest.raises(errors.UserError) as caught:
    weights.load(published_files.save(
        tmp_path / 'in', tensors, CONFIGS['qwen2_tiny']))
  for part in ('lm_head.weight is missing', 'model.embed_tokens.weight is miss',
               'layers.0.self_attn.k_proj.bias is missing',
               'layers.5.mlp.up_proj.weight is extra',
               'layers.1.mlp.up_proj.weight is [56, 41], not [56, 40]'):
    assert part in str(caught.value)
  assert str(caught.value).count(';') == 4

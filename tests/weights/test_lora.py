"""Adapters from files as PEFT and LLaVA's authors write them, and back.

What PEFT 0.21.2 stored (see tests/models/test_lora.py) comes out of export as
the same bytes. In tests/golden/weights/peft_llava torch 2.13.0 stored, in
bfloat16 and under the names of the authors' code, the adapters and the
connector at the end of the run in tests/golden/lora_llava.npz.
"""

import json
import shutil

import flax.traverse_util
import jax
import ml_dtypes
import numpy as np
import published_files
import pytest
import reference
import tiny_lora

from mmgen import errors
from mmgen import weights
from mmgen.weights import files
from mmgen.weights import lora

FOLDER = reference.GOLDEN / 'weights'


def bits(path):
  return {name: (tensor.dtype, tensor.shape, tensor.array().tobytes())
          for name, tensor in files.open(path).items()}


@pytest.mark.parametrize('name', ['heads', 'all'])
def test_adapters_of_peft_give_its_outputs(name, tmp_path):
  arrays, _ = reference.load('lora_llama')
  loaded = weights.load(FOLDER / f'peft_{name}')
  assert loaded.layout == 'peft' and len(loaded.report) == 2 * len(
      loaded.model.config.sizes)
  both = weights.attach(tiny_lora.base(tmp_path / 'base'), loaded)
  assert both.layout == 'llama'
  want = tiny_lora.options(name)
  got = both.model.config.lora
  assert (got.rank, got.alpha, got.dropout) == (
      want['rank'], want['alpha'], want['dropout'])
  merged = weights.merge(both)
  assert merged.model.config == tiny_lora.base(tmp_path / 'again').model.config
  batch = tiny_lora.batch(arrays['tokens'])
  with jax.default_matmul_precision('highest'):
    for one in (both, merged):
      logits, _ = jax.jit(one.model.apply)({'params': one.params}, batch)
      assert reference.error(logits, arrays[f'{name}/logits']) < 1e-5
  # The merged model is stored as any other.
  tensors = dict(weights.export(
      merged.layout, merged.model.config, merged.params, merged.dtypes))
  assert tensors.keys() == reference.load('llama_tiny')[1].keys()
  with pytest.raises(errors.UserError, match='cannot hold this.*lora/blocks/'):
    weights.export(both.layout, both.model.config, both.params, 'float32')


@pytest.mark.parametrize('name', ['heads', 'all'])
def test_export_after_import_is_identical(name, tmp_path):
  loaded = weights.load(FOLDER / f'peft_{name}')
  lora.export(tmp_path / 'out', loaded.model.config, loaded.params,
              loaded.dtypes, loaded.beside[lora.CONFIG])
  assert json.loads((tmp_path / 'out' / lora.CONFIG).read_text()) == (
      loaded.beside[lora.CONFIG])
  assert (tmp_path / 'out' / 'adapter_model.safetensors').read_bytes() == (
      FOLDER / f'peft_{name}' / 'adapter_model.safetensors').read_bytes()
  with pytest.raises(errors.UserError, match='out has files already'):
    lora.export(tmp_path / 'out', loaded.model.config, loaded.params)


@pytest.mark.parametrize('family, before, infix, targets', [
    ('llama', 'model.layers.', '',
     ['down_proj', 'gate_proj', 'k_proj', 'o_proj', 'q_proj', 'up_proj',
      'v_proj']),
    ('hf_llava', 'language_model.model.layers.', '.default', None),
    ('hf_llava_new', 'model.language_model.layers.', '.mine', None),
])
def test_names_of_other_decoders(family, before, infix, targets, tmp_path):
  model = tiny_lora.build(tiny_lora.options('all'))
  params = tiny_lora.params(model)
  lora.export(tmp_path / 'out', lora.describe(model.config, family), params,
              ml_dtypes.bfloat16)
  tensors = files.open(tmp_path / 'out')
  assert f'base_model.model.{before}2.mlp.up_proj.lora_B.weight' in tensors
  own = json.loads((tmp_path / 'out' / lora.CONFIG).read_text())
  if targets is None:
    assert own['target_modules'].startswith(
        before.replace('.', r'\.') + r'\d+\.(self_attn\.q_proj|')
    # As a model in memory has them: with the name of the set of adapters.
    renamed = {name.replace('.weight', f'{infix}.weight'): x
               for name, x in tensors.items()}
    files.write(tmp_path / 'out' / 'adapter_model.safetensors', renamed)
  else:
    assert own['target_modules'] == targets
  loaded = weights.load(tmp_path / 'out')
  assert loaded.model.config.infix == infix
  jax.tree.map(
      lambda got, want: np.testing.assert_array_equal(
          got, want.astype(ml_dtypes.bfloat16)),
      loaded.params, {'lora': params['lora']})
  with pytest.raises(errors.UserError, match="'hf_fuyu' are not known; known"):
    lora.describe(model.config, 'hf_fuyu')


def test_adapters_and_connector_of_llava(tmp_path):
  """Both files of a folder; each tensor is where the golden run has it."""
  folder = tiny_lora.llava(tmp_path / 'in')
  adapters = weights.load(folder)
  connector = weights.load(folder / 'non_lora_trainables.bin')
  assert (adapters.layout, connector.layout) == ('peft', 'llava_trainables')
  assert adapters.model.config.lora.alpha == 10
  final = {name.removeprefix('final/'): x
           for name, x in reference.load('lora_llava')[0].items()}
  close = lambda got, name: np.testing.assert_allclose(
      got, final[f'base_model.model.{name}'].T, rtol=2 ** -8)
  blocks = flax.traverse_util.flatten_dict(
      adapters.params['lora']['blocks'], sep='/')
  assert len(blocks) == 14
  for ours, theirs in tiny_lora.THEIRS.items():
    for side in 'ab':
      for i, layer in enumerate(blocks[f'{ours}/{side}']):
        close(layer, f'language_model.model.layers.{i}.{theirs}.lora_'
              f'{side.upper()}.weight')
  for i, part in enumerate(('up', 'down'), 1):
    leaves = connector.params['connector'][part]
    close(leaves['kernel'], f'multi_modal_projector.linear_{i}.weight')
    close(leaves['bias'], f'multi_modal_projector.linear_{i}.bias')
  for loaded, file in ((adapters, 'adapter_model.bin'),
                       (connector, 'non_lora_trainables.bin')):
    files.write(tmp_path / 'out' / file, weights.export(
        loaded.layout, loaded.model.config, loaded.params, loaded.dtypes))
    assert bits(tmp_path / 'out' / file) == bits(folder / file)


# ---------------------------------------------------------------------------
# What does not fit


def test_all_that_is_wrong_with_a_file_is_one_error(tmp_path):
  tensors = dict(files.open(FOLDER / 'peft_all'))
  name = 'base_model.model.model.layers.{}.{}.lora_{}.weight'.format
  tensors[name(1, 'mlp.up_proj', 'A')] = np.zeros((4, 36), np.float32)
  del tensors[name(2, 'self_attn.q_proj', 'B')]
  tensors['base_model.model.lm_head.lora_A.weight'] = np.zeros((5, 36), 'f4')
  tensors = {key: x for key, x in tensors.items() if 'down_proj' not in key}
  files.write(tmp_path / 'adapter_model.safetensors', tensors)
  shutil.copy(FOLDER / 'peft_all' / lora.CONFIG, tmp_path)
  with pytest.raises(errors.UserError) as caught:
    weights.load(tmp_path)
  for part in (
      name(1, 'mlp.up_proj', 'A') + ' is [4, 36], not [5, 36]',
      name(2, 'self_attn.q_proj', 'B') + ' is missing',
      'base_model.model.lm_head.lora_A.weight is extra',
      *(name(i, 'mlp.down_proj', side) + ' is missing'
        for i in range(3) for side in 'AB')):
    assert part in str(caught.value), part
  assert str(caught.value).count(';') == 8


@pytest.mark.parametrize('before', [
    '{0}.', '{layer.__class__}.', '{layer:>9999999999}.', '}.', '{layer}.',
    'a b.'])
def test_names_are_no_templates(before, tmp_path):
  files.write(tmp_path / 'adapter_model.safetensors', {
      f'{before}layers.{i}.self_attn.q_proj.lora_{side}.weight': np.zeros(
          (2, 4) if side == 'A' else (4, 2), np.float32)
      for i in range(2) for side in 'AB'})
  shutil.copy(FOLDER / 'peft_heads' / lora.CONFIG, tmp_path)
  with pytest.raises(errors.UserError, match='is of no layout known here'):
    weights.load(tmp_path)


@pytest.mark.parametrize('fields, message', [
    (dict(use_dora=True), 'asks for use_dora=True, which is not supported'),
    (dict(use_rslora=True, bias='all'), "bias='all', use_rslora=True, which"),
    (dict(rank_pattern={'q_proj': 8}), "rank_pattern={'q_proj': 8}"),
    (dict(modules_to_save=['lm_head']), r"modules_to_save=\['lm_head'\]"),
    (dict(init_lora_weights='pissa'), "init_lora_weights='pissa'"),
    (dict(peft_type='IA3'), "peft_type='IA3'"),
    (dict(a_new_option=0.5), 'a_new_option=0.5'),
    (dict(r=-1), 'says r=-1, and the adapters beside it have the rank 16'),
    (dict(lora_alpha=None), r"tell lora.alpha \(numerator.*Say so"),
])
def test_configs_that_ask_for_something_else(fields, message, tmp_path):
  own = json.loads((FOLDER / 'peft_heads' / lora.CONFIG).read_text())
  tensors = files.open(FOLDER / 'peft_heads')
  with pytest.raises(errors.UserError, match=message):
    published_files.recognised(tensors, {lora.CONFIG: own | fields})


def test_what_a_config_does_not_say_is_read_off_or_asked_for():
  tensors = files.open(FOLDER / 'peft_llava' / 'adapter_model.bin')
  layout, config = published_files.recognised(tensors, {}, {
      'lora.alpha': 10, 'lora.dropout': 0.5})
  assert (layout, config.lora.rank, config.lora.dropout) == ('peft', 5, 0.5)
  with pytest.raises(errors.UserError, match='--say=lora.alpha='):
    published_files.recognised(tensors)
  with pytest.raises(errors.UserError, match='lora.rank cannot be said'):
    published_files.recognised(tensors, said={'lora.rank': 3})

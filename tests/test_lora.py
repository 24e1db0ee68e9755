"""Training with low-rank adapters: LLaVA's recipe, whole runs, what they take.

tests/golden/lora_llava.npz is a run of 20 steps of PEFT 0.21.2 (torch 2.13.0,
transformers 4.46.3, float64) on the LlavaForConditionalGeneration whose weights
are in tests/golden/llava_pictures.npz: adapters of rank 5 at all projections of
the decoder, without dropout, and the connector at a tenth of their rate; AdamW
without decay, gradients clipped to 1, transformers' cosine schedule with 2
steps of warm-up. Each step takes three rows of the batch of that file.
"""

import json
import shutil

import flax.traverse_util
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import published_files
import pytest
import reference
import test_emu
import test_llava
import test_train
import tiny_lora

from mmgen import config as config_lib
from mmgen import errors
from mmgen import train as train_lib
from mmgen.training import checkpoint
from mmgen.training import inherit
from mmgen.training import optimizer as optimizer_lib
from mmgen.training import sharding
from mmgen.training import step as step_lib
from mmgen.weights import lora as lora_files

TOLERANCE = 1e-3
# Of LLaVA-1.5 (arXiv 2310.03744, released scripts): rank 128, alpha 256,
# dropout 0.05, adapters at 2e-4 and the connector at 2e-5; all else is fixed.
GROUPS = dict(
    connector=dict(pattern='^connector/', lr_scale=0.1),
    fixed=dict(pattern='^(vision|decoder)/', freeze=True))


def llava_config():
  case = test_llava.CASES['llava_pictures']
  return ml_collections.ConfigDict(dict(
      name='llava', seed=0, steps=20, dtype='float32',
      layout=dict(name='sequence'), objective=dict(name='next_token'),
      model=dict(name='multimodal', vision=dict(name='vit', **case['vision']),
                 connector=dict(name='mlp'), decoder=case['decoder'],
                 lora=dict(rank=5, alpha=10)),
      optimizer=dict(
          name='adamw', peak_lr=1e-2, schedule='cosine', warmup=2,
          warmup_from='zero', min_ratio=0.0, b1=0.9, b2=0.999, eps=1e-8,
          weight_decay=0.0, clip=1.0, groups=GROUPS, accumulate=1))).lock()


def golden_parameters(arrays, prefix):
  """{our name: array} of adapters, and of the connector if it is there."""
  named = {key.removeprefix(prefix).replace('language_model.model', 'model'): x
           for key, x in arrays.items() if key.startswith(prefix)}
  tree = tiny_lora.ours(named, [
      name for name, theirs in tiny_lora.THEIRS.items()
      if f'base_model.model.model.layers.0.{theirs}.lora_A.weight' in named])
  begin = 'base_model.model.multi_modal_projector.linear_'
  if f'{begin}1.weight' in named:
    tree['connector'] = {'up': reference.dense(named, f'{begin}1'),
                         'down': reference.dense(named, f'{begin}2')}
  return sharding.named_leaves(tree)


def test_twenty_steps_equal_the_reference():
  arrays, _ = reference.load('lora_llava')
  config = llava_config()
  _, connected, tower = test_llava.build('llava_pictures')
  model = config_lib.build_model(config)
  batch, places = test_llava.batches('llava_pictures', 'separate')
  rows_of = np.array([places[i][0] for i in range(3)])
  # Of A the run says how it began; B began at zero.
  zeros = {key.replace('lora_A', 'lora_B'): np.zeros(
      arrays[key.replace('init/', 'final/').replace('lora_A', 'lora_B')].shape)
           for key in arrays if key.startswith('init/')}
  start = golden_parameters(arrays | zeros, 'init/')
  params = {**connected, **tower, **flax.traverse_util.unflatten_dict(
      {name: jnp.asarray(x, jnp.float32) for name, x in start.items()},
      sep='/')}
  start |= sharding.named_leaves({'connector': connected['connector']})
  trained, frozen = optimizer_lib.split(params, config.optimizer.groups)
  assert set(trained) == {'connector', 'lora'}
  made = optimizer_lib.make_optimizer(config.optimizer, config.steps, trained)
  state = step_lib.init_state(jax.tree.map(jnp.array, trained), made)
  moments = sharding.named_leaves(state['opt'])
  assert not [name for name in moments if 'decoder' in name or 'vision' in name]
  step = step_lib.make_train_step(
      train_lib.build_objective(config, model), made, config)
  history = []
  with jax.default_matmul_precision('highest'):
    for rows in arrays['rows']:
      picked = {name: x[rows_of[rows]] for name, x in batch.items()}
      state, metrics = step(state, frozen, {'source': picked})
      history.append(jax.device_get(metrics))
  for metric in ('loss', 'grad_norm'):
    np.testing.assert_allclose([m[metric] for m in history], arrays[metric],
                               rtol=TOLERANCE, err_msg=metric)
  final = golden_parameters(arrays, 'final/')
  found = sharding.named_leaves(state['params'])
  assert found.keys() == final.keys() and len(found) == 14 + 4
  for name, want in final.items():
    error, moved = (np.linalg.norm(want - x[name]) for x in (found, start))
    assert error < TOLERANCE * min(np.linalg.norm(want), moved), name


# ---------------------------------------------------------------------------
# Whole runs


def run_config(**fields):
  """Adapters and the map of patches are trained, with dropout."""
  return test_train._config(**{
      'steps': 8, 'eval_every': 0, 'mesh.data': 2, 'mesh.fsdp': 2,
      'mesh.tensor': 2, 'optimizer.groups': {
          'patches': dict(pattern='^vision/', lr_scale=0.1),
          'fixed': dict(pattern='^decoder/', freeze=True)},
      'model.lora': dict(rank=3, alpha=96, dropout=0.25), **fields})


@pytest.fixture(autouse=True)
def fakes_in_place(monkeypatch):
  test_train._install(monkeypatch)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  folder = tmp_path_factory.mktemp('whole')
  with pytest.MonkeyPatch.context() as patch:
    test_train._install(patch)
    result = train_lib.train(run_config(), folder, '')
  return folder, result


def test_only_adapters_and_their_companions_are_trained(whole):
  folder, result = whole
  params = sharding.named_leaves(checkpoint.load_params(folder))
  assert {name.split('/')[0] for name in params} == {
      'decoder', 'lora', 'vision'} == checkpoint.parts(folder)
  trained = {name: x for name, x in params.items()
             if not name.startswith('decoder/')}
  assert result['trained_parameters'] == sum(x.size for x in trained.values())
  stored = (folder / 'checkpoints' / '8' / 'state' / '_METADATA').read_text()
  assert 'lora' in stored and 'decoder' not in stored
  for name, x in trained.items():
    assert x.any(), name  # B began at zero


def test_restart_repeats_the_uninterrupted_run(whole, tmp_path):
  cut = test_train._cut_off(whole[0], tmp_path / 'cut', 4)
  train_lib.train(run_config(), cut, '')
  assert test_train._columns(cut) == test_train._columns(whole[0])
  jax.tree.map(np.testing.assert_array_equal, checkpoint.load_params(cut),
               checkpoint.load_params(whole[0]))


def test_one_device_in_microbatches_agrees_with_eight(
    whole, tmp_path, monkeypatch):
  """Dropout, too, is drawn alike."""
  make = train_lib.sharding.make_mesh
  monkeypatch.setattr(train_lib.sharding, 'make_mesh',
                      lambda config: make(config, jax.devices()[:1]))
  train_lib.train(run_config(**{
      'mesh.data': 1, 'mesh.fsdp': 1, 'mesh.tensor': 1,
      'optimizer.accumulate': 2}), tmp_path, '')
  found, want = (test_train._column(folder, 'loss')
                 for folder in (tmp_path, whole[0]))
  np.testing.assert_allclose(found[0], want[0], rtol=1e-6)
  np.testing.assert_allclose(found, want, rtol=1e-3)


def test_adapters_are_split_over_the_mesh():
  mesh = sharding.make_mesh(dict(data=1, fsdp=4, tensor=2, sequence=1))
  specs = {name: sharding.spec(f'lora/blocks/{name}', shape, mesh.shape)[0]
           for name, shape in (('attention/out/a', (2, 16, 3)),
                               ('mlp/up/b', (2, 3, 32)))}
  P = jax.sharding.PartitionSpec
  assert specs == {'attention/out/a': P(None, 'fsdp', None),
                   'mlp/up/b': P(None, None, 'fsdp')}


# ---------------------------------------------------------------------------
# Starting from others


def test_adapters_start_from_files_and_from_runs(whole, tmp_path):
  mesh = sharding.make_mesh(dict(data=1, fsdp=1, tensor=1, sequence=1),
                            jax.devices()[:1])
  model = tiny_lora.build(tiny_lora.options('all'))
  fresh = sharding.named_leaves(tiny_lora.params(model))
  path = reference.GOLDEN / 'weights' / 'peft_all'
  configs = vars(model.config)
  params, report = inherit.inherit(fresh, {'lora': path}, mesh, None, configs)
  assert report['lora']['layout'] == 'peft' and not report['lora']['differs']
  for name, x in params.items():
    assert name.startswith('lora/') == (x is not fresh[name]), name
  name = 'lora/blocks/mlp/down/b'
  assert report['lora']['tensors'][name]['from'] == [
      'base_model.model.model.layers.{layer}.mlp.down_proj.lora_B.weight']
  # Another factor changes no shape: it is said.
  own = json.loads((path / lora_files.CONFIG).read_text())
  other = shutil.copytree(path, tmp_path / 'other')
  (other / lora_files.CONFIG).write_text(json.dumps(own | dict(lora_alpha=9)))
  _, report = inherit.inherit(fresh, {'lora': other}, mesh, None, configs)
  assert report['lora']['differs'] == ['lora.alpha is 9 there, 7 here']
  # Another rank, and projections without adapters, are one error.
  with pytest.raises(errors.UserError) as caught:
    inherit.inherit(fresh, {'lora': path.with_name('peft_heads')}, mesh, None,
                    configs)
  assert 'lora/blocks/mlp/up/a is only here' in str(caught.value)
  assert 'attention/query/a (base_model' in str(caught.value)
  assert 'is [3, 36, 16] in' in str(caught.value)
  assert str(caught.value).count(';') == 13


def test_no_decoder_leaves_its_adapters_behind(whole, tmp_path):
  mesh = sharding.make_mesh(dict(data=1, fsdp=1, tensor=1, sequence=1),
                            jax.devices()[:1])
  params = sharding.named_leaves(checkpoint.load_params(whole[0]))
  plain = {name: x for name, x in params.items() if not name.startswith('lora')}
  for some, parents in ((plain, {'all': whole[0]}),
                        (plain, {'decoder': whole[0]}),
                        (params, {'decoder': whole[0], 'lora': '/elsewhere'})):
    with pytest.raises(errors.UserError, match='was trained with adapters, '):
      inherit.inherit(some, parents, mesh)
  inherit.inherit(plain, {'vision': whole[0]}, mesh)
  model, params = test_emu.build('emu_oblong')
  params, path = sharding.named_leaves(params), tmp_path / 'emu'
  published_files.save(path, tiny_lora.emu_instruct(
      test_emu.golden('emu_oblong')[1]))
  with pytest.raises(errors.UserError, match='was trained with adapters, .*'
                     'mmgen.convert --merge'):
    inherit.inherit(params, {'all': path}, mesh, None, vars(model.config))


def test_adapters_come_with_their_decoder(whole):
  mesh = sharding.make_mesh(dict(data=1, fsdp=1, tensor=1, sequence=1),
                            jax.devices()[:1])
  params = sharding.named_leaves(checkpoint.load_params(whole[0]))
  for parents in ({'all': whole[0]},
                  {'decoder': whole[0], 'lora': whole[0]}):
    found, _ = inherit.inherit(params, parents, mesh)
    jax.tree.map(np.testing.assert_array_equal, found, params)

"""What the stages of released recipes train, and what they start from."""

import math

import jax
import numpy as np
import pytest

from mmgen import addresses
from mmgen import config as config_lib
from mmgen import train as train_lib
from mmgen.data import corpora
from mmgen.training import checkpoint
from mmgen.training import groups as groups_lib
from mmgen.training import sharding

SECOND = 'decoder/stack/blocks/visual'


def shapes(address):
  """(config, {parameter: its shape}) at true size."""
  config = config_lib.load(address, 'paper')
  model = config_lib.build_model(config, vocab=40)
  return config, sharding.named_leaves(
      config_lib.parameter_shapes(config, model))


def trained(address):
  """{trained parameter: its learning rate}."""
  config, leaves = shapes(address)
  groups = groups_lib.read_groups(config.optimizer.groups)
  group = groups_lib.assign(leaves, groups)
  factors = groups_lib.find_factors(
      {name: leaf for name, leaf in leaves.items()
       if not (group[name] and groups[group[name]].freeze)}, groups, 0.0, None)
  return {name: x.rate * config.optimizer.peak_lr
          for name, x in factors.items()}


def count(leaves, names):
  return sum(math.prod(leaves[name].shape) for name in names)


# ---------------------------------------------------------------------------
# EVEv2


def test_stages_of_eve_v2_train_what_the_released_ones_do():
  of = lambda stage, row='recipes:7b_hd': set(
      trained(f'eve_v2/{row}:{stage}'))
  _, leaves = shapes('eve_v2/recipes:7b_hd')
  vision = {name for name in leaves if name.startswith('vision/')}
  second = {name for name in leaves if name.startswith(SECOND)}
  assert of('prealign') == vision
  assert of('perceive') == of('perceive_hd') == vision | second
  # 28 blocks and the patch layer.
  assert count(leaves, vision | second) == 28 * 233_057_792 + 15_478_272
  assert of('fullalign') == of('sft') == set(leaves)
  assert of('perceive', 'second_set:shared') == vision
  assert of('perceive', 'second_set:norms') == vision | {
      name for name in second if '_norm/' in name}


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  folder = tmp_path_factory.mktemp('data')
  corpora.prepare(folder, 'shapes/tiny', train=16, evaluation=8, vocab=400)
  return folder


def run(address, folder, data, parents=None, **fields):
  """Trains two small steps; returns {parameter: value}."""
  config = config_lib.load(address, overrides={
      'steps': 2, 'checkpoint_every': 2, 'optimizer.warmup': 1,
      'layout.documents': 4, 'model.decoder.layers': 1,
      'model.decoder.width': 16, 'model.decoder.hidden': 16,
      'mix.captions.corpus': 'shapes/tiny', 'mix.captions.split': 'train',
      'evaluators': {}, **fields})
  train_lib.train(config, folder, data, parents)
  return sharding.named_leaves(jax.device_get(checkpoint.load_params(folder)))


def test_the_second_set_starts_as_the_first_and_is_trained_alone(
    tmp_path, data):
  fields = {'model.vision.width': 16, 'model.vision.hidden': 16}
  before = run('eve_v2/recipes:7b_hd:prealign', tmp_path / 'prealign', data,
               init={}, **fields)
  assert not any(name.startswith(SECOND) for name in before)
  after = run('eve_v2/recipes:7b_hd:perceive', tmp_path / 'perceive', data,
              {'all': tmp_path / 'prealign'}, **fields)
  for name, x in after.items():
    old = before[name.replace(SECOND, SECOND.removesuffix('/visual'))]
    if name.startswith(('vision/', SECOND)):
      assert 0 < np.abs(x - old).max() < 1e-2, name
    else:
      np.testing.assert_array_equal(x, old, name)


# ---------------------------------------------------------------------------
# LLaVA-1.5 with low-rank adapters


# Rank 128 times inputs and outputs of seven matrices in 32 and 40 blocks.
@pytest.mark.parametrize('row, adapters', [
    ('7b', 128 * 32 * (8 * 4096 + 3 * (4096 + 11008))),
    ('13b', 128 * 40 * (8 * 5120 + 3 * (5120 + 13824)))])
def test_adapters_and_connector_are_trained_at_rates_of_their_own(
    row, adapters):
  address = f'llava/recipes:{row}_lora:finetune'
  rates = trained(address)
  _, leaves = shapes(address)
  assert set(rates) == {
      name for name in leaves if name.startswith(('lora/', 'connector/'))}
  for name, rate in rates.items():
    assert rate == pytest.approx(2e-4 if name.startswith('lora/') else 2e-5)
  assert count(leaves, [
      name for name in rates if name.startswith('lora/')]) == adapters
  # Nothing is adapted before, so that both share the first stage.
  before, after = (config_lib.load(f'llava/recipes:{name}:pretrain', 'paper')
                   for name in (row, f'{row}_lora'))
  assert set(config_lib.diff(before, after)) == {'name'}


# ---------------------------------------------------------------------------
# EVA-CLIP


def test_towers_of_eva_clip_start_from_published_weights():
  _, leaves = shapes('eva_clip/recipes:b16')
  # The command lines skip text_projection, logit_scale and head.
  towers = {name.split('/')[0] for name in leaves} - {
      'vision_projection', 'text_projection', 'logit_scale'}
  for row in addresses.rows('eva_clip/recipes'):
    config = config_lib.load(f'eva_clip/recipes:{row}', 'paper')
    found = config_lib.files(config)
    if row in ('l14_336', '8b_448'):  # from the whole model of 224 pixels
      assert set(found) == {'all'}
      continue
    assert set(found) == towers == {'vision', 'text'}
    assert found['vision'].name.startswith('EVA')
    assert 'CLIP' not in found['vision'].name
    assert 'clip' in found['text'].name.lower()

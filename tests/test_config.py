"""Rows, overrides, keys and folders of configs."""

import dataclasses
import json

import numpy as np
import pytest

from mmgen import addresses
from mmgen import config as config_lib
from mmgen import errors
from mmgen.models import multimodal
from mmgen.weights import files

EXPERIMENT = '''
import ml_collections

def base(scale):
  c = ml_collections.ConfigDict()
  c.seed = 0
  c.steps = 10 if scale == 'mini' else 1000
  c.log_every = 1
  c.checkpoint_every = 5
  c.eval_every = 0
  c.mix = dict(a=dict(corpus='shapes/tiny', quota=1))
  c.dtype = 'float32'
  c.image = dict(size=(32, 32))
  c.model = dict(name='multimodal',
                 vision=dict(name='linear_patches', patch=8, width=64),
                 connector=dict(name='linear'),
                 decoder=dict(layers=1, width=64, heads=1, hidden=64))
  c.optimizer = dict(
      name='adamw', peak_lr=1e-3, schedule='cosine', warmup=0, b1=0.9, b2=0.95,
      eps=1e-8, weight_decay=0.0, clip=1.0, groups={}, accumulate=1)
  c.evaluators = {}
  c.init = dict(decoder='run:%(path)s:alone:first')
  return c

STAGES = {'first': {'optimizer.peak_lr': 4e-3, 'init': {}},
          'second': {'optimizer.peak_lr': 1e-3}}
ROWS = {
    'plain': {},
    'wide': {'model.decoder.width': 128,
             'paper': {'model.decoder.width': 4096}},
    'late': {'second': {'steps': 77}},
    'alone': {'stages': ('first',)},
    'eve': {'model.vision': dict(name='eve', patch=4, width=64)},
    'typo': {'optimizer.peek_lr': 3.0},
    'model_typo': {'model.vision.pach': 3},
    'no_corpus': {'mix.b': dict(quota=1)},
    'no_evaluator_corpus': {'evaluators.vqa': dict(name='vqa')},
}
'''


@pytest.fixture
def path(tmp_path, monkeypatch):
  file = tmp_path / 'ablation.py'
  file.write_text(EXPERIMENT % dict(path=file))
  monkeypatch.setattr(
      config_lib.corpora, 'manifest', lambda data_dir, name: {'hash': name})
  return str(file)


def test_order_of_overrides(path):
  assert config_lib.load(f'{path}:wide').model.decoder.width == 128
  assert config_lib.load(f'{path}:wide', 'paper').model.decoder.width == 4096
  assert config_lib.load(f'{path}:wide', 'paper').steps == 1000
  assert config_lib.load(f'{path}:late').steps == 77
  assert config_lib.load(f'{path}:late:first').steps == 10
  c = config_lib.load(f'{path}:late:first', overrides=['steps=5'])
  assert c.steps == 5
  assert c.optimizer.peak_lr == 4e-3
  assert config_lib.load(f'{path}:plain', overrides={'steps': 7}).steps == 7


def test_a_dict_replaces_what_it_names(path):
  vision = config_lib.load(f'{path}:eve').model.vision
  assert vision.to_dict() == dict(name='eve', patch=4, width=64)


@pytest.mark.parametrize('text', ['[64, 32]', '(64, 32)', '(64,32)'])
def test_pairs_are_read_as_errors_show_them(path, text):
  c = config_lib.load(f'{path}:plain', overrides=[f'image.size={text}'])
  assert c.image.size == (64, 32)


def test_config_is_locked(path):
  with pytest.raises((AttributeError, KeyError)):
    config_lib.load(f'{path}:plain').stepz = 3


@pytest.mark.parametrize('override, message', [
    ('stepz=3', "Did you mean 'steps'"),
    ('optimizer.peek_lr=3', "Did you mean 'peak_lr'"),
    ('steps=many', 'expected an int'),
    ('steps=1.5', 'expected an int'),
    ('seed=true', 'expected an int'),
    ('steps.more=1', 'is a value'),
    ('steps=0', 'config.steps is 0'),
    ('mix.a.quota=0', 'config.mix.a.quota is 0; allowed: 1 or more'),
    ('image.size=[30, 32]', 'multiples of vision.patch, 8'),
    ('image.size=[32]', 'expected rows and columns'),
    ('image.size=[0, 32]', 'expected rows and columns'),
    ('model.decoder.widht=3', "decoder has no field 'widht'. Did you mean 'wi"),
    ('model.decoder.norm_eps=abc', "norm_eps is 'abc'; expected float"),
    ('model.decoder.norm_eps=NaN', 'norm_eps is nan; expected float'),
    ('model.decoder.vocab=many', "vocab is 'many'; expected int"),
    ('model.decoder.layers=0', 'model.decoder.layers is 0; allowed: 1 or mo'),
    ('model.decoder.heads=0', 'model.decoder.heads is 0; allowed: 1 or more'),
    ('model.decoder.hidden=-4', 'decoder.hidden is -4; allowed: 1 or more'),
    ('model.vision.patch=0', 'model.vision.patch is 0; allowed: 1 or more'),
    ('model.vision.bos=3', 'model.vision.bos is 3; expected str'),
    ('optimizer.accumulate=0', 'optimizer.accumulate is 0; allowed: 1 or more'),
    ('optimizer.peak_lr=-1', 'optimizer.peak_lr is -1.0; allowed: 0 or more'),
    ('optimizer.b2=2', 'b2 is 2.0; allowed: 0 or more and below 1'),
    ('optimizer.clip=-1', 'optimizer.clip is -1.0; allowed: above 0'),
    ('mix.a.view=captions', "config.mix.a.view is 'captions'; allowed: cap"),
    ('mix.a.shuffle_pairs=often', 'expected bool'),
    ('model.name=clop', 'allowed: multimodal, clip'),
    ('model.vision.patch=eight', 'expected an int'),
    ('init.decoder=warm_starts:text', "allowed: 'run:"),
    ('init.x={"y": 1}', "allowed: 'run:"),
    ('model.vision=foo', 'expected a group of fields: name, patch, width'),
    ('evaluators={}', 'expected a group of fields: none so far'),
    ('log_every=0', 'config.log_every is 0; allowed: 1 or more'),
    ('checkpoint_every=0', 'config.checkpoint_every is 0; allowed: 1 or more'),
    ('eval_every=-1', 'config.eval_every is -1; allowed: 0 or more'),
    ('steps=null', 'config.steps is None'),
    ('dtype=float31', "'float31'; allowed: float32, bfloat16"),
    ('mix.extra=3', 'config.mix.extra.corpus is missing'),
    ('evaluators.vqa.corpus=x', 'config.evaluators.vqa.name is missing'),
    ('model.vison.patch=8', "Did you mean 'vision'"),
    ('mixx.a.quota=8', "Did you mean 'mix'"),
])
def test_wrong_override(path, override, message):
  with pytest.raises(errors.UserError, match=message) as caught:
    config_lib.load(f'{path}:plain', overrides=[override])
  assert '\n' not in str(caught.value)


def test_bounds_hold_for_every_way_of_seeing(path):
  with pytest.raises(errors.UserError, match='model.vision.pool is 0; allowed'):
    config_lib.load(f'{path}:eve', overrides=['model.vision.pool=0'])
  with pytest.raises(errors.UserError, match='model.vision.name: None'):
    config_lib.load(f'{path}:plain', overrides={'model.vision': dict(patch=8)})


def test_the_command_line_may_add_entries(path):
  c = config_lib.load(f'{path}:plain', overrides=[
      'mix.extra.quota=2', 'mix.extra.corpus=shapes/tiny',
      'optimizer.groups.eyes.pattern=^vision/',
      'optimizer.groups.eyes.freeze=true'])
  assert c.mix.extra.to_dict() == dict(quota=2, corpus='shapes/tiny')
  assert c.optimizer.groups.eyes.to_dict() == dict(
      pattern='^vision/', freeze=True)
  with pytest.raises(errors.UserError, match='mix.aa.corpus is missing. Did '
                     "you mean 'a'"):
    config_lib.load(f'{path}:plain', overrides=['mix.aa.quota=2'])


@pytest.mark.parametrize('address, message', [
    ('quickstrat:patches', "Did you mean 'quickstart'"),
    ('quickstart:patchez', "Did you mean 'patches'"),
    ('quickstart', 'names no row'),
    ('quickstart:patches:tarin', "Did you mean 'train'"),
    ('quickstart:a:b:c', 'not of the form'),
])
def test_wrong_address(address, message):
  with pytest.raises(errors.UserError, match=message):
    config_lib.load(address)


@pytest.mark.parametrize('old, new, message', [
    ('c.seed = 0', 'c.seed = ', 'line 6: SyntaxError: invalid syntax'),
    ("ROWS = {", "ROWS = {**missing,", "line 27: NameError: name 'missing' is"),
    ('c.seed = 0', 'c.seed = 1 / 0', 'line 6: ZeroDivisionError: division by'),
    ('c.seed = 0', 'c.update(5, 6)', 'line 6: TypeError'),
])
def test_a_broken_file_is_named_with_its_line(path, old, new, message):
  with open(path) as file:
    text = file.read()
  assert text.count(old) == 1
  with open(path, 'w') as file:
    file.write(text.replace(old, new))
  addresses.experiment.cache_clear()
  with pytest.raises(errors.UserError) as caught:
    config_lib.load(f'{path}:plain')
  assert str(caught.value).startswith(f'your file {path}, {message}')
  assert '\n' not in str(caught.value)


def test_a_row_with_a_typo_is_refused(path):
  with pytest.raises(errors.UserError, match="Did you mean 'peak_lr'"):
    config_lib.load(f'{path}:typo')
  with pytest.raises(errors.UserError, match="'pach'. Did you mean 'patch'"):
    config_lib.load(f'{path}:model_typo')
  with pytest.raises(errors.UserError, match='config.mix.b.corpus is missing'):
    config_lib.load(f'{path}:no_corpus')
  with pytest.raises(errors.UserError, match='config.evaluators.vqa.corpus is'):
    config_lib.load(f'{path}:no_evaluator_corpus')


def test_stages_chain(path):
  c = config_lib.load(f'{path}:plain', seed=5)
  assert c.name == f'{path}:plain:second'
  assert config_lib.parents(c) == {'all': (f'{path}:plain:first', 5)}
  first = config_lib.load(f'{path}:plain:first')
  assert config_lib.parents(first) == {}
  assert addresses.stages(f'{path}:plain') == [
      f'{path}:plain:first', f'{path}:plain:second']


def test_flatten_round_trip(path):
  c = config_lib.load(f'{path}:eve')
  flat = json.loads(json.dumps(config_lib.flatten(c)))
  assert config_lib.diff(c, config_lib.unflatten(flat)) == {}
  assert config_lib.diff(c, config_lib.load(f'{path}:plain'))[
      'model.vision.name'] == ('eve', 'linear_patches')


def test_key_follows_what_decides_numbers(path, monkeypatch):
  def key(row='plain', **kw):
    return config_lib.run_key(config_lib.load(f'{path}:{row}', **kw), 'data')
  assert key() == key(overrides=['log_every=7'])
  assert key() != key(seed=1)
  assert key() != key(overrides=['optimizer.peak_lr=0.5'])
  # The rows differ in their second stage only, so they share the first.
  assert key('plain:first') == key('late:first')
  assert key('plain') != key('late')
  # A change in a parent reaches the child.
  before = key()
  monkeypatch.setitem(
      addresses.experiment(path).STAGES['first'], 'steps', 11)
  assert key() != before
  before = key()
  monkeypatch.setattr(config_lib, 'RESULT_VERSION', 10**6)
  assert key() != before
  before = key()
  monkeypatch.setitem(config_lib.BUILDERS, 'multimodal', _deeper)
  assert key() != before  # what a published size stands for was changed
  before = key()
  monkeypatch.setattr(
      config_lib.corpora, 'manifest', lambda data_dir, name: {'hash': 'new'})
  assert key() != before


def test_key_follows_what_a_file_holds(path, tmp_path):
  def key(file, part='decoder'):
    return config_lib.run_key(config_lib.load(f'{path}:plain:first', overrides=[
        f'init.decoder=file:{tmp_path}/{file}#{part}']), 'data')
  def write(file, **changes):
    files.write(tmp_path / file, dict(
        dict(a=np.zeros((3, 5), np.float32), b=np.ones(2, np.float32)),
        **changes))
    return file
  first = key(write('a.safetensors'))
  (tmp_path / 'elsewhere').mkdir()
  assert key(write('elsewhere/b.safetensors')) == first  # wherever it lies
  assert key('a.safetensors', 'other') != first
  keys = {first, *(key(write('a.safetensors', **changes)) for changes in (
      dict(a=np.zeros((5, 3), np.float32)), dict(b=np.ones(2, np.int32)),
      dict(b=np.full(2, 1.5, np.float32)), dict(c=np.zeros(0, np.float32))))}
  assert len(keys) == 5
  assert key(write('a.safetensors')) == first
  # Of what is compressed only the size is looked at.
  np.savez_compressed(tmp_path / 'c.npz', a=np.zeros(999, np.float32))
  keys = {key('c.npz')}
  np.savez_compressed(tmp_path / 'c.npz', a=np.arange(999, dtype=np.float32))
  assert key('c.npz') not in keys
  with pytest.raises(errors.UserError, match='config.init.decoder: cannot read '
                     'weights from .*none: No such file'):
    key('none')


def test_key_follows_what_a_folder_of_a_run_holds(path, tmp_path):
  state = tmp_path / 'run' / 'checkpoints' / '3' / 'state'
  state.mkdir(parents=True)
  (state / 'array').write_bytes(b'abc')
  keys = {config_lib.file_key(tmp_path / 'run')}
  (tmp_path / 'run').rename(tmp_path / 'moved')
  assert config_lib.file_key(tmp_path / 'moved') in keys
  (tmp_path / 'moved' / 'config.json').write_text('{}')
  keys.add(config_lib.file_key(tmp_path / 'moved'))
  (tmp_path / 'moved' / 'checkpoints' / '3' / 'state' / 'array').write_bytes(
      b'abcd')
  keys.add(config_lib.file_key(tmp_path / 'moved'))
  assert len(keys) == 3


def test_an_option_that_a_run_leaves_alone_is_not_in_its_key():
  @dataclasses.dataclass(frozen=True)
  class Inner:
    width: int
    bias: bool = False

  @dataclasses.dataclass(frozen=True)
  class Outer:
    inner: Inner
    tap: int = -2

  assert config_lib._settings(Outer(Inner(8))) == {'inner': {'width': 8}}
  assert config_lib._settings(Outer(Inner(8, True), -1)) == {
      'inner': {'width': 8, 'bias': True}, 'tap': -1}


def _deeper(config, vocab):
  config = config.copy_and_resolve_references().unlock()
  config.model.decoder.layers += 1
  return multimodal.build(config, vocab)


def test_a_score_has_a_key_of_its_own(path, monkeypatch):
  def keys(*overrides):
    c = config_lib.load(f'{path}:plain', overrides=[
        'evaluators.vqa.name=vqa', 'evaluators.vqa.corpus=a', *overrides])
    return (config_lib.run_key(c, 'data'),
            config_lib.evaluation_key(c, 'data'))
  run, evaluation = keys()
  examples = 'evaluators.vqa.examples=77'
  assert keys('optimizer.peak_lr=0.5')[1] == evaluation
  assert keys(examples)[0] == run and keys(examples)[1] != evaluation
  # A run that is followed while it learns has its scores in its curves.
  assert keys('eval_every=2', examples)[0] != keys('eval_every=2')[0]
  monkeypatch.setattr(config_lib.evaluation, 'VERSION', 10**6)
  assert keys()[0] == run and keys()[1] != evaluation


def test_rows_with_one_prefix_share_its_folder(path, tmp_path):
  first = config_lib.load(f'{path}:plain:first')
  folder = config_lib.run_folder(first, tmp_path / 'runs', 'data')
  folder.mkdir(parents=True)
  other = config_lib.load(f'{path}:late:first')
  assert config_lib.run_folder(other, tmp_path / 'runs', 'data') == folder


def test_a_file_is_no_workdir(path, tmp_path):
  (tmp_path / 'runs').write_text('')
  with pytest.raises(errors.UserError, match='runs is a file; give a folder'):
    config_lib.run_folder(
        config_lib.load(f'{path}:plain:first'), tmp_path / 'runs', 'data')

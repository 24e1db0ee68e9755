"""Parts of others: what is taken, what grows, what does not fit."""

import dataclasses
import io
import json
import logging
import pathlib

import flax.traverse_util
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import sentencepiece

from mmgen import config as config_lib
from mmgen import errors
from mmgen import train as train_lib
from mmgen import weights
from mmgen.data import text
from mmgen.models import positions
from mmgen.models import vision_encoder
from mmgen.training import checkpoint
from mmgen.training import inherit
from mmgen.training import sharding
from mmgen.weights import files

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden' / 'weights'


def _mesh():
  return sharding.make_mesh(dict(data=1, fsdp=8, tensor=1, sequence=1))


def _params(value, vocab=16, hidden=8, **more):
  """{name: array}, in place on the mesh."""
  flat = {
      'decoder/embedding': (vocab, 8), 'decoder/head/kernel': (8, vocab),
      'decoder/mlp/up/kernel': (2, 8, hidden), 'vision/scale': (3,), **more}
  mesh = _mesh()
  layouts = sharding.shardings(mesh, {
      name: jax.ShapeDtypeStruct(shape, jnp.float32)
      for name, shape in flat.items()})
  return {name: jax.device_put(jnp.full(shape, value), layouts[name])
          for name, shape in flat.items()}


@pytest.fixture(scope='module')
def parent(tmp_path_factory):
  folder = tmp_path_factory.mktemp('parent')
  checkpointer = checkpoint.Checkpointer(folder)
  checkpointer.save(3, {'params': _params(1.0, **{'head/bias': (2,)})}, {}, b'')
  checkpointer.close()
  return folder


def _values(params):
  return {name: sorted(set(np.ravel(x).tolist())) for name, x in params.items()}


def test_a_part_is_taken_and_the_rest_left_alone(parent):
  fresh = _params(0.0)
  params, report = inherit.inherit(fresh, {'decoder': parent}, _mesh())
  assert _values(params) == {
      'decoder/embedding': [1], 'decoder/head/kernel': [1],
      'decoder/mlp/up/kernel': [1], 'vision/scale': [0]}
  assert all(params[name].sharding == fresh[name].sharding for name in params)
  assert report == {'decoder': {
      'from': str(parent), 'part': 'decoder',
      'grown': [], 'resized': [], 'fresh': [], 'unused': [],
      'copied': ['decoder/embedding', 'decoder/head/kernel',
                 'decoder/mlp/up/kernel']}}


def test_a_second_set_starts_as_the_first(parent):
  fresh = _params(0.0, **{'decoder/visual/mlp/up/kernel': (2, 8, 8)})
  params, report = inherit.inherit(fresh, {'decoder': parent}, _mesh())
  first, second = (params[f'decoder/{part}mlp/up/kernel']
                   for part in ('', 'visual/'))
  np.testing.assert_array_equal(first, second)
  assert np.all(first == 1) and first.sharding == second.sharding
  # Not one array twice: a step could not give it away.
  assert (first.addressable_shards[0].data.unsafe_buffer_pointer()
          != second.addressable_shards[0].data.unsafe_buffer_pointer())
  assert 'decoder/visual/mlp/up/kernel' in report['decoder']['copied']
  with pytest.raises(errors.UserError, match='visual/mlp/up/kernel is .*8, 9'):
    inherit.inherit(fresh | _params(0.0, **{
        'decoder/visual/mlp/up/kernel': (2, 8, 9)}), {'decoder': parent},
                    _mesh())


def test_a_part_of_another_name(parent):
  fresh = {name.replace('vision/', 'teacher/'): leaf
           for name, leaf in _params(0.0).items()}
  params, report = inherit.inherit(
      fresh, {'teacher': parent}, _mesh(), {'teacher': 'vision'})
  assert _values(params)['teacher/scale'] == [1]
  assert _values(params)['decoder/embedding'] == [0]
  assert report['teacher']['copied'] == ['teacher/scale']
  assert report['teacher']['part'] == 'vision'


def test_all_takes_what_is_shared_and_lists_the_rest(parent):
  fresh = _params(0.0, **{'connector/bias': (4,)})
  params, report = inherit.inherit(fresh, {'all': parent}, _mesh())
  assert _values(params)['vision/scale'] == [1]
  assert _values(params)['connector/bias'] == [0]
  assert report['all']['fresh'] == ['connector/bias']
  assert report['all']['unused'] == ['head/bias']


def test_a_named_part_wins_over_all(parent, tmp_path):
  checkpointer = checkpoint.Checkpointer(tmp_path)
  checkpointer.save(1, {'params': _params(2.0)}, {}, b'')
  checkpointer.close()
  params, _ = inherit.inherit(
      _params(0.0), {'vision': tmp_path, 'all': parent}, _mesh())
  assert _values(params)['vision/scale'] == [2]
  assert _values(params)['decoder/embedding'] == [1]


def test_a_grown_vocabulary_keeps_fresh_rows(parent):
  params, report = inherit.inherit(
      _params(0.0, vocab=24), {'decoder': parent}, _mesh())
  embedding = np.asarray(params['decoder/embedding'])
  assert embedding[:16].min() == 1 and embedding[16:].max() == 0
  head = np.asarray(params['decoder/head/kernel'])
  assert head[:, :16].min() == 1 and head[:, 16:].max() == 0
  assert report['decoder']['grown'] == [
      'decoder/embedding', 'decoder/head/kernel']


def test_misfits_are_all_listed(parent):
  fresh = _params(0.0, vocab=8, hidden=16, **{'decoder/bias': (1,)})
  with pytest.raises(errors.UserError) as caught:
    inherit.inherit(fresh, {'decoder': parent}, _mesh())
  text = str(caught.value)
  assert f'decoder/mlp/up/kernel is [2, 8, 8] in {parent}, [2, 8, 16] here' in (
      text)
  assert 'decoder/embedding is [16, 8]' in text  # a smaller one is no growth
  assert 'decoder/bias is only here' in text and '\n' not in text


def test_a_part_that_nobody_has_is_a_user_error(parent):
  with pytest.raises(errors.UserError, match="no part 'decodr'; its parts: d"):
    inherit.inherit(_params(0.0), {'decodr': parent}, _mesh())
  with pytest.raises(errors.UserError, match="has no part 'connector'"):
    inherit.inherit(_params(0.0, **{'connector/bias': (4,)}),
                    {'connector': parent}, _mesh())


def test_a_vocabulary_of_other_meanings_is_refused(tmp_path):
  texts = ['a fox on a blue ground', 'two owls', 'is there a bus?'] * 20
  old, retrained, other = (text.Tokenizer.from_bytes(text.train(t, size))
                           for t, size in ((texts, 295), (texts, 305),
                                           ([t[::-1] for t in texts], 295)))
  checkpointer = checkpoint.Checkpointer(tmp_path)
  checkpointer.save(1, {'params': _params(1.0)}, {}, old.bytes)
  checkpointer.close()
  fresh = _params(0.0)
  inherit.check_vocabulary(fresh, {'all': tmp_path}, old)
  inherit.check_vocabulary(fresh, {'vision': tmp_path}, other)
  for part in ('decoder', 'all'):
    for tokenizer in (retrained, other):  # the letters come last, and moved
      with pytest.raises(errors.UserError, match='mean something else here'):
        inherit.check_vocabulary(fresh, {part: tmp_path}, tokenizer)


# ---------------------------------------------------------------------------
# Published weights: names and shapes as transformers' CLIPModel has them

W, HEADS, HIDDEN, LAYERS, PATCH, VOCAB = 16, 2, 32, 2, 4, 24


def _hf_shapes():
  shapes = {
      'logit_scale': (), 'visual_projection.weight': (8, W),
      'text_projection.weight': (8, W),
      'vision_model.embeddings.class_embedding': (W,),
      'vision_model.embeddings.patch_embedding.weight': (W, 3, PATCH, PATCH),
      'vision_model.embeddings.position_embedding.weight': (5, W),
      'text_model.embeddings.token_embedding.weight': (VOCAB, W),
      'text_model.embeddings.position_embedding.weight': (6, W)}
  norms = ['vision_model.pre_layrnorm', 'vision_model.post_layernorm',
           'text_model.final_layer_norm']
  for tower in ('vision', 'text'):
    for layer in range(LAYERS):
      block = f'{tower}_model.encoder.layers.{layer}'
      norms += [f'{block}.layer_norm1', f'{block}.layer_norm2']
      for name in ('q_proj', 'k_proj', 'v_proj', 'out_proj'):
        shapes |= {f'{block}.self_attn.{name}.weight': (W, W),
                   f'{block}.self_attn.{name}.bias': (W,)}
      shapes |= {f'{block}.mlp.fc1.weight': (HIDDEN, W),
                 f'{block}.mlp.fc1.bias': (HIDDEN,),
                 f'{block}.mlp.fc2.weight': (W, HIDDEN),
                 f'{block}.mlp.fc2.bias': (W,)}
  for norm in norms:
    shapes |= {f'{norm}.weight': (W,), f'{norm}.bias': (W,)}
  return shapes


@pytest.fixture(scope='module')
def tensors():
  rng = np.random.default_rng(0)
  return {name: rng.normal(size=shape).astype(np.float16)
          for name, shape in _hf_shapes().items()}


def _hf_config(mlp='quick_gelu'):
  tower = dict(hidden_act=mlp, num_attention_heads=HEADS)
  return json.dumps(dict(
      model_type='clip', text_config=tower,
      vision_config=dict(tower, image_size=8)))


@pytest.fixture(scope='module')
def published(tensors, tmp_path_factory):
  """A folder as it is published: shards, their index and a config."""
  folder = tmp_path_factory.mktemp('clip')
  files.write(folder, tensors, max_shard_bytes=10_000)
  (folder / 'config.json').write_text(_hf_config())
  return folder


def _expected(tensors, part):
  """What a vision tower `part` makes of the tensors, by hand."""
  get = lambda name: tensors[f'vision_model.{name}'].astype(np.float32)
  found = {
      'class_embedding': get('embeddings.class_embedding'),
      'position_embedding': get('embeddings.position_embedding.weight'),
      'patch_embedding/kernel': get('embeddings.patch_embedding.weight')
                                .transpose(2, 3, 1, 0).reshape(-1, W)}
  for ours, theirs in (('pre_norm', 'pre_layrnorm'),
                       ('stack/final_norm', 'post_layernorm')):
    found |= {f'{ours}/scale': get(f'{theirs}.weight'),
              f'{ours}/bias': get(f'{theirs}.bias')}
  for ours, theirs in (
      ('attention/query', 'self_attn.q_proj'),
      ('attention/key', 'self_attn.k_proj'),
      ('attention/value', 'self_attn.v_proj'),
      ('attention/out', 'self_attn.out_proj'),
      ('mlp/up', 'mlp.fc1'), ('mlp/down', 'mlp.fc2'),
      ('attention_norm', 'layer_norm1'), ('mlp_norm', 'layer_norm2')):
    leaf = 'scale' if ours.endswith('norm') else 'kernel'
    layers = [f'encoder.layers.{layer}.{theirs}' for layer in range(LAYERS)]
    found[f'stack/blocks/{ours}/{leaf}'] = np.stack(
        [get(f'{layer}.weight').T for layer in layers])
    found[f'stack/blocks/{ours}/bias'] = np.stack(
        [get(f'{layer}.bias') for layer in layers])
  return {f'{part}/{name}': x for name, x in found.items()}


_TOWER = dict(layers=LAYERS, width=W, heads=HEADS, hidden=HIDDEN,
              mlp='quick_gelu')
_VISION = dict(_TOWER, image_size=(8, 8), patch=PATCH)
_DECODER = dict(layers=1, width=16, heads=2, hidden=32)
MODELS = {
    'clip': dict(
        model=dict(name='clip', size='mini', embed=8, vision=_VISION,
                   text=dict(_TOWER, length=6)),
        objective=dict(name='contrastive'), layout=dict(name='pair')),
    'multimodal': dict(
        model=dict(name='multimodal', vision=dict(_VISION, name='vit'),
                   connector=dict(name='linear'), decoder=_DECODER),
        objective=dict(name='next_token'), layout=dict(name='sequence')),
}


def _config(model, init, **fields):
  config = ml_collections.ConfigDict(dict(
      MODELS[model], name='toy', dtype='float32', init=init))
  with config.ignore_type():
    config.update_from_flattened_dict(fields)
  return config.lock()


def _devices(count):
  if count == 1:
    return sharding.make_mesh(
        dict(data=1, fsdp=1, tensor=1, sequence=1), jax.devices()[:1])
  return sharding.make_mesh(dict(data=2, fsdp=2, tensor=2, sequence=1))


class Words:
  bytes = b'words'

  def __init__(self, vocab_size=VOCAB):
    self.vocab_size = vocab_size

  def pieces(self, ids):
    return [f'w{i}' for i in ids]


def _birth(config, vocab):
  model = config_lib.build_model(config, vocab)
  B, T = 1, 6
  slots = jnp.zeros((B, T), jnp.int32)
  size = config.model.vision.image_size
  batch = (dict(images=jnp.zeros((B, *size, 3), jnp.uint8), tokens=slots,
                valid=slots == 0) if config.model.name == 'clip' else
           dict(images=jnp.zeros((B, 1, *size, 3), jnp.uint8), tokens=slots,
                segments=slots, positions=slots, visual=slots,
                image_box=jnp.zeros((B, 1, 4), jnp.int32)))
  return lambda key: model.init(key, batch)['params']


WORDS = Words()


def _start(config, folder, devices=1, tokenizer=WORDS):
  """Starts a run; returns ({name: fresh}, {name: as started}, report)."""
  mesh = _devices(devices)
  fresh = sharding.init_sharded(
      mesh, _birth(config, tokenizer.vocab_size), jax.random.key(1))
  checkpointer, state, _, _ = train_lib._start(
      config, folder, mesh, tokenizer, {'params': fresh}, {},
      train_lib.parent_folders(config, '', ''))
  checkpointer.close()
  report = json.loads((folder / 'init_report.json').read_text())
  return (sharding.named_leaves(fresh),
          sharding.named_leaves(state['params']), report)


@pytest.mark.parametrize('devices', [1, 8])
@pytest.mark.parametrize('model', MODELS)
def test_a_vision_tower_starts_from_a_published_one(
    model, devices, tensors, published, tmp_path, monkeypatch):
  monkeypatch.chdir(published.parent)
  config = _config(model, {'vision': f'file:{published.name}#vision'})
  fresh, started, report = _start(config, tmp_path, devices)
  expected = _expected(tensors, 'vision')
  assert {n for n in fresh if n.startswith('vision/')} == expected.keys()
  split = 0
  for name, leaf in started.items():
    np.testing.assert_array_equal(
        leaf, expected.get(name, np.asarray(fresh[name])), err_msg=name)
    assert leaf.sharding == fresh[name].sharding and leaf.dtype == np.float32
    split += name in expected and not leaf.is_fully_replicated
  assert (split > 5) == (devices > 1)
  report = report['vision']
  assert report['copied'] == sorted(expected) and not report['differs']
  assert (report['from'], report['layout']) == (published.name, 'hf_clip')
  assert report['tensors'].keys() == expected.keys()
  assert report['tensors']['vision/stack/blocks/mlp/up/kernel'] == {
      'from': ['vision_model.encoder.layers.{layer}.mlp.fc1.weight'],
      'shape': [LAYERS, W, HIDDEN], 'dtype': 'float16'}


@pytest.mark.parametrize('model, part', [
    ('clip', 'vision'), ('clip', 'all'), ('multimodal', 'vision')])
def test_positions_are_resized_to_another_grid(
    model, part, tensors, published, tmp_path):
  size = {'model.vision.image_size': (17, 12)}
  config = _config(model, {part: f'file:{published}'}, **size)
  fresh, started, report = _start(config, tmp_path / 'run', 8)
  name = 'vision/position_embedding'
  theirs = tensors['vision_model.embeddings.position_embedding.weight']
  table = positions.resize_positions(
      theirs.astype(np.float32), (2, 2), (4, 3), 'plain')
  np.testing.assert_array_equal(started[name], table)
  np.testing.assert_array_equal(started[name][0], theirs[0])
  assert started[name].sharding == fresh[name].sharding
  assert report[part]['resized'] == [name]
  assert report[part]['tensors'][name]['shape'] == [5, W]
  assert report[part]['copied'] and name not in report[part]['copied']
  # And on, from the checkpoint of that run; of as many cells, too.
  for layout, method in (None, 'plain'), ('openai_clip', 'antialias'):
    folder = tmp_path / str(layout)
    checkpointer = checkpoint.Checkpointer(folder)
    notes = dict(weights=dict(layout=layout)) if layout else {}
    checkpointer.save(1, {'params': started}, dict(
        config={'image.size': [17, 12]}, **notes), b'')
    checkpointer.close()
    for grid in (2, 3), (6, 2), (4, 3):
      wanted = {key: jax.device_put(
          jnp.zeros((grid[0] * grid[1] + 1, W)) if key == name else leaf,
          leaf.sharding) for key, leaf in started.items()
                if key.startswith('vision/')}
      tower = train_lib._part_configs(config, VOCAB)['vision']
      tower = dataclasses.replace(
          tower, image_size=tuple(PATCH * side for side in grid))
      params, report = inherit.inherit(
          wanted, {'vision': folder}, _devices(8), None, {'vision': tower})
      same = grid == (4, 3)
      assert report['vision']['resized'] == [name] * (not same)
      np.testing.assert_array_equal(params[name], table if same else
                                    positions.resize_positions(
                                        table, (4, 3), grid, method))


def test_positions_of_an_unknown_grid_do_not_fit(tmp_path):
  name = 'vision/position_embedding'
  checkpointer = checkpoint.Checkpointer(tmp_path)
  checkpointer.save(1, {'params': {name: jnp.zeros((5, 8))}}, {}, b'')
  checkpointer.close()
  tower = vision_encoder.sized('mini', image_size=(24, 24))
  with pytest.raises(errors.UserError, match=r'embedding is \[5, 8\] in .*\['
                     '10, 8'):
    inherit.inherit({name: jnp.zeros((10, 8))}, {'vision': tmp_path},
                    _devices(1), None, {'vision': tower})


def test_a_part_of_another_name_and_no_more_is_read(
    tensors, published, monkeypatch):
  read, array = [], files.Tensor.array
  def spy(self):
    read.append(self)
    return array(self)
  monkeypatch.setattr(files.Tensor, 'array', spy)
  expected = _expected(tensors, 'teacher')
  fresh = {name: jnp.zeros(x.shape) for name, x in expected.items()}
  params, _ = inherit.inherit(
      fresh, {'teacher': published}, _devices(1), {'teacher': 'vision'})
  jax.tree.map(np.testing.assert_array_equal, params, expected)
  names = {tensor: name for name, tensor in files.open(published).items()}
  assert {names[tensor] for tensor in read} == {
      name for name in tensors if name.startswith('vision_model.')}


def test_all_that_is_shared_and_a_grown_vocabulary(
    tensors, published, tmp_path):
  config = _config('clip', {'all': f'file:{published}'})
  fresh, started, report = _start(config, tmp_path, 8, Words(VOCAB + 8))
  name = 'text/token_embedding/embedding'
  theirs = tensors['text_model.embeddings.token_embedding.weight']
  np.testing.assert_array_equal(started[name][:VOCAB], theirs)
  np.testing.assert_array_equal(started[name][VOCAB:], fresh[name][VOCAB:])
  assert started[name].sharding == fresh[name].sharding
  np.testing.assert_array_equal(
      started['logit_scale'], tensors['logit_scale'].astype(np.float32))
  report = report['all']
  assert report['grown'] == [name] and not report['fresh'] + report['unused']
  assert len(report['copied']) == len(started) - 1


def test_weights_that_tell_less_are_answered_by_the_model(
    tensors, tmp_path, caplog):
  files.write(tmp_path / 'bare.safetensors', tensors)
  for model in MODELS:
    config = _config(model, {'vision': f'file:{tmp_path}/bare.safetensors'})
    _, started, report = _start(config, tmp_path / model)
    np.testing.assert_array_equal(
        started['vision/class_embedding'],
        tensors['vision_model.embeddings.class_embedding'])
    assert report['vision']['differs'] == []
  # What they do tell is not overridden, but compared.
  (tmp_path / 'config.json').write_text(_hf_config('gelu'))
  with caplog.at_level(logging.WARNING):
    _, _, report = _start(config, tmp_path / 'told')
  line = "vision.mlp is 'gelu' there, 'quick_gelu' here"
  assert report['vision']['differs'] == [line] and line in caplog.text


def test_other_formats_and_a_head_that_is_not_needed():
  for name in ('open_clip_square.pt', 'hf_siglip', 'big_vision.npz'):
    said = {'mlp': 'gelu', 'vision.image_size': [15, 15], 'vision.heads': 3,
            'text.heads': 5} if name.endswith('.pt') else {}
    if name.endswith('.npz'):
      said = {'vision.image_size': [13, 13]}
    loaded = weights.load(GOLDEN / name, said=said)
    flat = flax.traverse_util.flatten_dict(loaded.params, sep='/')
    wanted = {key: x for key, x in flat.items() if key.startswith('vision/')
              and not key.startswith('vision/head')}
    params, report = inherit.inherit(
        jax.tree.map(jnp.zeros_like, wanted), {'vision': GOLDEN / name},
        _devices(1), None, {'vision': loaded.model.config.vision})
    jax.tree.map(np.testing.assert_array_equal, params, wanted)
    head = [key for key in flat if key.startswith('vision/head')]
    assert report['vision']['unused'] == sorted(head)
    assert bool(head) == (name != 'open_clip_square.pt')


def test_what_nothing_answers_is_asked_for():
  with pytest.raises(errors.UserError, match='^config.init.text: .*image_size.*'
                     'mmgen.convert; the folder that it makes can stand here'):
    inherit.inherit({'text/scale': jnp.zeros(2)},
                    {'text': GOLDEN / 'open_clip_oblong.pt'}, _devices(1))


def test_weights_that_do_not_fit_are_one_line(tensors, published, tmp_path,
                                              monkeypatch):
  monkeypatch.setattr(files.Tensor, 'array', None)  # nothing is read
  def refused(origin, **fields):
    config = _config('clip', {'vision': origin}, **fields)
    shapes = jax.eval_shape(_birth(config, VOCAB), jax.random.key(1))
    with pytest.raises(errors.UserError) as caught:
      inherit.inherit(
          sharding.named_leaves(shapes), config_lib.files(config), _devices(8),
          config_lib.source_parts(config),
          train_lib._part_configs(config, VOCAB))
    assert '\n' not in str(caught.value)
    return str(caught.value)

  lines = refused(f'file:{published}', **{
      'model.vision.hidden': 48, 'model.vision.pre_norm': False})
  assert ('vision/stack/blocks/mlp/up/kernel (vision_model.encoder.layers.'
          f'{{layer}}.mlp.fc1.weight) is [2, 16, 32] in {published}, '
          '[2, 16, 48] here') in lines
  assert 'vision/stack/blocks/mlp/down/kernel' in lines
  assert ('vision/pre_norm/scale (vision_model.pre_layrnorm.weight) is only in '
          f'{published}') in lines
  assert ('vision/patch_embedding/bias is only here (nearest there: '
          'vision/pre_norm/bias)') in refused(f'file:{published}', **{
              'model.vision.stem_bias': True, 'model.vision.pre_norm': False})
  assert 'has no part \'eyes\'; its parts: logit_scale, text, ' in refused(
      f'file:{published}#eyes')
  assert refused(f'file:{tmp_path}/none').startswith(
      f'config.init.vision: cannot read weights from {tmp_path}/none: No such')
  odd = dict(tensors)
  odd['vision_model.post_layer_norm.weight'] = odd.pop(
      'vision_model.post_layernorm.weight')
  odd['text_projection.weight'] = np.zeros((9, W), np.float16)
  files.write(tmp_path / 'odd', odd)
  (tmp_path / 'odd' / 'config.json').write_text(_hf_config())
  line = refused(f'file:{tmp_path}/odd')
  assert line.startswith(f'config.init.vision: {tmp_path}/odd does not fit')
  assert ('vision_model.post_layernorm.weight is missing (nearest there: '
          'vision_model.post_layer_norm.weight)') in line
  assert 'visual_projection.weight is [8, 16], not [9, 16]' in line


def test_a_folder_made_of_weights_needs_no_tokenizer(tmp_path, caplog):
  checkpointer = checkpoint.Checkpointer(tmp_path)
  checkpointer.save(0, {'params': _params(1.0)}, {}, b'')
  checkpointer.close()
  with caplog.at_level(logging.WARNING):
    inherit.check_vocabulary(_params(0.0), {'decoder': tmp_path}, Words())
  assert 'has no tokenizer to compare' in caplog.text


def test_the_tokenizer_beside_weights_is_compared(tmp_path, caplog):
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(['a fox', 'two owls', 'a red bus'] * 9),
      model_writer=model, vocab_size=18, minloglevel=2)
  file = tmp_path / 'tokenizer.model'
  def check(tokenizer, parts=('text',)):
    caplog.clear()
    with caplog.at_level(logging.WARNING):
      inherit.check_vocabulary(
          {'text/token_embedding/embedding': 0, 'vision/scale': 0},
          dict.fromkeys(parts, tmp_path / 'model.safetensors'), tokenizer)
    return caplog.text
  assert 'has no tokenizer to compare' in check(Words())
  file.write_bytes(b'nonsense')
  assert 'tokenizer.model cannot be read' in check(Words())
  file.write_bytes(model.getvalue())
  assert not check(inherit.published_text.Tokenizer(model.getvalue()))
  assert not check(Words(), parts=('vision',))
  with pytest.raises(errors.UserError, match='18 of 18 ids mean something els'):
    check(Words())

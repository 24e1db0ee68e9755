"""Tests of mmgen.look."""

import base64
import html.parser
import io
import re

import fakes
import ml_collections
import numpy as np
from PIL import Image
import pytest

from mmgen import config as config_lib
from mmgen import errors
from mmgen import look
from mmgen.data import layout
from mmgen.data import pipeline as pipeline_lib

EVE = layout.ImageLayout(2, 3, class_slot=True, newline='table', border=True)


def config(name='sequence', **mix):
  return ml_collections.ConfigDict(dict(
      name='drawn:patches:train', scale='mini', seed=0, mix=mix,
      layout=dict(name=name, length=48, rows=2, documents=5, images=2),
      image=dict(size=(4, 6), fit='square', kernel='bicubic')))


def pipeline(c, records=None):
  return pipeline_lib.Pipeline(
      c, '', EVE, fakes.Letters(),
      open_split=fakes.opener(one=records or fakes.Records(17)))


class Reader(html.parser.HTMLParser):
  """Collects (tag, attributes), and checks that tags are closed in order."""

  def __init__(self, page):
    super().__init__()
    self.open, self.found = [], []
    self.feed(page)

  def handle_starttag(self, tag, attrs):
    self.found.append((tag, dict(attrs)))
    if tag not in ('meta', 'img'):
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def of(self, css):
    return [a for _, a in self.found
            if css in (a.get('class') or '').split()]


def decode(uri):
  return np.asarray(Image.open(io.BytesIO(base64.b64decode(
      uri.removeprefix('data:image/png;base64,')))))


def test_mask_by_hand():
  segments = np.array([1, 1, 2, 2, 0])
  np.testing.assert_array_equal(look.mask(segments), np.array([
      [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0],
      [0, 0, 0, 0, 0]], bool))
  pixels = look.mask_picture(dict(
      segments=segments, image_index=np.array([-1, 0, -1, -1, -1])))
  names = {look.READ: 'r', look.PICTURE: 'p', look.FUTURE: 'f',
           look.OUTSIDE: '.'}
  assert [''.join(names[tuple(map(int, p))] for p in line)
          for line in pixels] == ['rf...', 'rp...', '..rf.', '..rr.', '.....']


def test_page_shows_what_the_arrays_say():
  c = config(captions=dict(corpus='one', quota=2),
             words=dict(corpus='one', view='text', column='raw'))
  pipe = pipeline(c, fakes.Records(17, bad={4}))
  text = look.page(c, pipe, 3, rows=8)
  reader, batch = Reader(text), pipe.batch(3)
  assert not reader.open or reader.open == ['html']
  slots = sum(int((a['segments'] > 0).sum()) for a in batch.values())
  titles = [a for _, a in reader.found
            if (a.get('title') or '').startswith('slot ')]
  assert len(titles) == slots
  cells = reader.of('cell')
  patch = fakes.Letters().id('<patch>')
  assert len(cells) == sum(int((a['tokens'] == patch).sum())
                           for a in batch.values())
  counted = sum(int((a['weights'] > 0).sum()) for a in batch.values())
  assert len(reader.of('on')) == counted
  assert all(a['title'].endswith(', weight 1') for a in reader.of('on'))
  assert len(reader.of('mask')) == 4 + 2
  assert len(reader.of('doc')) == sum(map(len, pipe.records(3).values()))
  for ids in pipe.records(3).values():
    for record in ids:
      assert f'<b>{record}</b>' in text
  masks = [decode(a['src']) for a in reader.of('mask')]
  assert masks[0].shape == (48, 48, 3)


def test_patches_are_cut_where_they_belong():
  c = config(captions=dict(corpus='one'))
  text = look.page(c, pipeline(c), 0, rows=1)
  where = [tuple(map(int, m)) for m in re.findall(
      r'background-position:-(\d+)px -(\d+)px', text)][:6]
  size_x, size_y = 26, 26  # cells of 2 x 2 pixels, drawn as squares
  assert where == [(c * size_x, r * size_y) for r in range(2)
                   for c in range(3)]


def test_hover_tells_target_and_weight():
  c = config(captions=dict(corpus='one'))
  pipe = pipeline(c)
  row = {k: v[0] for k, v in pipe.batch(0)['captions'].items()}
  t = int(np.flatnonzero(row['weights'])[0])
  shared = look._Page(fakes.Letters(), EVE)
  said = shared.hover(row, t)
  assert f'slot {t}, position {row["positions"][t]}' in said
  assert f'target {row["targets"][t]} ' in said and 'weight 1' in said
  end = int(np.flatnonzero(np.diff(row['segments']))[0])
  assert 'no target' in shared.hover(row, end)


def test_left_out_documents_are_named():
  c = config(captions=dict(corpus='one'))
  c.layout.rows = 1
  pipe = pipeline(c, fakes.Records(17, bad=range(0, 17, 4)))
  text, stats = look.page(c, pipe, 0, 8), pipe.stats(0)['captions']
  assert text.count('did not fit') == stats['dropped_documents'] > 0
  (group,) = pipe.groups(0)['captions']
  dropped = {d.id for d in group.documents if d.spans} - set(
      pipe.records(0)['captions'])
  assert set(re.findall('<b>(r[0-9]+)</b> did not fit', text)) == dropped
  assert text.count('is bad: cannot be decoded') == stats['bad'] > 0


def test_pairs():
  c = config('pair', pairs=dict(corpus='one', view='pair'))
  reader = Reader(look.page(c, pipeline(c), 0, rows=4))
  assert len(reader.of('pair')) == 4


def test_text_of_users_is_escaped():
  class Hostile(fakes.Records):

    def __getitem__(self, i):
      return dict(super().__getitem__(i), id=f'<script>{i}</script>')

  c = config(captions=dict(corpus='one'))
  text = look.page(c, pipeline(c, Hostile(9)), 0, 8)
  assert '<script>' not in text and '&lt;script&gt;' in text


def test_page_needs_nothing_else():
  c = config(captions=dict(corpus='one'))
  text = look.page(c, pipeline(c), 0, 8)
  assert 'http' not in text and '<link' not in text and '<script' not in text
  assert set(re.findall(r'url\(([a-z:/]+)', text)) == {'data:image/png'}


def test_command(monkeypatch, tmp_path, capsys):
  c = config(captions=dict(corpus='one'))
  monkeypatch.setattr(config_lib, 'load', lambda *args: c)
  monkeypatch.setattr(config_lib, 'image_layout', lambda config: None)
  monkeypatch.setattr(pipeline_lib, 'open_pipeline', lambda *args: pipeline(c))
  out = tmp_path / 'look.html'
  look.main(['--config=drawn:patches', '--step=2', f'--out={out}'])
  assert capsys.readouterr().out.strip() == str(out)
  assert out.read_text() == look.page(c, pipeline(c), 2, 8)
  with pytest.raises(errors.UserError, match='cannot be written'):
    look.main(['--config=drawn:patches', f'--out={tmp_path}/no/look.html'])
  with pytest.raises(errors.UserError, match='--step is -1'):
    look.main(['--config=drawn:patches', '--step=-1'])

"""Tests of mmgen.data.layout and document."""

import subprocess
import sys

import fakes
import numpy as np
import pytest

from mmgen import errors
from mmgen.data import document
from mmgen.data import layout

LETTERS = fakes.Letters()
BOS, EOS, PATCH, NEWLINE, CLASS = (
    LETTERS.id(n) for n in ('<bos>', '<eos>', '<patch>', '<newline>',
                            '<class>'))
BEGIN, END = LETTERS.id('<image>'), LETTERS.id('</image>')
A, B, C = LETTERS.encode('abc')

FUYU = layout.ImageLayout(2, 3, newline='token')
FUYU_8B = layout.ImageLayout(2, 3, newline='token', bos='after_image')
EVE = layout.ImageLayout(2, 3, class_slot=True, newline='table')
LLAVA = layout.ImageLayout(2, 3)
BORDERED = layout.ImageLayout(2, 3, border=True)
SIZE = 4, 6


def picture(value=0, valid=None):
  return document.image(np.full((*SIZE, 3), value, np.uint8), valid)


def doc(*spans, record='d'):
  return document.Document(spans, record)


def captioned(words='ab', value=0):
  return doc(picture(value), document.text(words))


def one_row(d, image_layout, length=20, images=1):
  arrays, _ = layout.sequence([d], LETTERS, image_layout, 1, length, images)
  return {k: v[0] for k, v in arrays.items()}


def test_table_sizes():
  assert FUYU.table_size == 6
  assert EVE.table_size == 1 + 2 * 4
  assert LLAVA.table_size == 6
  # EVE-7B: 24 x 24 cells, 601 embeddings (arXiv 2406.11832, section 3.1).
  eve7b = layout.ImageLayout(24, 24, class_slot=True, newline='table')
  assert eve7b.table_size == 601
  # Fuyu-8B's largest picture: 36 x 64 cells and 36 newlines.
  names, _ = layout.ImageLayout(36, 64, newline='token').slots()
  assert len(names) == 2340


def test_fuyu_arrays():
  row = one_row(captioned(), FUYU, 12)
  np.testing.assert_array_equal(row['tokens'], [
      BOS, PATCH, PATCH, PATCH, NEWLINE, PATCH, PATCH, PATCH, NEWLINE,
      A, B, EOS])
  np.testing.assert_array_equal(
      row['visual'], [-1, 0, 1, 2, -1, 3, 4, 5, -1, -1, -1, -1])
  np.testing.assert_array_equal(
      row['image_index'], [-1, 0, 0, 0, 0, 0, 0, 0, 0, -1, -1, -1])
  np.testing.assert_array_equal(row['targets'], [
      PATCH, PATCH, PATCH, NEWLINE, PATCH, PATCH, PATCH, NEWLINE, A, B, EOS,
      0])
  np.testing.assert_array_equal(
      row['weights'], [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 0])
  np.testing.assert_array_equal(row['positions'], np.arange(12))
  np.testing.assert_array_equal(row['segments'], np.ones(12))
  np.testing.assert_array_equal(row['image_box'], [[0, 0, 2, 3]])


def test_fuyu_8b_begins_behind_the_picture():
  row = one_row(captioned(), FUYU_8B, 12)
  np.testing.assert_array_equal(row['tokens'], [
      PATCH, PATCH, PATCH, NEWLINE, PATCH, PATCH, PATCH, NEWLINE, BOS,
      A, B, EOS])
  np.testing.assert_array_equal(
      row['visual'], [0, 1, 2, -1, 3, 4, 5, -1, -1, -1, -1, -1])
  np.testing.assert_array_equal(
      row['image_index'], [0, 0, 0, 0, 0, 0, 0, 0, -1, -1, -1, -1])
  np.testing.assert_array_equal(row['targets'], [
      PATCH, PATCH, NEWLINE, PATCH, PATCH, PATCH, NEWLINE, BOS, A, B, EOS, 0])
  # <bos> itself is not learnt.
  np.testing.assert_array_equal(
      row['weights'], [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 0])
  np.testing.assert_array_equal(row['positions'], np.arange(12))
  np.testing.assert_array_equal(row['segments'], np.ones(12))


def test_bos_stands_behind_the_pictures_of_the_beginning_only():
  text = document.text('a')
  tokens = lambda *spans: [
      {PATCH: 'p', NEWLINE: 'n', BOS: 's', EOS: 'e', A: 'a', 0: ''}[t]
      for t in one_row(doc(*spans), FUYU_8B, 20,
                       sum(s.kind == 'image' for s in spans))['tokens']]
  image = 'pppnpppn'
  assert ''.join(tokens(text)) == 'sae'
  assert ''.join(tokens(text, picture())) == f'sa{image}e'
  assert ''.join(tokens(picture(), picture())) == f'{image}{image}se'
  assert ''.join(tokens(picture(), text, picture())) == f'{image}sa{image}e'


def test_prompt_of_a_caption_ends_in_bos_behind_the_picture():
  arrays, lengths = layout.prompt(
      [captioned('abc'), doc(document.text('ab'))], LETTERS, FUYU_8B, 16, 1)
  np.testing.assert_array_equal(lengths, [9, 1])
  full = one_row(captioned('abc'), FUYU_8B, 16)
  np.testing.assert_array_equal(arrays['tokens'][0, :9], full['tokens'][:9])
  assert arrays['tokens'][0, 8] == arrays['tokens'][1, 0] == BOS
  assert full['targets'][8] == A and full['weights'][8] == 1


def test_eve_arrays():
  row = one_row(captioned(), EVE, 14)
  np.testing.assert_array_equal(row['tokens'], [
      BOS, CLASS, PATCH, PATCH, PATCH, NEWLINE, PATCH, PATCH, PATCH, NEWLINE,
      A, B, EOS, 0])
  np.testing.assert_array_equal(
      row['visual'], [-1, 0, 1, 2, 3, 4, 5, 6, 7, 8, -1, -1, -1, -1])
  np.testing.assert_array_equal(
      row['weights'], [0] * 9 + [1, 1, 1, 0, 0])
  np.testing.assert_array_equal(row['segments'], [1] * 13 + [0])


def test_llava_arrays():
  row = one_row(captioned(), LLAVA, 10)
  np.testing.assert_array_equal(
      row['tokens'], [BOS] + [PATCH] * 6 + [A, B, EOS])
  np.testing.assert_array_equal(
      row['visual'], [-1, 0, 1, 2, 3, 4, 5, -1, -1, -1])
  np.testing.assert_array_equal(row['weights'], [0] * 6 + [1, 1, 1, 0])


def test_border_belongs_to_the_picture_and_is_never_learnt():
  row = one_row(captioned(), BORDERED, 12)
  np.testing.assert_array_equal(
      row['tokens'], [BOS, BEGIN] + [PATCH] * 6 + [END, A, B, EOS])
  np.testing.assert_array_equal(
      row['image_index'], [-1] + [0] * 8 + [-1] * 3)
  np.testing.assert_array_equal(
      row['visual'], [-1, -1, 0, 1, 2, 3, 4, 5, -1, -1, -1, -1])
  np.testing.assert_array_equal(row['weights'], [0] * 8 + [1, 1, 1, 0])


def test_padding_cells_have_no_slots_but_keep_their_place_in_the_table():
  # A 4 x 6 pixel canvas of 2 x 3 cells whose left 4 columns are picture.
  d = doc(picture(valid=(0, 0, 4, 4)), document.text('a'))
  row = one_row(d, EVE, 12)
  np.testing.assert_array_equal(row['image_box'], [[0, 0, 2, 2]])
  np.testing.assert_array_equal(
      row['visual'], [-1, 0, 1, 2, 4, 5, 6, 8, -1, -1, -1, -1])
  assert layout.ImageLayout(2, 3).slots((1, 1, 1, 2))[1].tolist() == [4, 5]
  # A cell that is only partly real picture counts as real.
  assert EVE.cells(picture(valid=(1, 3, 2, 2))) == (0, 1, 2, 2)
  with pytest.raises(ValueError, match='2 x 3 cells'):
    EVE.slots((0, 2, 2, 2))


def test_last_visual_slot_predicts_text_only_if_it_is_learnt():
  learnt = one_row(captioned('a'), LLAVA)
  assert learnt['targets'][6] == A and learnt['weights'][6] == 1
  read = one_row(doc(picture(), document.text('a', 'input'),
                     document.text('b')), LLAVA)
  assert read['targets'][6] == A and read['weights'][6] == 0
  np.testing.assert_array_equal(read['weights'][:10], [0] * 7 + [1, 1, 0])


def test_weights_of_spans_and_of_the_end():
  row = one_row(doc(document.text('a', weight=0.5), document.text('b', 'both'),
                    document.marks('<answer>')), None, images=0)
  # <eos> follows text that is only read: not learnt.
  np.testing.assert_array_equal(row['weights'][:5], [.5, 1, 0, 0, 0])
  # A picture after learnt text: its last slot predicts <eos>.
  row = one_row(doc(document.text('a'), picture()), LLAVA)
  np.testing.assert_array_equal(row['weights'][:9], [1] + [0] * 6 + [1, 0])
  assert row['targets'][7] == EOS


def test_targets_and_positions_never_cross_a_document():
  documents = [captioned('abc', 1), doc(document.text('cb')), captioned('a', 2)]
  arrays, stats = layout.sequence(documents, LETTERS, LLAVA, 1, 28, 3)
  tokens, segments = arrays['tokens'][0], arrays['segments'][0]
  # Longest first: 11, 9 and 4 slots.
  np.testing.assert_array_equal(
      segments, [1] * 11 + [2] * 9 + [3] * 4 + [0] * 4)
  np.testing.assert_array_equal(arrays['positions'][0], [
      *range(11), *range(9), *range(4), 0, 0, 0, 0])
  same = segments[1:] == segments[:-1]
  np.testing.assert_array_equal(
      arrays['targets'][0, :-1], np.where(same, tokens[1:], 0))
  ends = np.flatnonzero(~same)
  assert (arrays['weights'][0, ends] == 0).all()
  assert (arrays['targets'][0, ends] == 0).all()
  # The second picture is read from the second table of the row.
  assert arrays['visual'][0, 12] == LLAVA.table_size
  np.testing.assert_array_equal(arrays['images'][0, :, 0, 0, 0], [1, 2, 0])
  np.testing.assert_array_equal(
      arrays['image_box'][0], [[0, 0, 2, 3], [0, 0, 2, 3], [0] * 4])
  assert stats == dict(fill=24 / 28, documents=3, tokens=24, bad=0,
                       dropped_documents=0, dropped_tokens=0)


def test_visual_points_into_its_own_picture():
  documents = [captioned('a' * n, n) for n in range(1, 9)]
  arrays, _ = layout.sequence(documents, LETTERS, EVE, 3, 40, 3)
  seen = arrays['visual'] >= 0
  np.testing.assert_array_equal(
      arrays['visual'][seen] // EVE.table_size, arrays['image_index'][seen])
  assert (np.isin(arrays['tokens'][seen], [PATCH, CLASS, NEWLINE])).all()
  used = (arrays['image_box'][..., 2] > 0).sum()
  assert used == arrays['segments'].max(1).sum()


def test_drops_and_bad_records_are_counted():
  documents = [captioned('a' * 7), document.bad('x', 'why'), captioned('ab'),
               captioned('a' * 30)]
  arrays, stats = layout.sequence(documents, LETTERS, LLAVA, 1, 20, 2, SIZE)
  assert stats == dict(fill=15 / 20, documents=1, tokens=15, bad=1,
                       dropped_documents=2, dropped_tokens=10 + 38)
  assert arrays['segments'].max() == 1


def test_shapes_do_not_depend_on_what_is_there():
  arrays, stats = layout.sequence(
      [document.bad('x', '')], LETTERS, LLAVA, 2, 20, 3, SIZE)
  assert arrays['images'].shape == (2, 3, 4, 6, 3)
  assert arrays['image_box'].shape == (2, 3, 4)
  assert {k: v.dtype for k, v in arrays.items()} == dict(
      tokens=np.int32, targets=np.int32, segments=np.int32, images=np.uint8,
      positions=np.int32, visual=np.int32, image_index=np.int32,
      image_box=np.int32, weights=np.float32)
  assert stats['fill'] == 0 and not arrays['segments'].any()
  text_only, _ = layout.sequence(
      [doc(document.text('a'))], LETTERS, None, 2, 20, 0)
  assert 'images' not in text_only and 'image_box' not in text_only


def test_unknown_kinds_and_wrong_sizes_are_refused():
  with pytest.raises(ValueError, match="'codes'"):
    one_row(doc(document.Span('codes', np.zeros(3))), LLAVA)
  small = document.image(np.zeros((2, 2, 3), np.uint8))
  with pytest.raises(ValueError, match='2 x 2 pixels among'):
    layout.sequence([captioned(), doc(small)], LETTERS, LLAVA, 1, 30, 2)


def test_prompt_leaves_the_last_answer_out():
  d = doc(picture(), document.text('a', 'input'), document.text('b'),
          document.marks('<eos>', role='target'), document.text('c', 'input'),
          document.marks('<answer>'), document.text('bb'))
  arrays, lengths = layout.prompt(
      [d, captioned('abc'), doc(document.text('ab')),
       document.bad('x', '')], LETTERS, LLAVA, 16, 1, SIZE)
  np.testing.assert_array_equal(lengths, [12, 7, 1, 0])
  np.testing.assert_array_equal(arrays['tokens'][0, :12], [
      BOS, *[PATCH] * 6, A, B, EOS, C, LETTERS.id('<answer>')])
  np.testing.assert_array_equal(arrays['tokens'][2, :2], [BOS, 0])
  assert not arrays['segments'][3].any()


def test_prompt_is_the_beginning_of_the_training_row():
  d = doc(picture(3), document.text('ab', 'input'), document.text('c'))
  full = one_row(d, EVE, 20)
  arrays, lengths = layout.prompt([d], LETTERS, EVE, 20, 1)
  for name in ('tokens', 'positions', 'visual', 'image_index', 'segments'):
    np.testing.assert_array_equal(
        arrays[name][0, :lengths[0]], full[name][:lengths[0]])
  assert full['targets'][lengths[0] - 1] == C
  assert full['weights'][lengths[0] - 1] == 1


def test_unpacked_drops_nothing_and_says_what_does_not_fit():
  documents = [captioned('a' * n, n) for n in (5, 1, 3)]
  arrays = layout.unpacked(documents, LETTERS, LLAVA, 13, 1)
  np.testing.assert_array_equal((arrays['segments'] > 0).sum(1), [13, 9, 11])
  np.testing.assert_array_equal(arrays['images'][:, 0, 0, 0, 0], [5, 1, 3])
  with pytest.raises(errors.UserError, match="'d' takes 13 slots; a row"):
    layout.unpacked(documents, LETTERS, LLAVA, 12, 1)
  with pytest.raises(errors.UserError, match='layout.images'):
    layout.unpacked(
        [doc(picture(), picture())], LETTERS, LLAVA, 20, 1)


def test_pair():
  documents = [captioned('ab', 1), document.bad('x', ''), captioned('ab', 2),
               captioned('abcabc', 3)]
  arrays = layout.pair(documents, LETTERS, 5)
  np.testing.assert_array_equal(arrays['tokens'], [
      [BOS, A, B, EOS, 0], [0] * 5, [BOS, A, B, EOS, 0],
      [BOS, A, B, C, EOS]])
  np.testing.assert_array_equal(arrays['valid'].sum(1), [4, 0, 4, 5])
  np.testing.assert_array_equal(
      arrays['example_valid'], [True, False, True, True])
  np.testing.assert_array_equal(arrays['images'][:, 0, 0, 0], [1, 0, 2, 3])
  labels = arrays['labels']
  assert labels.dtype == np.int64
  assert labels[0] == labels[2] != labels[3]
  assert layout.pair_stats(documents, LETTERS, arrays) == dict(
      fill=13 / 20, documents=3, tokens=13, bad=1, dropped_documents=0,
      dropped_tokens=3)
  with pytest.raises(ValueError, match='2 pictures and 1 texts'):
    layout.pair([doc(picture(), picture(), document.text('a'))], LETTERS, 5)


def test_layout_imports_numpy_alone():
  code = (
      'import sys\n'
      'import numpy\n'
      'before = set(sys.modules)\n'
      'from mmgen.data import document, layout\n'
      'new = {m.split(".")[0] for m in set(sys.modules) - before}\n'
      'print(sorted(m for m in new if m not in sys.stdlib_module_names))\n')
  found = subprocess.run([sys.executable, '-c', code], check=True,
                         capture_output=True, text=True)
  assert found.stdout.strip() == "['mmgen']"

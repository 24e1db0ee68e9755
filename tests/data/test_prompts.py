"""Tests of mmgen.data.prompts."""

import collections

import fakes
import numpy as np
import pytest

from mmgen import errors
from mmgen.data import mixture
from mmgen.data import prompts
from mmgen.data import published_text

RECORD = fakes.Records(3)[2]


def source(**fields):
  return mixture.Source(corpus='c', **fields)


def view(name, seed=0, **fields):
  return prompts.VIEWS[name](
      RECORD, source(view=name, **fields), np.random.default_rng(seed))


def shown(document):
  """(kind or text, role) of each span."""
  return [('image' if s.kind == 'image' else s.data, s.role)
          for s in document.spans]


def test_caption_before_and_after():
  assert shown(view('caption')) == [('image', 'input'), ('cccccc', 'target')]
  assert shown(view('caption', image_place='after')) == [
      ('cccccc', 'target'), ('image', 'input')]
  assert view('caption').id == 'r2'
  np.testing.assert_array_equal(view('caption').spans[0].data, RECORD['image'])


def test_places_and_columns_are_drawn():
  drawn = collections.Counter(
      shown(view('caption', seed, image_place='random', column='raw+names'))[
          0][0] for seed in range(200))
  assert set(drawn) == {'image', 'cc', 'c'}
  assert 70 < drawn['image'] < 130 and 25 < drawn['cc'] < 75
  twice = collections.Counter(
      shown(view('text', seed, column='raw+raw+synthetic'))[0][0]
      for seed in range(300))
  assert 160 < twice['cc'] < 240 and twice['cc'] + twice['ccc'] == 300


def test_draws_depend_on_the_generator_alone():
  one = [shown(view('caption', s, image_place='random')) for s in range(20)]
  two = [shown(view('caption', s, image_place='random')) for s in range(20)]
  assert one == two


def test_columns():
  for column, words in (('raw', 'cc'), ('synthetic', 'ccc'), ('names', 'c')):
    assert shown(view('text', column=column)) == [(words, 'target')]
  assert shown(view('text', column='names', language='ja')) == [
      ('C, x', 'target')]


def test_question():
  spans = shown(view('vqa'))
  question, answer = spans[2][0], spans[5][0]
  assert len(question) == len(answer)  # the answer to that question
  assert spans == [
      ('image', 'input'), (('<user>',), 'input'), (question, 'input'),
      (('<assistant>',), 'input'), (('<answer>',), 'input'),
      (answer, 'target')]
  asked = {shown(view('vqa', seed))[2][0] for seed in range(50)}
  assert asked == {'q', 'qq', 'qqq'}


def test_conversation_asks_everything_once_and_closes_each_answer():
  spans = shown(view('conversation'))
  assert spans.count((('<eos>',), 'target')) == 2
  assert sorted(s for s, _ in spans if set(s) == {'q'}) == ['q', 'qq', 'qqq']
  # Every answer but the last is followed by its <eos>, then the next turn.
  ends = [i for i, s in enumerate(spans) if s == (('<eos>',), 'target')]
  assert all(spans[i - 1][1] == 'target' for i in ends)
  assert all(spans[i + 1] == (('<user>',), 'input') for i in ends)
  orders = {tuple(s for s, _ in shown(view('conversation', seed))
                  if set(s) == {'q'}) for seed in range(60)}
  assert len(orders) == 6


def test_views_speak_in_the_style_of_their_source():
  assert shown(view('caption', style='plain'))[1] == ('cccccc\n', 'target')
  assert shown(view('vqa', style='vicuna_v1'))[-2][0].endswith(' ASSISTANT:')
  assert not view('text_conversation', style='eve2').begin
  assert view('text', style='emu').end and not view(
      'text', style='eve2_plain').end


def test_pair_has_one_picture_and_one_text():
  assert shown(view('pair', column='raw')) == [
      ('image', 'input'), ('cc', 'target')]


def test_a_reserved_name_in_a_question_stays_text():
  d = prompts.question_document(RECORD['image'], [('<user> {image}', 'no')])
  assert d.spans[2].data == '<user> {image}'


def test_own_templates_are_the_default():
  turns = [('what?', 'fox'), ('and?', '')]
  for given, same in (
      (prompts.question_document(RECORD['image'], turns),
       prompts.question_document(RECORD['image'], turns, style='own')),
      (prompts.caption_document(RECORD['image'], 'fox'),
       prompts.caption_document(RECORD['image'], 'fox', style='own'))):
    assert shown(given) == shown(same) and given.begin and given.end
  assert shown(prompts.question_document(None, turns)) == [
      (('<user>',), 'input'), ('what?', 'input'), (('<assistant>',), 'input'),
      (('<answer>',), 'input'), ('fox', 'target'), (('<eos>',), 'target'),
      (('<user>',), 'input'), ('and?', 'input'), (('<assistant>',), 'input'),
      (('<answer>',), 'input'), ('', 'target')]
  found = shown(prompts.question_document(None, [('a', ''), ('b', '')]))
  assert found[4:7] == [
      ('', 'target'), (('<eos>',), 'target'), (('<user>',), 'input')]


CHAT = (
    'A chat between a curious user and an artificial intelligence assistant. '
    "The assistant gives helpful, detailed, and polite answers to the user's "
    'questions. USER: ')


def test_a_published_conversation():
  found = prompts.question_document(
      RECORD['image'], [(' what? ', 'a fox'), ('and?', 'no')],
      style='vicuna_v1')
  assert shown(found) == [
      (CHAT, 'input'), ('image', 'input'), ('\nwhat? ASSISTANT:', 'input'),
      (' a fox', 'target'), (('<eos>',), 'target'),
      ('USER: and? ASSISTANT:', 'input'), (' no', 'target')]
  assert [type(s.data) for s in found.spans if s.kind == 'text'] == [
      str, str, published_text.AfterText, tuple, published_text.AfterMark,
      published_text.AfterText]
  assert found.begin and found.end
  found = prompts.question_document(
      None, [(' what? ', 'a fox')], style='eve2')
  assert shown(found) == [
      (f'{CHAT} what?  ASSISTANT:', 'input'), (' a fox', 'target')]
  assert not found.begin and found.end


def test_an_empty_answer_within_a_published_conversation():
  found = prompts.question_document(
      None, [('what?', ''), ('and?', 'no')], style='vicuna_v1')
  assert shown(found) == [
      (f'{CHAT}what? ASSISTANT:USER: and? ASSISTANT:', 'input'),
      (' no', 'target')]
  found = prompts.question_document(None, [('what?', '')], style='vicuna_v1')
  assert shown(found)[-1] == ('', 'target')  # a prompt leaves it out


@pytest.mark.parametrize('style,spans', [
    ('plain', [('image', 'input'), (' a fox \n', 'target')]),
    ('eve2_plain', [('image', 'input'), ('a fox\n', 'target')]),
    ('emu', [('image', 'input'), ('a fox', 'target')])])
def test_published_captions(style, spans):
  found = prompts.caption_document(RECORD['image'], ' a fox ', style=style)
  assert shown(found) == spans
  assert found.end == (style == 'emu')
  assert found.begin == (style != 'eve2_plain')


def test_what_is_typed_is_no_template():
  typed = '<eos>{image}[{caption}] <user> {question.strip}'
  found = prompts.question_document(None, [(typed, typed)], style='emu2_chat')
  assert shown(found)[1:] == [
      (('<user>',), 'input'), (f': {typed}', 'input'),
      (('<assistant>',), 'input'), (':', 'input'), (f' {typed}', 'target')]


def test_unknown_styles():
  with pytest.raises(errors.UserError, match="the style 'vicuna'; .*vicuna_v1"):
    prompts.text_document('a', style='vicuna')
  with pytest.raises(errors.UserError, match="'plain' has no template 'turn'"):
    prompts.template('plain', 'turn')
  with pytest.raises(errors.UserError, match='it has: caption_before$'):
    prompts.question_document(None, [('a', 'b')], style='plain')


@pytest.mark.parametrize('fields,match', [
    (dict(view='cap'), "mix.s.view is 'cap'; allowed: caption"),
    (dict(column='raw+rough'), "mix.s.column is 'rough'"),
    (dict(image_place='left'), "mix.s.image_place is 'left'"),
    (dict(style='vicuna'), "mix.s.style is 'vicuna'"),
    (dict(style='plain', view='vqa'), "no template 'question'"),
    (dict(style='plain', image_place='random'), "no template 'caption_after'"),
    (dict(view='vqa', image_place='after'), "only knows 'before'"),
    (dict(language='ja'), "mix.s.language is 'ja'"),
    (dict(view='text', shuffle_pairs=True), 'no pictures'),
])
def test_errors_name_the_field(fields, match):
  with pytest.raises(errors.UserError, match=match.replace('+', r'\+')):
    prompts.check('mix.s', source(**fields))


def test_views_that_ask_need_questions():
  for name in ('vqa', 'conversation'):
    with pytest.raises(errors.UserError, match="'r' has no questions"):
      prompts.VIEWS[name](dict(RECORD, id='r', questions=[]),
                          source(view=name), np.random.default_rng(0))

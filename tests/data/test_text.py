"""Tests of mmgen.data.text."""

import pathlib
import pickle

import pytest

from mmgen.data import published_text
from mmgen.data import text

TEXTS = [
    'a cat on a blue ground', 'an apple on a green ground', 'two dogs',
    'IMG_2041_apple.png #apple 1f34e', 'what is this?', 'is there a cat?',
    'manzana roja', 'りんご', '사과', 'تفاحة', 'красное яблоко', '苹果'] * 5


@pytest.fixture(scope='module')
def tokenizer():
  return text.Tokenizer(text.train(TEXTS, 380))


@pytest.mark.parametrize('line', [
    '', ' ', 'a cat', ' a  cat   ', '\ta\n\ncat\r\n', '   ', '\n',
    '漢字とかな 한국어 العربية', '🍎👨‍👩‍👧🏽 \U0001f9ff',
    'e\u0301 \u00e9 ﬁ Å ｆｕｌｌ', 'zero\x00byte \x7f \ufeff \ufffd \u200d',
    'a\u2581b', '\u2581', ' \u2581 \u2581\u2581',
    '<0x41>', '\u2585\u2047 ??', ''.join(map(chr, range(1, 0x2fff, 7)))])
def test_round_trip_is_exact(tokenizer, line):
  assert tokenizer.decode(tokenizer.encode(line)) == line


def test_typed_text_never_becomes_reserved(tokenizer):
  typed = ' '.join(text.RESERVED) + ''.join(text.RESERVED) + '<s></s><0x00>'
  ids = tokenizer.encode(typed)
  assert min(ids) >= len(text.RESERVED)
  assert tokenizer.decode(ids) == typed


def test_typed_text_never_becomes_reserved_even_if_trained_on():
  texts = TEXTS + ['<image> <image></image> <bos>'] * 50
  tokenizer = text.Tokenizer(text.train(texts, 340))
  ids = tokenizer.encode('<image><bos> <pad>')
  assert min(ids) >= len(text.RESERVED)
  assert tokenizer.decode(ids) == '<image><bos> <pad>'


def test_reserved_ids_are_fixed_and_skipped(tokenizer):
  assert [tokenizer.id(n) for n in text.RESERVED] == list(
      range(len(text.RESERVED)))
  assert tokenizer.id('<pad>') == 0
  ids = tokenizer.encode('a cat')
  ids = [1, ids[0], 4, 6, 3] + ids[1:] + [2, 0]
  assert tokenizer.decode(ids) == 'a cat'
  with pytest.raises(ValueError, match='<imgae>'):
    tokenizer.id('<imgae>')


def test_frequent_words_are_one_piece(tokenizer):
  assert len(tokenizer.encode('a cat on a blue ground')) < 12
  assert ''.join(tokenizer.pieces(tokenizer.encode('a cat'))) == ' a cat'


def test_training_and_storage_repeat(tokenizer, tmp_path):
  assert text.train(TEXTS, 380) == tokenizer.bytes
  (tmp_path / 'tokenizer.model').write_bytes(tokenizer.bytes)
  again = text.Tokenizer.load(tmp_path / 'tokenizer.model')
  assert again.encode('dogs and 猫') == tokenizer.encode('dogs and 猫')
  assert again.vocab_size == tokenizer.vocab_size == 380
  copy = pickle.loads(pickle.dumps(tokenizer))
  assert copy.encode('a cat') == tokenizer.encode('a cat')


def test_a_text_behind_another_gets_no_space():
  model = text.Tokenizer(text.train(TEXTS, 380))
  assert model.encode(published_text.AfterText(' cat')) == model.encode('cat')
  assert model.encode(published_text.AfterMark('cat')) == model.encode('cat')


def test_stored_bytes_tell_which_tokenizer(tokenizer):
  path = pathlib.Path(__file__).parents[1] / 'golden/tokenizers/llama.model'
  published = published_text.load(path)
  assert isinstance(text.Tokenizer.from_bytes(tokenizer.bytes), text.Tokenizer)
  again = text.Tokenizer.from_bytes(published.bytes)
  assert isinstance(again, published_text.Tokenizer)
  assert again.encode('a cat') == published.encode('a cat')


def test_clear_errors():
  with pytest.raises(ValueError, match='vocab_size=100'):
    text.train(TEXTS, 100)
  with pytest.raises(ValueError, match='vocab_size=5000: .* at most'):
    text.train(TEXTS, 5000)
  with pytest.raises(ValueError, match='vocab_size=280: .* at least'):
    text.train(TEXTS, 280)
  with pytest.raises(ValueError, match='not a sentencepiece model'):
    text.Tokenizer(b'junk')


def test_a_word_is_one_token_wherever_it_stands():
  model = text.Tokenizer.from_bytes(text.train(
      ['a fox on a blue ground', 'fox', 'a red fox', 'fox and owl'] * 50, 300))
  answer, caption = model.encode('fox'), model.encode('a fox on a ground')
  assert len(answer) == 1 and answer[0] in caption

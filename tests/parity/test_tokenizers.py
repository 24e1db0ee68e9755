"""Tokenizers beside those of transformers and open_clip, on strange texts."""

import gzip
import json
import pathlib
import random
import shutil

import open_clip
import pytest
import transformers

from mmgen.data import published_text

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden' / 'tokenizers'
TEXTS = json.loads(gzip.decompress(
    (GOLDEN / 'references.json.gz').read_bytes()))['texts']


def strange(count):
  """Random texts from corners of Unicode."""
  draw = random.Random(7)
  letters = [
      *'  aeUSR:.,!?\'"0123\n\t', *'éßΣς漢か한ا🍎\u200d\u0301\u00a0ﬁ½\x07',
      'fox', ' the', 'USER:', ' dog']
  return [''.join(draw.choices(letters, k=draw.randint(1, 30)))
          for _ in range(count)]


def assert_same(file, theirs, texts, clean=str):
  ours = published_text.load(GOLDEN / file)
  assert len(texts) > 300
  for words in texts:
    assert ours.encode(words) == theirs(
        clean(words), add_special_tokens=False).input_ids, words


# What is typed like a special piece stays text here, and not there.
PLAIN = [words for words in TEXTS + strange(400)
         if '<' not in words and '\x04' not in words]


@pytest.mark.parametrize('file', ['llama_fast', 'llama_first', 'llava_hf',
                                  'fuyu', 'qwen2'])
def test_files_of_tokenizers(file):
  assert_same(f'{file}.json', transformers.PreTrainedTokenizerFast(
      tokenizer_file=str(GOLDEN / f'{file}.json')), PLAIN)


@pytest.mark.parametrize('legacy', [True, False])
def test_sentencepiece(legacy, tmp_path):
  # Since version 5 no space is put before a text that begins with one, against
  # what sentencepiece does and what the models were trained on.
  texts = [words for words in PLAIN if not words.startswith((' ', '\u2581'))]
  shutil.copy(GOLDEN / 'llama.model', tmp_path / 'tokenizer.model')
  assert_same('llama.model', transformers.LlamaTokenizer.from_pretrained(
      tmp_path, legacy=legacy), texts)


@pytest.mark.parametrize('file, kind', [('qwen2', 'Qwen2Tokenizer'),
                                        ('clip', 'CLIPTokenizer')])
def test_what_transformers_builds_of_vocabulary_and_merges(file, kind):
  model = json.loads((GOLDEN / f'{file}.json').read_text())['model']
  # OpenAI's program mends broken letters and makes small ones, and so do we.
  clean = str if file == 'qwen2' else (
      lambda words: open_clip.tokenizer.basic_clean(words).lower())
  assert_same(f'{file}.json', getattr(transformers, kind)(
      vocab=model['vocab'], merges=[tuple(pair) for pair in model['merges']]),
              PLAIN, clean)


def test_open_clip_with_the_real_vocabulary():
  """A program of its own, which shares nothing with tokenizers."""
  theirs = open_clip.tokenizer.SimpleTokenizer()
  names = {'<start_of_text>': '<|startoftext|>',
           '<end_of_text>': '<|endoftext|>'}
  file = transformers.CLIPTokenizer(
      vocab={names.get(piece, piece): i for piece, i in theirs.encoder.items()},
      merges=list(theirs.bpe_ranks))
  ours = published_text.Tokenizer(file.backend_tokenizer.to_str().encode())
  assert ours.family == 'clip' and ours.vocab_size == 49408
  for words in TEXTS + strange(300):
    assert ours.encode(words) == theirs.encode(words), words

"""Tests of mmgen.data.published_text, and of `prompts.STYLES` through it.

golden/tokenizers/ holds tiny vocabularies, trained with the settings of the
published ones, and in references.json.gz what the references made of awkward
texts: single ones by transformers 4.56.2 and, for CLIP, open_clip 3.3.0; whole
conversations with their loss masks (lengths of runs, the first not learnt) by
LLaVA's code with transformers 4.37.2 (`join` space and none), EVE's with
4.31.0 (cut), EVEv2's with 4.56.2, Emu's with 4.31.0, and Fuyu's processor. -200
is a picture. The same was seen with LLaMA's own vocabulary.
Live beside transformers and open_clip: tests/parity/test_tokenizers.py.
"""

import gzip
import json
import pathlib
import pickle
import unicodedata

import numpy as np
import pytest
import sentencepiece

from mmgen import errors
from mmgen.data import layout
from mmgen.data import prompts
from mmgen.data import published_text
from mmgen.data import text

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden' / 'tokenizers'
REFERENCE = json.loads(gzip.decompress(
    (GOLDEN / 'references.json.gz').read_bytes()))
FAMILY = {
    'clip.json': 'clip', 'fuyu.json': 'fuyu', 'fuyu.model': 'fuyu',
    'llama.model': 'llama', 'llama_fast.json': 'llama',
    'llama_first.json': 'llama', 'llava_hf.json': 'llava_hf',
    'qwen2.json': 'qwen2', 'siglip.model': 'siglip'}
EXACT = [f for f in FAMILY if f not in ('clip.json', 'siglip.model')]
PICTURE = np.zeros((2, 2, 3), np.uint8)


def tokenizer(file, family=None, join='space'):
  return published_text.Tokenizer((GOLDEN / file).read_bytes(), family, join)


def document(case):
  picture = PICTURE if case['image'] else None
  if 'turns' in case:
    return prompts.question_document(
        picture, case['turns'], style=case['style'])
  if picture is None:
    return prompts.text_document(case['caption'], style=case['style'])
  return prompts.caption_document(
      picture, case['caption'], case['image'], style=case['style'])


def flat(spans, model, begin=True, end=True):
  """Ids, -200 for a picture, and what is learnt."""
  ids, learnt, learn = [], [], 0
  if begin:
    ids, learnt = [model.id('<bos>')], [0]
  for span in spans:
    learn = int(span.kind == 'text' and span.role == 'target')
    if span.kind == 'image':
      new = [-200]
    elif isinstance(span.data, str):
      new = model.encode(span.data)
    else:
      new = [model.id(name) for name in span.data]
    ids, learnt = ids + new, learnt + [learn] * len(new)
  if end:
    ids, learnt = ids + [model.id('<eos>')], learnt + [learn]
  return ids, learnt


def mask(runs):
  return [i % 2 for i, run in enumerate(runs) for _ in range(run)]


def conversations(style, join='space'):
  found = [case for case in REFERENCE['conversations']
           if case['style'] == style and case['join'] == join]
  assert found
  return found


@pytest.mark.parametrize('file', REFERENCE['encode'])
def test_ids_are_those_of_the_reference(file):
  model = tokenizer(file)
  assert model.family == FAMILY[file]
  for words, ids in zip(REFERENCE['texts'], REFERENCE['encode'][file]):
    if not ('fuyu' in file and '\x04' in words):  # its <answer>
      assert model.encode(words) == ids, words
  assert model.encode('') == []


@pytest.mark.parametrize('style,join', [
    ('plain', 'space'), ('vicuna_v1', 'space'), ('vicuna_v1', 'none'),
    ('vicuna_v1', 'cut'), ('eve2_plain', 'space'), ('eve2', 'space')])
def test_conversations_are_those_of_the_reference(style, join):
  last_empty = ignored = 0
  for case in conversations(style, join):
    model = tokenizer(case['file'], join=join)
    found = document(case)
    ids, learnt = flat(found.spans, model, found.begin, found.end)
    if 'turns' in case and not case['turns'][-1][1]:
      # The reference takes the sample for a prompt, and learns none of it.
      last_empty += 1
      assert ids.pop() == model.id('<eos>')
      assert len(case['learnt']) == 1
      learnt = [0] * len(ids)
    elif len(case['learnt']) == 1 and any(learnt):
      # It ignores what it cannot find a mask for: an answer that is empty, a
      # text that says ASSISTANT.
      ignored += 1
      assert style == 'eve2'
      assert any(not a or ' ASSISTANT:' in f' {q} {a}'
                 for q, a in case['turns'])
      learnt = [0] * len(ids)
    assert ids == case['ids'], case
    assert learnt == mask(case['learnt']), case
  assert last_empty == (0 if 'plain' in style else 2)
  assert (ignored > 0) == (style == 'eve2')


@pytest.mark.parametrize('style', ['emu', 'emu_instruct', 'emu2_chat'])
def test_emu_prompts_are_those_of_the_reference(style):
  grid = layout.ImageLayout(1, 3, border=True)
  for case in conversations(style):
    model = tokenizer(case['file'], case['family'])
    lay_out = layout.prompt if 'turns' in case else layout.unpacked
    arrays = lay_out([document(case)], model, grid, 2000, 1, (2, 2))
    arrays = arrays[0] if 'turns' in case else arrays
    ids = arrays['tokens'][arrays['segments'] > 0].tolist()
    assert ids == case['ids'], case


def test_fuyu_prompts_are_those_of_the_reference():
  model = tokenizer('fuyu.json')
  newline = model.id('<newline>')
  for case in conversations('fuyu'):
    ids, _ = flat(document(case).spans, model, begin=False, end=False)
    patches = 2 * ([model.id('<patch>')] * 3 + [newline])
    assert ids[0] == -200
    assert [*patches, model.id('<bos>'), *ids[1:]] == case['ids'], case


@pytest.mark.parametrize('style,join', [
    ('plain', 'space'), ('vicuna_v1', 'none'), ('eve2', 'space'),
    ('eve2_plain', 'space')])
def test_rows_of_a_batch_are_those_of_the_reference(style, join):
  grid = layout.ImageLayout(1, 1)
  for case in conversations(style, join)[::5]:
    model = tokenizer(case['file'], join=join)
    if not case.get('turns', ['x'])[-1][-1] or len(case['learnt']) == 1:
      continue
    row = layout.unpacked([document(case)], model, grid, 3000, 1, (2, 2))
    size = len(case['ids'])
    assert (row['segments'] > 0).sum() == size
    visual = row['visual'][0, :size] >= 0
    tokens = np.where(visual, -200, row['tokens'][0, :size])
    np.testing.assert_array_equal(tokens, case['ids'])
    np.testing.assert_array_equal(
        row['weights'][0, :size - 1], mask(case['learnt'])[1:])


def test_a_prompt_ends_where_the_answer_begins():
  model = tokenizer('llama.model', join='none')
  asked = prompts.question_document(
      PICTURE, [('what?', 'a fox'), ('and?', 'yes')], style='vicuna_v1')
  arrays, lengths = layout.prompt(
      [asked], model, layout.ImageLayout(1, 1), 600, 1, (2, 2))
  ids = arrays['tokens'][0, :lengths[0]].tolist()
  said = ''.join(model.pieces(ids))
  assert said.endswith(' a fox</s>USER: and? ASSISTANT:')


@pytest.mark.parametrize('file', FAMILY)
def test_typed_text_never_becomes_special(file):
  model = tokenizer(file)
  special = {model.id(name) for name in model._reserved} - {
      model.id('<pad>')} | model._file.control
  if file == 'siglip.model':  # has no bytes: what it does not know is <unk>
    special.remove(model.id('<unk>'))
  typed = [*REFERENCE['special'], ' '.join(model._pieces[i] for i in special),
           ''.join(model._pieces[i] for i in special)]
  for words in typed + [published_text.AfterMark(words) for words in typed]:
    ids = model.encode(words)
    assert special.isdisjoint(ids), words
    assert ids or words == '\x04', words  # CLIP drops it
    if file in EXACT:
      back = words.replace('\x04', '\ufffd') if 'fuyu' in file else words
      assert model.decode(ids).strip(' ') == back.strip(' ')


@pytest.mark.parametrize('file', [
    'llama_fast.json', 'llava_hf.json', 'qwen2.json', 'clip.json'])
def test_typed_text_is_spelled_as_any_other(file):
  import tokenizers
  spec = json.loads((GOLDEN / file).read_text())
  typed = [added['content'] for added in spec['added_tokens']]
  assert typed
  spec['added_tokens'], spec['post_processor'] = [], None
  plain = tokenizers.Tokenizer.from_str(json.dumps(spec))
  for words in typed:
    assert tokenizer(file).encode(f'a {words} b') == plain.encode(
        f'a {words} b').ids


def test_the_references_would_make_typed_text_special():
  import tokenizers
  for file, words in (('llama_fast.json', '</s>'), ('clip.json', 'a <|endoftext'
                      '|>'), ('qwen2.json', '<tool_call>'),
                      ('fuyu.json', 'a|SPEAKER|b'), ('fuyu.json', '\x04')):
    theirs = tokenizers.Tokenizer.from_file(str(GOLDEN / file)).encode(
        words, add_special_tokens=False).ids
    ours = tokenizer(file).encode(words)
    assert set(theirs) - set(ours), file
  theirs = sentencepiece.SentencePieceProcessor(
      model_file=str(GOLDEN / 'fuyu.model')).EncodeAsIds('a|SPEAKER|b')
  assert tokenizer('fuyu.model').id('<patch>') in theirs
  assert tokenizer('fuyu.model').pieces(
      tokenizer('fuyu.model').encode('|SPEAKER|'))[1:5] == [
          '<0x7C>', 'S', 'P', 'E']


@pytest.mark.parametrize('file', EXACT)
def test_round_trip(file):
  model = tokenizer(file)
  for words in REFERENCE['texts']:
    back = words
    if file.endswith('.model') or 'llama' in file or 'llava' in file:
      back = back.replace('\u2581', ' ')  # the same to them
    if 'fuyu' in file:
      back = back.replace('\u2581', ' ').replace('\x04', '\ufffd')
    if file == 'fuyu.json':
      back = back.replace('<0x41>', 'A')  # as the reference
    if 'qwen2' in file:
      back = unicodedata.normalize('NFC', words)
    if file == 'llama_first.json':
      back = back.removeprefix(' ')  # takes a space of the text for its own
    assert model.decode(model.encode(words)) == back, words


def test_no_piece_goes_on_over_the_start_of_a_word():
  """What makes spans, encoded one by one, the same as whole turns."""
  pieces = tokenizer('llama.model')._pieces
  assert any(piece.startswith('\u2581') for piece in pieces)
  assert not any('\u2581' in piece.lstrip('\u2581') for piece in pieces)


def test_siglip_is_sentencepiece_of_lower_case():
  model = tokenizer('siglip.model')
  theirs = sentencepiece.SentencePieceProcessor(
      model_file=str(GOLDEN / 'siglip.model'))
  for words in REFERENCE['texts']:
    lower = ''.join(c.lower() if c.isascii() else c for c in words)
    assert model.encode(words) == theirs.EncodeAsIds(lower)
  assert model.id('<unk>') in model.encode('\u6f22')
  assert model.encode('A FOX') == model.encode('a fox') != []


def test_reserved_names():
  ids = {
      file: {name: model._pieces[model.id(name)] for name in model._reserved}
      for file in FAMILY for model in [tokenizer(file)]}
  assert ids['llama.model'] == {
      '<unk>': '<unk>', '<pad>': '<unk>', '<bos>': '<s>', '<eos>': '</s>',
      '<patch>': '<unk>', '<class>': '<unk>', '<newline>': '<unk>'}
  assert ids['llama_fast.json'] == ids['llama.model']
  assert ids['llava_hf.json']['<patch>'] == '<image>'
  assert ids['qwen2.json']['<eos>'] == '<|im_end|>'
  assert ids['clip.json'] == {
      '<pad>': '!', '<bos>': '<|startoftext|>', '<eos>': '<|endoftext|>'}
  assert ids['fuyu.json']['<answer>'] == '<0x04>'
  assert tokenizer('clip.json').id('<pad>') == 0
  with pytest.raises(errors.UserError, match="'<bos>' has no id .* 'qwen2'"):
    tokenizer('qwen2.json').id('<bos>')
  with pytest.raises(errors.UserError, match="'<user>' has no id .* 'llama'"):
    tokenizer('llama.model').id('<user>')


def test_pieces_that_a_program_adds():
  plain = tokenizer('llama.model')
  emu = tokenizer('llama.model', 'emu_instruct')
  assert [emu.id(n) - plain.vocab_size for n in (
      '<pad>', '<image>', '</image>', '<patch>', '<user>', '<assistant>')
  ] == list(range(6))
  assert emu.vocab_size == plain.vocab_size + 6
  emu2 = tokenizer('llama.model', 'emu2_chat')
  assert emu2.pieces(range(plain.vocab_size, emu2.vocab_size))[4:10] == [
      '[gIMG]', '[/gIMG]', '[EOC]', '[VIDEO]', '<grounding>', '<phrase>']
  assert emu2.decode([*emu2.encode('a fox'), plain.vocab_size + 5]) == 'a fox'
  ids = [emu.id('<user>'), *emu.encode('a fox'), emu.id('<assistant>')]
  assert emu.decode(ids) == 'a fox'
  assert emu.pieces(ids)[0] == '[USER]'


def test_a_text_behind_a_special_id():
  joined = published_text.AfterMark('USER: a')
  said = {
      join: tokenizer('llama.model', join=join) for join in
      published_text.JOINS}
  assert {join: said[join].pieces(said[join].encode(joined))
          for join in said} == {
      'space': [' US', 'ER', ':', ' a'], 'none': ['USER', ':', ' a'],
      'cut': ['US', 'ER', ':', ' a']}
  spaced = published_text.AfterMark(' a')
  assert said['cut'].encode(spaced) == said['cut'].encode(' a')
  assert said['cut'].encode(published_text.AfterMark('')) == []
  first, fast = (tokenizer(f'llama_{name}.json') for name in ('first', 'fast'))
  assert first.pieces(first.encode(joined)) == ['USER', ':', ' a']
  assert fast.pieces(fast.encode(joined)) == [' US', 'ER', ':', ' a']


@pytest.mark.parametrize('file', EXACT)
def test_a_text_behind_a_text(file):
  """Is what a whole text goes on with, where a space begins it."""
  model = tokenizer(file)
  for words in REFERENCE['texts'] + ['USER']:
    assert model.encode(f'a. {words}') == model.encode('a.') + model.encode(
        published_text.AfterText(f' {words}')), words


@pytest.mark.parametrize('file,style', [
    ('llama_fast.json', 'vicuna_v1'), ('llama_first.json', 'vicuna_v1'),
    ('qwen2.json', 'eve2')])
def test_spans_are_what_the_file_makes_of_the_whole(file, style):
  import tokenizers
  model = tokenizer(file)
  theirs = tokenizers.Tokenizer.from_file(str(GOLDEN / file))
  for words in REFERENCE['texts']:
    found = prompts.question_document(
        None, [(words, 'a fox'), ('and?', words), (words, words)], style=style)
    ids, _ = flat(found.spans, model, begin=False)
    whole = ''.join(
        span.data if isinstance(span.data, str) else
        model._pieces[model.id('<eos>')] for span in found.spans)
    assert ids[:-1] == theirs.encode(whole, add_special_tokens=False).ids, words


@pytest.mark.parametrize('file', FAMILY)
def test_storage(file):
  model = tokenizer(file, join='cut' if file == 'llama.model' else 'space')
  words = published_text.AfterMark("USER: it's 2 </s> \u6f22")
  for again in (text.Tokenizer.from_bytes(model.bytes),
                pickle.loads(pickle.dumps(model))):
    assert again.bytes == model.bytes and again.family == model.family
    assert again.encode(words) == model.encode(words)
  assert published_text.owns(model.bytes)
  assert not published_text.owns((GOLDEN / file).read_bytes())


def test_load_reads_what_lies_beside(tmp_path):
  path = tmp_path / 'tokenizer.model'
  path.write_bytes((GOLDEN / 'llama.model').read_bytes())
  joined = published_text.AfterMark('USER')
  sizes = []
  for said in (None, {}, {'legacy': True}, {'legacy': False}):
    if said is not None:
      (tmp_path / 'tokenizer_config.json').write_text(json.dumps(said))
    sizes.append(len(published_text.load(path).encode(joined)))
  assert sizes == [2, 2, 2, 1]
  cut = published_text.load(path, join='cut')
  assert cut.pieces(cut.encode(joined)) == ['US', 'ER']


def test_answers_are_decoded_to_their_end():
  model = tokenizer('qwen2.json')
  assert model.pieces([0]) == ['!']
  eos, ids = model.id('<eos>'), model.encode('no!!')
  assert model.decode([*ids, eos, 0, 0, 0]) == 'no!!'
  assert model.decode([*ids, 0]) == 'no!!!'
  assert model.decode([*ids, eos, *ids, eos, 0]) == 'no!!no!!'
  assert model.decode([]) == model.decode([eos, 0]) == ''
  llama = tokenizer('llama.model')
  assert llama.decode([1, *llama.encode('a fox'), 2, 0, 0]) == 'a fox'


def test_decoding_skips_special_ids():
  for file in ('fuyu.json', 'fuyu.model', 'qwen2.json', 'llava_hf.json'):
    model, ids = tokenizer(file), tokenizer(file).encode('a fox')
    special = [i for i in model._special if i != model.id('<eos>')]
    assert model.decode([*special, *ids, *special]) == 'a fox'
  with pytest.raises(IndexError):
    model.pieces([model.vocab_size])


def test_readable_pieces():
  for file in ('llama.model', 'llama_fast.json', 'qwen2.json', 'fuyu.json'):
    model = tokenizer(file)
    ids = model.encode('a red fox')
    assert ''.join(model.pieces(ids)).strip() == 'a red fox'
    assert model.pieces([model.id('<eos>')])[0][0] in '<|'
    assert len(model.pieces(range(model.vocab_size))) == model.vocab_size
  clip = tokenizer('clip.json')
  assert ''.join(clip.pieces(clip.encode('A Red  fox'))) == 'a red fox '
  assert clip.decode(clip.encode('A Red  fox')) == 'a red fox'


def test_clear_errors():
  with pytest.raises(ValueError, match='not a sentencepiece model'):
    published_text.Tokenizer(b'junk')
  with pytest.raises(ValueError, match='not a tokenizer.json'):
    published_text.Tokenizer(b'{"model": {}}')
  with pytest.raises(ValueError, match="named 'lama'.*llama"):
    tokenizer('llama.model', 'lama')
  with pytest.raises(ValueError, match="join is 'nothing'"):
    tokenizer('llama.model', join='nothing')
  with pytest.raises(ValueError, match=r'qwen2 needs <\|endoftext\|> <\|im_en'):
    tokenizer('llama.model', 'qwen2')
  own = text.train(['a cat'] * 9, 280)
  with pytest.raises(ValueError, match='no known family: .*clip needs'):
    published_text.Tokenizer(own)

"""Views: from one record of a corpus to one document.

A template says where pictures, words and reserved ids stand. Words fill whole
spans of their own, so that nothing a user types becomes a reserved id. Captions
and answers are learnt, and so is the <eos> between turns; the rest is read.

  caption        image, caption                         (EVE's "plain" prompt)
  question       image, <user> ... <assistant><answer> ...
  conversation   the same, all questions of the picture one after another,
                 each answer closed by <eos>            (LLaVA-1.5)
  text, text_conversation   the same words without their picture

<answer> says that a word or a short phrase follows: LLaVA-1.5 says it in words
(arXiv 2310.03744, section 3.2), Fuyu with one id as here.

These templates are the style 'own' of `STYLES`; the other styles are those of
the published models, to the letter.

A view draws what it must choose from a generator that the caller keys by
(seed, epoch, record), so that it is the same wherever the record is read.
"""

import re

from mmgen import errors
from mmgen.data import document as document_lib
from mmgen.data import published_text

_OWN = {
    'caption_before': '{image}{caption}',
    'caption_after': '{caption}{image}',
    'text': '{caption}',
    'turn': '<user>{question}<assistant><answer>{answer}',
    'between_turns': '<eos>',
}
# What is learnt of a template, and besides words between [ and ].
TARGETS = ('{caption}', '{answer}', '<eos>')

COLUMNS = ('raw', 'synthetic', 'fused', 'names')
PLACES = ('before', 'after', 'random')


_CHAT = (
    'A chat between a curious user and an artificial intelligence assistant. '
    "The assistant gives helpful, detailed, and polite answers to the user's "
    'questions.')
_EMU = (
    'You will be presented with an image:<image>ImageContent</image>. You will '
    'be able to see the image after I provide it to you. Please answer my '
    'questions based on the given image.')
_EMU2 = (
    'You are a helpful assistant, dedicated to delivering comprehensive and '
    'meticulous responses.')

_VICUNA = dict(
    question=(
        _CHAT + ' USER: {image}{question.line} ASSISTANT:{answer.spaced}'),
    question_text=_CHAT + ' USER: {question} ASSISTANT:{answer.spaced}',
    turn='USER: {question} ASSISTANT:{answer.spaced}',
    between_turns='<eos>')

# {style: {what is shown: template}}. A document is `<bos> ... <eos>` unless its
# style says `begin=False` or `end=False`. An empty answer that is not the last
# one is not closed by <eos>, as in the references.
STYLES = {
    'own': dict(
        _OWN, question='{image}' + _OWN['turn'], question_text=_OWN['turn']),
    # LLaVA, EVE: the first stages (and the second of EVE).
    'plain': dict(caption_before='{image}[{caption}\n]', end=False),
    # Vicuna, LLaVA-1.5, EVE.
    'vicuna_v1': _VICUNA,
    # EVEv2 with Qwen2.5.
    'eve2_plain': dict(
        caption_before='{image}[{caption.strip}\n]',
        text='[{caption.strip}\n]', begin=False, end=False),
    'eve2': dict(_VICUNA, begin=False),
    # Its layout puts <bos> behind the picture.
    'fuyu': dict(
        question='{image}{question}\n<answer>{answer}',
        question_text='{question}\n<answer>{answer}'),
    # Emu's tokenizer loses the spaces beside a special id.
    'emu': dict(
        caption_before='{image}{caption.strip}',
        caption_after='{caption.rstrip}{image}', text='{caption.rstrip}'),
    'emu_instruct': dict(
        question=(
            _EMU + '<user>:{image}{question.strip}<assistant>:'
            '{answer.tail}'),
        question_text='<user>:{question.tail}<assistant>:{answer.tail}'),
    'emu2_chat': dict(
        question=(
            _EMU2 + '<user>:{image}{question.strip}<assistant>:'
            '{answer.tail}'),
        question_text=(
            _EMU2 + '<user>:{question.tail}<assistant>:{answer.tail}'),
        turn='<user>:{question.tail}<assistant>:{answer.tail}',
        between_turns='<eos>'),
}

# What a template may do to a field: '{question.strip}'.
CHANGES = {
    'strip': str.strip,
    'rstrip': str.rstrip,
    # On a line of its own, if it says anything.
    'line': lambda text: f'\n{text.strip()}'.rstrip(),
    'tail': lambda text: f' {text}'.rstrip(),
    'spaced': lambda text: text and f' {text}',
}

_PARTS = re.compile(r'(\{\w+(?:\.\w+)?\}|</?\w+>|[\[\]])')


def template(style, name):
  """A template of `STYLES`."""
  if style not in STYLES:
    raise errors.UserError(
        f'no templates have the style {style!r}; there are: '
        f'{", ".join(STYLES)}')
  if name not in STYLES[style]:
    known = sorted(STYLES[style].keys() - {'begin', 'end'})
    raise errors.UserError(
        f'the style {style!r} has no template {name!r}; it has: '
        f'{", ".join(known)}')
  return STYLES[style][name]


def _document(style, parts, record_id):
  """A document of templates one behind another.

  Words side by side become one span, for the references encode them together,
  unless the one are learnt and the other are not.

  Args:
    style: A name of `STYLES`.
    parts: Pairs (name of a template, fields): pixels uint8 [Y, X, 3] for
      `image`, else a str.
    record_id: Name of the record.
  """
  spans = []
  for name, fields in parts:
    learnt = False  # between [ and ]
    for part in filter(None, _PARTS.split(template(style, name))):
      plain = re.sub(r'\.\w+\}', '}', part)
      role = 'target' if learnt or plain in TARGETS else 'input'
      if part in ('[', ']'):
        learnt = part == '['
      elif part == '{image}':
        spans.append(document_lib.image(fields['image']))
      elif part[0] == '<':
        spans.append(document_lib.marks(part, role=role))
      else:
        _write(spans, _words(part, fields), role)
  frame = {key: STYLES[style][key] for key in ('begin', 'end')
           if key in STYLES[style]}
  return document_lib.Document(tuple(spans), record_id, **frame)


def _words(part, fields):
  """What a part of a template, literal or a field, says."""
  if part[0] != '{':
    return part
  name, _, change = part[1:-1].partition('.')
  return CHANGES[change](fields[name]) if change else fields[name]


def _write(spans, words, role):
  """Appends words, to the last span if they belong together."""
  if spans and isinstance(spans[-1].data, str) and not spans[-1].data:
    spans.pop()  # an empty answer keeps nothing apart
  last = spans[-1] if spans else None
  kind = str
  if last and isinstance(last.data, str):
    kind = published_text.AfterText
    if last.role == role:
      kind, words = type(last.data), last.data + words
      spans.pop()
  elif last and isinstance(last.data, tuple):
    kind = published_text.AfterMark
  spans.append(document_lib.text(kind(words), role))


def caption_document(pixels, caption, place='before', record_id='',
                     style='own'):
  """A picture and its caption.

  Args:
    pixels: uint8 [Y, X, 3].
    caption: The text; any text will do for a prompt, which leaves it out.
    place: Where the picture stands, `before` or `after` the caption.
    record_id: Name of the record.
    style: A name of `STYLES`.
  """
  fields = dict(image=pixels, caption=caption)
  return _document(style, [(f'caption_{place}', fields)], record_id)


def text_document(words, record_id='', style='own'):
  """A caption, or any text, without a picture."""
  return _document(style, [('text', dict(caption=words))], record_id)


def question_document(pixels, turns, record_id='', style='own'):
  """A picture and questions about it.

  Args:
    pixels: uint8 [Y, X, 3]; None for questions alone.
    turns: Pairs (question, answer); the last answer may be anything for a
      prompt, which leaves it out.
    record_id: Name of the record.
    style: A name of `STYLES`.
  """
  parts, before = [], ''
  for i, (question, answer) in enumerate(turns):
    if i and (before or style == 'own'):
      parts.append(('between_turns', {}))
    name = 'turn' if i else 'question_text' if pixels is None else 'question'
    parts.append((name, dict(image=pixels, question=question, answer=answer)))
    before = answer
  return _document(style, parts, record_id)


def caption_text(record, column, language, generator):
  """The caption of a record.

  Args:
    record: A record of a corpus.
    column: A name of `COLUMNS`, or several joined by +, of which one is drawn;
      a name given twice is drawn twice as often. `names` are the names of the
      objects in `language`.
    language: Language of `names`.
    generator: np.random.Generator.
  """
  columns = column.split('+')
  chosen = columns[generator.integers(len(columns))]
  if chosen == 'names':
    return ', '.join(record['names'][language])
  return record['captions'][chosen]


def caption(record, source, generator):
  """A picture and one of its captions, in either order."""
  text = caption_text(record, source.column, source.language, generator)
  place = source.image_place
  if place == 'random':
    place = PLACES[generator.integers(2)]
  return caption_document(
      record['image'], text, place, record['id'], source.style)


def question(record, source, generator):
  """A picture and one of its questions."""
  asked = _questions(record)
  one = asked[generator.integers(len(asked))]
  return question_document(record['image'], [(one['question'], one['answer'])],
                           record['id'], source.style)


def conversation(record, source, generator):
  """A picture and all of its questions, in random order."""
  asked = _questions(record)
  turns = [(asked[i]['question'], asked[i]['answer'])
           for i in generator.permutation(len(asked))]
  pixels = None if source.view in WITHOUT_PICTURES else record['image']
  return question_document(pixels, turns, record['id'], source.style)


def _questions(record):
  if not record['questions']:
    raise errors.UserError(
        f"record {record['id']!r} has no questions: the views 'vqa' and "
        "'conversation' need a corpus that asks some")
  return record['questions']


def text(record, source, generator):
  """A caption without its picture."""
  words = caption_text(record, source.column, source.language, generator)
  return text_document(words, record['id'], source.style)


def pair(record, source, generator):
  """A picture and a caption for the layout `pair`."""
  words = caption_text(record, source.column, source.language, generator)
  return caption_document(
      record['image'], words, record_id=record['id'], style=source.style)


def check(where, source):
  """Raises UserError if a source names a choice that does not exist.

  Args:
    where: Its field in the config, such as `mix.captions`.
    source: A `mixture.Source`.
  """
  columns = source.column.split('+')
  for field, values, allowed in (
      ('view', [source.view], VIEWS),
      ('column', columns, COLUMNS),
      ('image_place', [source.image_place], PLACES),
      ('style', [source.style], STYLES)):
    for value in values:
      if value not in allowed:
        raise errors.UserError(
            f'{where}.{field} is {value!r}; allowed: {", ".join(allowed)}')
  if source.image_place != 'before' and source.view != 'caption':
    raise errors.UserError(
        f'{where}.image_place is {source.image_place!r}; the view '
        f"{source.view!r} only knows 'before'")
  if source.language != 'en' and 'names' not in columns:
    raise errors.UserError(
        f'{where}.language is {source.language!r}; only '
        f"{where}.column 'names' is known in other languages than 'en'")
  needs = dict(NEEDS, caption=(
      ('before', 'after') if source.image_place == 'random'
      else (source.image_place,)))[source.view]
  for name in needs:
    name = f'caption_{name}' if source.view == 'caption' else name
    if name not in STYLES[source.style]:
      raise errors.UserError(
          f'{where}.style {source.style!r} has no template {name!r}, which the '
          f'view {source.view!r} needs')
  if source.shuffle_pairs and source.view in WITHOUT_PICTURES:
    raise errors.UserError(
        f"{where}.shuffle_pairs is set; the view {source.view!r} has no "
        'pictures')


VIEWS = {
    'caption': caption,
    'vqa': question,
    'conversation': conversation,
    'text': text,
    'text_conversation': conversation,
    'pair': pair,
}
# The templates that a view needs; 'caption' needs those of its places.
NEEDS = {
    'vqa': ('question',), 'conversation': ('question', 'turn'),
    'text': ('text',), 'text_conversation': ('question_text', 'turn'),
    'pair': ('caption_before',)}
WITHOUT_PICTURES = ('text', 'text_conversation')

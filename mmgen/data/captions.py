"""Sentences about drawn scenes: small English, web noise, and a fuser.

Every scene has three captions, CapsFusion (arXiv 2310.20550, section 3) in
miniature. `raw` is what a web page might hold: a true name buried in file-name
junk, hashtags, code points or another language, sometimes cut off. `synthetic`
is what a captioner trained on name-free text says: fluent, true to the layout,
but with class words only. `fuse` sees these two texts alone, never the scene,
and writes one sentence with the name and the layout.
"""

import functools
import re

# Plurals that the endings do not give.
IRREGULAR = {
    'mouse': 'mice', 'goose': 'geese', 'fish': 'fish', 'blowfish': 'blowfish',
    'jellyfish': 'jellyfish', 'deer': 'deer', 'bison': 'bison',
    'moose': 'moose', 'ox': 'oxen', 'wolf': 'wolves', 'leaf': 'leaves',
    'knife': 'knives', 'tooth': 'teeth', 'foot': 'feet', 'shrimp': 'shrimp',
    'squid': 'squid', 'sushi': 'sushi', 'bus': 'buses', 'minibus': 'minibuses',
    'trolleybus': 'trolleybuses', 'snowman': 'snowmen'}

# Words that sound otherwise than their first letter.
_A_DESPITE_VOWEL = ('unicorn', 'ewe', 'one', 'euro', 'uniform')
_AN_DESPITE_CONSONANT = ('hourglass', 'x-ray')

NUMBERS = {1: 'one', 2: 'two', 3: 'three'}

# Words of web noise and of the sentences below. No held-out concept may be
# called by one of them (see `scenes.plan`).
NOISE = (
    'img', 'final', 'copy', 'free', 'download', 'clipart', 'vector', 'icon',
    'sticker', 'png', 'jpg', 'hd', 'new', 'stock', 'cute', 'wallpaper', 'buy',
    'uploads', 'wp', 'content', 'px', 'emoji', 'usd', 'tags', 'pack', 'set')
GLUE = (
    'a', 'an', 'and', 'on', 'ground', 'left', 'right', 'top', 'bottom',
    'middle', 'of', 'above', 'two', 'three', 'what', 'is', 'this',
    'the', 'at', 'where', 'how', 'many', 'there', 'are', 'drawings', 'drawing',
    'colour', 'yes', 'no')


def plural(name):
  """The plural of an English name; a name that is plural stays as it is."""
  *head, last = name.split(' ')
  if last in IRREGULAR:
    last = IRREGULAR[last]
  elif is_plural(last):
    pass
  elif last.endswith(('s', 'x', 'z', 'ch', 'sh')):
    last += 'es'
  elif last.endswith('y') and last[-2] not in 'aeiou':
    last = last[:-1] + 'ies'
  else:
    last += 's'
  return ' '.join([*head, last])


def is_plural(name):
  """Whether a name such as `grapes` is plural to begin with."""
  last = name.split(' ')[-1]
  return last.endswith('s') and not last.endswith(('ss', 'us', 'os', 'is'))


def indefinite(name):
  """The name with `a` or `an`; a plural name has no article."""
  if is_plural(name):
    return name
  vowel = name[0] in 'aeiou' and not name.startswith(_A_DESPITE_VOWEL)
  vowel = vowel or name.startswith(_AN_DESPITE_CONSONANT)
  return f'{"an" if vowel else "a"} {name}'


def sentence(kind, first, second, ground, across=True):
  """One fluent sentence about a scene.

  Args:
    kind: kind of scene, a key of `scenes.KINDS`.
    first: noun of the first (leftmost, upper or repeated) object.
    second: noun of the other object; unused for scenes of one concept.
    ground: colour name.
    across: whether a pair lies side by side rather than one above the other.

  Returns:
    str without full stop.
  """
  if kind == 'single':
    things = indefinite(first)
  elif kind == 'twins':
    things = f'two {plural(first)}'
  elif kind == 'triplets':
    things = f'three {plural(first)}'
  elif kind == 'two_and_one':
    things = f'two {plural(first)} and {indefinite(second)}'
  else:
    relation = 'left of' if across else 'above'
    things = f'{indefinite(first)} {relation} {indefinite(second)}'
  return f'{things} on {indefinite(ground)} ground'


def _choose(rng, items):
  return items[int(rng.integers(len(items)))]


def raw(rng, concepts, languages):
  """A web text that names the concepts, in order, and says little else.

  Args:
    rng: numpy Generator.
    concepts: the distinct `pictures.Concept`s of the scene.
    languages: language codes for an occasional foreign name.

  Returns:
    str. The English names or aliases come first and are never cut.
  """
  aliases = [
      c.name if rng.random() < 0.6 else _choose(rng, (c.name, *c.aliases))
      for c in concepts]
  number, size = int(rng.integers(1000, 9999)), _choose(rng, (72, 128, 512))
  noise = [_choose(rng, NOISE) for _ in range(3)]
  style = int(rng.integers(7))
  joint = ' + '.join(aliases)
  in_file = '__'.join(a.replace(' ', _choose(rng, '_-')) for a in aliases)
  if style == 0:
    text = f'IMG_{number}_{in_file}.png'
  elif style == 1:
    text = f'{in_file}-{size}x{size}.jpg | {noise[0]} {noise[1]}'
  elif style == 2:
    tags = ' '.join('#' + re.sub('[ -]', '', a) for a in aliases)
    text = f'{tags} #{noise[0]} #{noise[1]}'
  elif style == 3:
    text = f'{joint.upper()} {concepts[0].code} {noise[0]} {size}px'
  elif style == 4:
    text = f'wp-content/uploads/{number}/{in_file}_{noise[0]}({number % 9}).png'
  elif style == 5:
    language = _choose(rng, languages)
    text = f'{joint} / {concepts[0].names[language]} [{language}] {noise[0]}'
  else:
    text = f'{noise[0]} {joint}, {noise[1]} {noise[2]} - {number % 90}.99 USD'
  if rng.random() < 0.2:
    text = _cut(rng, text, aliases[-1])
  return text


def _cut(rng, text, alias):
  """Cuts a text at a random place behind the last alias."""
  plain = re.sub(r'[_\-]', ' ', text.lower())
  start = plain.rfind(alias.replace('-', ' '))
  if start < 0:  # a hashtag without its spaces
    return text
  end = start + len(alias)
  return text[:end + int(rng.integers(0, len(text) - end + 1))]


class Lexicon:
  """What a fuser must know: names with their aliases, and class words."""

  def __init__(self, concepts):
    """Builds the lexicon of a picture set.

    Args:
      concepts: iterable of `pictures.Concept`.
    """
    self.names = {}
    for concept in concepts:
      for alias in (concept.name, *concept.aliases):
        self.names.setdefault(alias.replace('-', ' '), concept.name)
        self.names.setdefault(
            alias.replace(' ', '').replace('-', ''), concept.name)
    self.kinds = {}
    for kind in sorted({c.kind for c in concepts}):
      self.kinds[kind] = False
      self.kinds[plural(kind)] = True
    self.longest = max(len(alias.split()) for alias in self.names)

  @functools.cached_property
  def nouns(self):
    """Pattern of a class word with its article."""
    words = '|'.join(sorted(map(re.escape, self.kinds), key=len, reverse=True))
    return re.compile(rf'\b(?:an? )?({words})\b')

  def find(self, text):
    """Distinct names in a text, longest match first, in order."""
    found = []
    for chunk in re.split(r'[^a-z_\- ]+|__', text.lower()):
      words = [w for w in re.split(r'[ _\-]+', chunk) if w]
      i = 0
      while i < len(words):
        for n in range(min(self.longest, len(words) - i), 0, -1):
          name = self.names.get(' '.join(words[i:i + n]))
          if name:
            if name not in found:
              found.append(name)
            break
        i += n
    return found


def fuse(raw_text, synthetic, lexicon):
  """Merges a raw and a synthetic caption, seeing nothing but the two.

  Args:
    raw_text: noisy text that holds names.
    synthetic: fluent sentence with class words.
    lexicon: `Lexicon` of the names.

  Returns:
    The synthetic sentence in which the i-th class word is replaced by the i-th
    name of the raw text; unchanged where the raw text names nothing.
  """
  names = iter(lexicon.find(raw_text))

  def replace(match):
    name = next(names, None)
    if name is None:
      return match.group(0)
    return plural(name) if lexicon.kinds[match.group(1)] else indefinite(name)

  return lexicon.nouns.sub(replace, synthetic)

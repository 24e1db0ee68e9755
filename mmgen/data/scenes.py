"""Drawn scenes: pictures, captions and questions with exact ground truth.

A scene is a pure function of (picture set, config, split, seed, index): no
running generator, no state, any order, any process. `plan` fixes what is held
out, `specify` decides everything about one scene without drawing, `draw` turns
it into pixels.

What is held out is decided by hashes of names, never by sample index:

  concepts      never drawn and never named in training, in any language
  compositions  every concept misses one ground colour and, in scenes of several
                objects, one place
  styles        some concepts are seen in one of the drawing styles only

A held-out split breaks exactly one of these rules, `validation` none. Outside
the held-out sets every (concept, ground) is equally likely, so that the colour
says as little as it can about the concept, and the answers of every type of
question are equally likely.
"""

import dataclasses
import functools
import hashlib
import itertools
import re

import numpy as np

from mmgen.data import captions
from mmgen.data import questions

# Raised whenever the same (config, split, seed, index) gives another scene.
VERSION = 1

SPLITS = ('train', 'validation', 'compositions', 'styles', 'concepts')

GROUNDS = {
    'blue': (50, 85, 185), 'green': (40, 125, 75), 'pink': (235, 120, 175),
    'grey': (150, 150, 155), 'purple': (145, 95, 185), 'orange': (235, 145, 60),
    'white': (240, 240, 240), 'black': (25, 25, 28)}
# Every ground has its own shade, up to this much in each channel: two scenes
# are never the same picture, and no single pixel value names a colour.
SHADE = 8

# Share of scenes; roles of their objects in reading order.
KINDS = {
    'single': (0.75, ('A',)),
    'pair': (0.10, ('AB', 'BA')),
    'twins': (0.05, ('AA',)),
    'two_and_one': (0.05, ('AAB', 'ABA', 'BAA')),
    'triplets': (0.05, ('AAA',))}

# Cells (top, left, bottom, right) of the frame and their place, by number of
# objects. Of three objects in a triangle, the two of a side are told apart by
# the side's direction.
ARRANGEMENTS = {
    1: ((((0, 0, 1, 1), 'middle'),),),
    2: ((((0, 0, 1, .5), 'left'), ((0, .5, 1, 1), 'right')),
        (((0, 0, .5, 1), 'top'), ((.5, 0, 1, 1), 'bottom'))),
    3: ((((0, .25, .5, .75), 'top'), ((.5, 0, 1, .5), 'left'),
         ((.5, .5, 1, 1), 'right')),
        (((0, 0, .5, .5), 'left'), ((0, .5, .5, 1), 'right'),
         ((.5, .25, 1, .75), 'bottom')),
        (((0, .5, .5, 1), 'top'), ((.25, 0, .75, .5), 'left'),
         ((.5, .5, 1, 1), 'bottom')),
        (((0, 0, .5, .5), 'top'), ((.25, .5, .75, 1), 'right'),
         ((.5, 0, 1, .5), 'bottom')))}
PLACES = ('left', 'right', 'top', 'bottom')


@dataclasses.dataclass(frozen=True)
class Config:
  """What scenes of one corpus look like.

  Attributes:
    pixels: side of the square picture.
    grounds: colour names, keys of `GROUNDS`.
    unseen: number of concepts held out.
    one_style: number of concepts seen in one style only.
    fill: smallest and largest side of an object, relative to its cell.
    what_by_place: whether pairs are asked for the name at a place, which needs
      pictures large enough to recognise half of.
  """
  pixels: int
  grounds: tuple
  unseen: int
  one_style: int
  fill: tuple = (0.8, 1.0)
  what_by_place: bool = False


@dataclasses.dataclass(frozen=True)
class Object:
  """One picture in a scene; y, x and size are pixels."""
  concept: str
  style: str
  variant: int
  where: str
  y: int
  x: int
  size: int


@dataclasses.dataclass(frozen=True)
class Scene:
  """Everything about a scene but its pixels."""
  id: str
  kind: str
  ground: str
  shade: tuple
  objects: tuple
  captions: dict
  questions: tuple


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
  """What is held out, derived from names alone.

  Attributes:
    config: `Config`.
    concepts: {name: `pictures.Concept`}, all of them.
    styles: names of the drawing styles.
    variants: number of tints.
    seen: names of training, sorted.
    unseen: held-out names, sorted.
    no_ground: {seen name: ground it never stands on in training}.
    no_place: {seen name: place it never has in training}.
    no_style: {some seen names: style they never have in training}.
    lexicon: `captions.Lexicon`.
  """
  config: Config
  concepts: dict
  styles: tuple
  variants: int
  seen: tuple
  unseen: tuple
  no_ground: dict
  no_place: dict
  no_style: dict
  lexicon: captions.Lexicon


def words(text):
  """Words of a text in any script; of Chinese and Japanese, characters."""
  return re.findall(
      r'[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+',
      text.lower())


def phrases(concept):
  """All that a concept is called in any language, as tuples of words."""
  texts = {*concept.names.values(), *concept.aliases, concept.name}
  texts |= {captions.plural(t) for t in (concept.name, *concept.aliases)}
  texts |= {t.replace(' ', '').replace('-', '') for t in texts}  # hashtags
  return {tuple(words(t)) for t in texts}


def _ranked(names, salt):
  """Names in an order that depends on each name's hash alone."""
  return sorted(
      names, key=lambda n: hashlib.sha256(f'{salt}:{n}'.encode()).digest())


def _separable(concepts):
  """Names of concepts whose words occur in nothing else that is ever said."""
  owners = {}
  others = [*captions.NOISE, *captions.GLUE, *GROUNDS,
            *(c.kind for c in concepts),
            *(captions.plural(c.kind) for c in concepts)]
  said = [(c.name, p) for c in concepts for p in phrases(c)]
  said += [('', tuple(words(t))) for t in others]
  for owner, phrase in said:
    for i, j in itertools.combinations(range(len(phrase) + 1), 2):
      owners.setdefault(phrase[i:j], set()).add(owner)
  return [
      c.name for c in concepts
      if all(owners[p] == {c.name} for p in phrases(c) if p)]


def plan(pictures, config):
  """Decides what is held out.

  Args:
    pictures: `pictures.PictureSet`.
    config: `Config`.

  Returns:
    `Plan`.

  Raises:
    ValueError: if too few concepts can be held out.
  """
  concepts = {c.name: c for c in pictures.concepts}
  candidates = _ranked(_separable(pictures.concepts), 'concept')
  if len(candidates) < config.unseen:
    raise ValueError(
        f'unseen={config.unseen}, but only {len(candidates)} concepts have '
        'names that occur in no other name')
  unseen = candidates[:config.unseen]
  seen = [n for n in concepts if n not in unseen]
  cycle = lambda salt, values: {
      n: values[i % len(values)] for i, n in enumerate(_ranked(seen, salt))}
  no_style = _ranked(seen, 'style')[:config.one_style]
  return Plan(
      config=config, concepts=concepts, styles=tuple(pictures.styles),
      variants=pictures.variants, seen=tuple(sorted(seen)),
      unseen=tuple(sorted(unseen)),
      no_ground=cycle('ground', config.grounds),
      no_place=cycle('place', PLACES),
      no_style={n: pictures.styles[i % len(pictures.styles)]
                for i, n in enumerate(no_style)},
      lexicon=captions.Lexicon(pictures.concepts))


def allowed(the_plan, split, name, ground, where, by_place=False):
  """Whether a concept may stand on a ground, at a place, in a split.

  Args:
    the_plan: `Plan`.
    split: one of `SPLITS`.
    name: concept.
    ground: colour.
    where: place, or 'middle'.
    by_place: in `compositions`, whether the place is what is new, rather than
      the ground.

  Returns:
    bool.
  """
  if split == 'concepts':
    return name in the_plan.unseen
  if name not in the_plan.no_ground:
    return False
  new_ground = the_plan.no_ground[name] == ground
  new_place = the_plan.no_place[name] == where
  if split == 'compositions':
    return (new_ground, new_place) == (not by_place, by_place)
  if split == 'styles' and name not in the_plan.no_style:
    return False
  return not new_ground and not new_place


def styles_of(the_plan, split, name):
  """Drawing styles that a concept may have in a split."""
  new = the_plan.no_style.get(name)
  if split == 'styles':
    return (new,)
  return tuple(s for s in the_plan.styles if s != new)


@functools.lru_cache(maxsize=64)
def _order(the_plan, split, seed, by_place, block):
  """One pass over all (concept, ground) of a split, in random order."""
  names = the_plan.unseen if split == 'concepts' else the_plan.seen
  pairs = [
      (n, g) for n in names for g in the_plan.config.grounds
      if allowed(the_plan, split, n, g,
                 the_plan.no_place[n] if by_place else 'middle', by_place)]
  rng = np.random.default_rng([seed, SPLITS.index(split), 1, by_place, block])
  return tuple(pairs[i] for i in rng.permutation(len(pairs)))


@functools.lru_cache(maxsize=1 << 12)
def _pool(the_plan, split, ground, where, by_place):
  """Concepts that may stand beside another one."""
  names = the_plan.unseen if split == 'concepts' else the_plan.seen
  return tuple(
      n for n in names
      if allowed(the_plan, split, n, ground, where, by_place))


def _choose(rng, items):
  return items[int(rng.integers(len(items)))]


def _kind(rng):
  """A kind of scene, by its share."""
  u = rng.random()
  for kind, (share, _) in KINDS.items():
    u -= share
    if u < 0:
      return kind
  return 'single'


def _compose(the_plan, split, rng, kind, name, ground, by_place):
  """Chooses cells, roles and the other concept.

  Returns:
    (cells, names): the arrangement and a concept for each of its cells.
  """
  options = []
  for roles in KINDS[kind][1]:
    for cells in ARRANGEMENTS[len(roles)]:
      mine = [w for (_, w), role in zip(cells, roles) if role == 'A']
      if all(allowed(the_plan, split, name, ground, w, by_place) for w in mine):
        options.append((roles, cells))
  roles, cells = _choose(rng, options)
  other = None
  if 'B' in roles:
    pool = _pool(the_plan, split, ground, cells[roles.index('B')][1], by_place)
    pool = [n for n in pool if n != name]
    if split == 'concepts':  # only class words can be asked for there
      kinds = {n: the_plan.concepts[n].kind for n in (*pool, name)}
      pool = [n for n in pool if kinds[n] != kinds[name]] or pool
    other = _choose(rng, pool)
  return cells, [name if role == 'A' else other for role in roles]


def _place(the_plan, split, rng, cells, names):
  """Chooses style, size and position of every object."""
  pixels, (low, high) = the_plan.config.pixels, the_plan.config.fill
  objects = []
  for (cell, where), name in zip(cells, names):
    top, left, bottom, right = (round(c * pixels) for c in cell)
    side = min(bottom - top, right - left)
    size = int(rng.integers(round(low * side), round(high * side) + 1))
    objects.append(Object(
        concept=name, style=_choose(rng, styles_of(the_plan, split, name)),
        variant=int(rng.integers(the_plan.variants)), where=where,
        y=top + int(rng.integers(bottom - top - size + 1)),
        x=left + int(rng.integers(right - left - size + 1)), size=size))
  return tuple(objects)


def _captions(rng, the_plan, kind, nouns, ground, across):
  """The three captions; `nouns` are the distinct concepts in their order."""
  concepts = [the_plan.concepts[n] for n in nouns]
  languages = sorted(concepts[0].names)
  raw = captions.raw(rng, concepts, languages)
  synthetic = captions.sentence(
      kind, concepts[0].kind, concepts[-1].kind, ground, across)
  return {'raw': raw, 'synthetic': synthetic,
          'fused': captions.fuse(raw, synthetic, the_plan.lexicon)}


def specify(the_plan, split, seed, index):
  """Decides everything about one scene.

  Args:
    the_plan: `Plan`.
    split: one of `SPLITS`.
    seed: int.
    index: int from 0.

  Returns:
    `Scene`.
  """
  rng = np.random.default_rng([seed, SPLITS.index(split), 0, index])
  kind = _kind(rng)
  by_place = split == 'compositions' and kind == 'pair' and rng.random() < 0.5
  order = _order(the_plan, split, seed, by_place, 0)
  block, i = divmod(index, len(order))
  name, ground = _order(the_plan, split, seed, by_place, block)[i]
  cells, names = _compose(
      the_plan, split, rng, kind, name, ground, by_place)
  objects = _place(the_plan, split, rng, cells, names)
  other = next((n for n in names if n != name), None)
  nouns = names[:1] if kind == 'pair' else [name]
  nouns += [n for n in (name, other) if n and n not in nouns]
  across = cells[0][1] == 'left'
  texts = _captions(rng, the_plan, kind, nouns, ground, across)
  asked = questions.ask(
      rng, the_plan, split, kind, name, other, ground, objects)
  shade = tuple(
      int(np.clip(c + rng.integers(-SHADE, SHADE + 1), 0, 255))
      for c in GROUNDS[ground])
  return Scene(
      id=f'{split}-{index:07d}', kind=kind, ground=ground, shade=shade,
      objects=objects, captions=texts, questions=asked)


def draw(pictures, the_plan, scene):
  """Draws a scene.

  Args:
    pictures: the `pictures.PictureSet` of the plan.
    the_plan: `Plan`.
    scene: `Scene`.

  Returns:
    (image, mask, boxes): uint8 [Y, X, 3]; uint8 [Y, X], 0 on the ground and k
    on the k-th object where its alpha is at least one half; and one box
    (top, left, bottom, right) in 0..1 an object, tight around its mask.
  """
  side = the_plan.config.pixels
  image = np.empty((side, side, 3), np.uint8)
  image[:] = scene.shade
  mask, boxes = np.zeros((side, side), np.uint8), []
  for k, item in enumerate(scene.objects, 1):
    cut = pictures.cutout(
        the_plan.concepts[item.concept], item.style, item.variant, item.size)
    here = np.s_[item.y:item.y + item.size, item.x:item.x + item.size]
    alpha = cut[..., 3:].astype(np.uint16)
    mixed = cut[..., :3] * alpha + image[here] * (255 - alpha) + 127
    image[here] = (mixed // 255).astype(np.uint8)
    mask[here][cut[..., 3] >= 128] = k
    ys, xs = np.nonzero(mask == k)
    boxes.append((ys.min() / side, xs.min() / side, (ys.max() + 1) / side,
                  (xs.max() + 1) / side))
  return image, mask, boxes

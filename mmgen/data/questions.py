"""Questions about drawn scenes, with short answers that cannot be guessed.

Of every type, each answer is equally likely, and as far as the type allows it
also for each concept that is asked about: `what` (the name), `colour` (of the
ground), `count` (1, 2, 3), `where` (left, right, top, bottom, middle), `exists`
(yes, no; the absent concept is one of the same class).
"""

from mmgen.data import captions

TYPES = ('what', 'colour', 'count', 'where', 'exists')

# Concepts of a scene of each kind: two A and one B, and so on.
ROLES = {'single': 'A', 'pair': 'AB', 'twins': 'AA', 'two_and_one': 'AAB',
         'triplets': 'AAA'}

# How often a scene of a kind is asked for its number of drawings, or of role A
# or B by name. Times KINDS' shares, 1, 2 and 3 are equally often the answer:
# 'all' 0.05 each, by name 0.025 each.
COUNTED = {
    'single': {'all': 0.05 / 0.75},
    'pair': {'all': 1 / 4, 'A': 1 / 8},
    'twins': {'all': 1 / 2, 'A': 1 / 4},
    'two_and_one': {'all': 1 / 2, 'A': 1 / 4, 'B': 1 / 4},
    'triplets': {'all': 1 / 2, 'A': 1 / 2}}
# Pairs are always asked for a place; as often as each of theirs, a single
# object is asked for, whose place is the middle.
PLACED = {'single': 0.025 / 0.75, 'pair': 1.0}
# Share of place questions that use the class word, where it is unambiguous.
BY_KIND = 1 / 3


def _choose(rng, items):
  return items[int(rng.integers(len(items)))]


def _question(kind, question, answer):
  return {'type': kind, 'question': question, 'answer': answer}


def _count(rng, split, kind, name, other):
  """A question for a number, or None."""
  asked, u = None, rng.random()
  for what, share in COUNTED[kind].items():
    if 0 <= u < share:
      asked = what
    u -= share
  if asked == 'all':
    number = str(len(ROLES[kind]))
    return _question('count', 'how many drawings are there?', number)
  if asked is None or split == 'concepts':
    return None
  things = captions.plural(name if asked == 'A' else other)
  return _question(
      'count', f'how many {things} are there?',
      str(ROLES[kind].count(asked)))


def _where(rng, the_plan, split, kind, objects):
  """A question for a place, or None."""
  u, by_kind = rng.random(), split == 'concepts' or rng.random() < BY_KIND
  asked = _choose(rng, objects)
  if u >= PLACED.get(kind, 0):
    return None
  kinds = [the_plan.concepts[o.concept].kind for o in objects]
  name = the_plan.concepts[asked.concept].kind
  if not by_kind or kinds.count(name) > 1:
    if split == 'concepts':
      return None
    name = asked.concept
  verb = 'are' if captions.is_plural(name) else 'is'
  return _question('where', f'where {verb} the {name}?', asked.where)


def _exists(rng, the_plan, split, names, ground):
  """Asks for a concept that is there, or for an absent one of its class.

  In training nothing is asked on the ground it never stands on: there the
  answer would always be no.
  """
  asked, yes = _choose(rng, sorted(set(names))), rng.random() < 0.5
  if not yes:
    kind = the_plan.concepts[asked].kind
    absent = [
        n for n in the_plan.seen if n not in names
        and (split == 'compositions' or the_plan.no_ground[n] != ground)]
    same = [n for n in absent if the_plan.concepts[n].kind == kind]
    asked = _choose(rng, same or absent)
  name = captions.indefinite(asked)
  verb = 'are' if captions.is_plural(asked) else 'is'
  return _question('exists', f'{verb} there {name}?', 'yes' if yes else 'no')


def ask(rng, the_plan, split, kind, name, other, ground, objects):
  """All questions about a scene; of each type at most one.

  Args:
    rng: numpy Generator.
    the_plan: `scenes.Plan`.
    split: one of `scenes.SPLITS`.
    kind: kind of the scene, a key of `ROLES`.
    name: concept in role A.
    other: concept in role B, or None.
    ground: colour name.
    objects: tuple of `scenes.Object`.

  Returns:
    tuple of {'type', 'question', 'answer'}.
  """
  questions = []
  if split != 'concepts':  # a name never trained cannot be said
    if kind == 'single':
      questions.append(_question('what', 'what is this?', name))
    elif kind == 'pair' and the_plan.config.what_by_place:
      asked = _choose(rng, objects)
      at = {'left': 'on the left', 'right': 'on the right',
            'top': 'at the top', 'bottom': 'at the bottom'}[asked.where]
      questions.append(_question('what', f'what is {at}?', asked.concept))
  questions += [
      _question('colour', 'what colour is the ground?', ground),
      _count(rng, split, kind, name, other),
      _where(rng, the_plan, split, kind, objects)]
  if split != 'concepts':
    questions.append(
        _exists(rng, the_plan, split, [o.concept for o in objects], ground))
  return tuple(q for q in questions if q)

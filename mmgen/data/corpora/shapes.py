"""Coloured shapes: the corpus for machines without the picture packages."""

from mmgen.data import pictures
from mmgen.data import scenes

# Class word of each shape of `pictures.OUTLINES`.
KINDS = {
    'triangle': 'polygon', 'square': 'polygon', 'pentagon': 'polygon',
    'hexagon': 'polygon', 'diamond': 'polygon', 'trapezoid': 'polygon',
    'circle': 'curve', 'oval': 'curve', 'ring': 'curve', 'crescent': 'curve',
    'semicircle': 'curve', 'drop': 'curve', 'flower': 'curve',
    'star': 'symbol', 'cross': 'symbol', 'heart': 'symbol', 'arrow': 'symbol',
    'bolt': 'symbol', 'hourglass': 'symbol', 'house': 'symbol'}

SIZES = {
    'tiny': dict(
        scenes=scenes.Config(
            pixels=32, grounds=('blue', 'green', 'pink', 'grey'), unseen=4,
            one_style=8),
        train=16384, evaluation=2048, vocab=640)}


def picture_set(size):
  """The `pictures.PictureSet` of a size; all sizes have the same shapes."""
  del size
  concepts = tuple(
      pictures.Concept(name, kind, names={'en': name}, code=f's{i:03}')
      for i, (name, kind) in enumerate(KINDS.items()))
  source = dict(
      package='pillow', version=pictures.version('pillow'),
      licence='Apache-2.0', attribution='Shapes drawn by mmgen.')
  return pictures.PictureSet(
      concepts=concepts, styles=('filled', 'outlined'), draw=pictures.shape,
      sources={'filled': source, 'outlined': source},
      variants=len(pictures.TINTS))

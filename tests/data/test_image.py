"""Tests of mmgen.data.image."""

import numpy as np
import pytest

from mmgen import errors
from mmgen.data import document
from mmgen.data import image


def noise(y, x):
  return np.random.default_rng(0).integers(0, 256, (y, x, 3), np.uint8)


def eve_cells(y, x, cells=24):
  """Cells of the shorter side as EVE's released preprocessing counts them."""
  edge = cells * 14
  return int(np.ceil(edge * min(y, x) / max(y, x) / 14))


def test_square_stretches():
  pixels, valid = image.fit_pixels(noise(5, 9), (8, 8), 'square', 'bicubic',
                                   (2, 2))
  assert pixels.shape == (8, 8, 3) and pixels.dtype == np.uint8
  assert valid is None


@pytest.mark.parametrize('kernel', image.KERNELS)
def test_right_size_is_untouched(kernel):
  pixels = noise(8, 12)
  same, _ = image.fit_pixels(pixels, (8, 12), 'square', kernel, (2, 3))
  np.testing.assert_array_equal(same, pixels)


def test_kernels_differ():
  results = [image.resize(noise(16, 16), (8, 8), k).tobytes()
             for k in image.KERNELS]
  assert len(set(results)) == len(results)


@pytest.mark.parametrize('y,x', [(640, 480), (480, 640), (500, 333), (7, 100),
                                 (100, 1), (336, 336), (337, 336)])
def test_pad_counts_cells_like_eve(y, x):
  pixels, valid = image.fit_pixels(noise(y, x), (96, 96), 'pad', 'bicubic',
                                   (24, 24))
  top, left, height, width = valid
  short = eve_cells(y, x)
  if y >= x:
    assert (top, height) == (0, 96)
    assert (left, width) == ((24 - short) // 2 * 4, short * 4)
  else:
    assert (left, width) == (0, 96)
    assert (top, height) == ((24 - short) // 2 * 4, short * 4)
  outside = np.ones((96, 96), bool)
  outside[top:top + height, left:left + width] = False
  assert (pixels[outside] == image.PADDING).all()
  inside = pixels[top:top + height, left:left + width]
  np.testing.assert_array_equal(
      inside, image.resize(noise(y, x), (height, width), 'bicubic'))


def test_pad_by_hand_on_a_canvas_that_is_not_square():
  # 4 x 2 pixels on 8 x 12 with cells of 4 x 4: the height binds, 8 x 4 pixels
  # are picture, one column of cells; of two spare columns one leads.
  _, valid = image.fit_pixels(noise(4, 2), (8, 12), 'pad', 'bicubic', (2, 3))
  assert valid == (0, 4, 8, 4)
  _, valid = image.fit_pixels(noise(1, 12), (8, 12), 'pad', 'bicubic', (2, 3))
  assert valid == (0, 0, 4, 12)


def test_fit_document_touches_pictures_only():
  d = document.Document(
      (document.text('a'), document.image(noise(4, 2))), 'd', {'k': 1})
  fitted = image.fit_document(d, size=(8, 12), fit='pad', kernel='bicubic',
                              grid=(2, 3))
  assert fitted.spans[0] is d.spans[0]
  assert fitted.spans[1].data.shape == (8, 12, 3)
  assert fitted.spans[1].valid == (0, 4, 8, 4)
  assert (fitted.id, fitted.meta) == ('d', {'k': 1})


def test_errors_name_the_field():
  with pytest.raises(errors.UserError, match=r"image.fit is 'crop'.*square"):
    image.check((8, 8), 'crop', 'bicubic', (2, 2))
  with pytest.raises(errors.UserError, match=r"image.kernel is 'cubic'"):
    image.check((8, 8), 'pad', 'cubic', (2, 2))
  with pytest.raises(errors.UserError, match=r'image.size \(8, 9\).*2 x 2'):
    image.check((8, 9), 'pad', 'bicubic', (2, 2))
  for wrong in (noise(4, 4).astype(float), noise(4, 4)[..., :1],
                noise(4, 4)[:0]):
    with pytest.raises(ValueError, match='uint8'):
      image.fit_pixels(wrong, (8, 8), 'square', 'bicubic', (2, 2))

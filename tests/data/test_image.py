"""Tests of mmgen.data.image.

tests/golden/image_fits.npz holds what the image processors of transformers
4.56.2 (CLIP's, LLaVA's, Fuyu's) and open_clip 3.3.0 (torchvision 0.28.0) make
of noise, before they scale it; eve_fits.npz what the released code of EVE does;
Pillow 13.0.0.
"""

import functools
import hashlib
import pathlib

import numpy as np
import pytest

from mmgen import errors
from mmgen.data import document
from mmgen.data import image


def noise(y, x):
  return np.random.default_rng(0).integers(0, 256, (y, x, 3), np.uint8)


GOLDEN = pathlib.Path(__file__).parents[1] / 'golden'


@functools.cache
def golden():
  with np.load(GOLDEN / 'image_fits.npz') as file:
    return dict(file)


def drawn(seed, size):
  """The noise of which only a hash of the result is stored."""
  return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def sha256(pixels):
  return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()


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


@pytest.mark.parametrize('fit, edge', [('pad', 672), ('pad_pairs', 1344)])
def test_pad_of_the_published_sizes_equals_the_reference(fit, edge):
  with np.load(GOLDEN / 'eve_fits.npz') as file:
    stored = dict(file)
  for i, size in enumerate(stored['eve/sizes']):
    pixels, valid = image.fit_pixels(
        drawn(400 + i, size), (edge, edge), fit, 'bicubic', (edge // 28,) * 2)
    assert valid == tuple(stored[f'eve/{edge}/valid'][i])
    assert sha256(pixels) == stored[f'eve/{edge}/hashes'][i]


@pytest.mark.parametrize('edge', [800, 1600])
@pytest.mark.parametrize('fit', ['area', 'area_up'])
def test_area_equals_the_reference(fit, edge):
  with np.load(GOLDEN / 'eve_fits.npz') as file:
    stored = dict(file)
  for i, size in enumerate(stored['area/sizes']):
    pixels, (top, left, y, x) = image.fit_pixels(
        drawn(500 + i, size), (2 * edge,) * 2, fit, 'bicubic',
        (edge // 16,) * 2)
    assert (top, left, y, x) == (0, 0, *stored[f'{fit}/{edge}/crops'][i])
    assert sha256(pixels[:y, :x]) == stored[f'{fit}/{edge}/hashes'][i]


def test_area_of_what_does_not_fit_is_shrunk():
  # 4 x 100 pixels to an area of 8 x 8: 2 x 40 pixels, and 16 are there.
  for fit in ('area', 'area_up'):
    pixels, valid = image.fit_pixels(noise(4, 100), (16, 16), fit, 'bicubic',
                                     (4, 4))
    assert valid == (0, 0, 4, 16)
    np.testing.assert_array_equal(
        pixels[:4], image.resize(noise(4, 100), (4, 16), 'bicubic'))
    assert (pixels[4:] == image.PADDING).all()


def test_pad_by_hand_on_a_canvas_that_is_not_square():
  # 4 x 2 pixels on 8 x 12 with cells of 4 x 4: the height binds, 8 x 4 pixels
  # are picture, one column of cells; of two spare columns one leads.
  _, valid = image.fit_pixels(noise(4, 2), (8, 12), 'pad', 'bicubic', (2, 3))
  assert valid == (0, 4, 8, 4)
  _, valid = image.fit_pixels(noise(1, 12), (8, 12), 'pad', 'bicubic', (2, 3))
  assert valid == (0, 0, 4, 12)


@pytest.mark.parametrize('edge', [13, 24])
@pytest.mark.parametrize('fit', image.SQUARES)
def test_squares_equal_the_reference(fit, edge):
  # 37 x 23, 40 x 1, 1 x 40, 5 x 9, 60 x 61, 13 x 13, ... pixels
  for i in range(len(golden()['sizes'])):
    pixels, valid = image.fit_pixels(
        golden()[f'picture/{i}'], (edge, edge), fit, 'bicubic', (3, 3))
    np.testing.assert_array_equal(pixels, golden()[f'{fit}/{edge}/{i}'])
    assert valid is None


@pytest.mark.parametrize('fit', image.SQUARES)
def test_squares_of_336_pixels_equal_the_reference(fit):
  for i, size in enumerate(golden()['true']):
    pixels, _ = image.fit_pixels(
        drawn(300 + i, size), (336, 336), fit, 'bicubic', (24, 24))
    assert sha256(pixels) == golden()[f'{fit}/true_hashes'][i]


def test_clip_and_open_clip_cut_off_different_pixels():
  # 7 pixels too many: three are cut off in front, or four.
  picture = np.arange(8 * 15 * 3, dtype=np.uint8).reshape(8, 15, 3)
  clip, open_clip = (image.fit_pixels(picture, (8, 8), fit, 'bicubic', (2, 2))
                     for fit in ('clip', 'open_clip'))
  np.testing.assert_array_equal(clip[0], picture[:, 3:11])
  np.testing.assert_array_equal(open_clip[0], picture[:, 4:12])


def test_expand_by_hand():
  pixels, _ = image.fit_pixels(noise(8, 5), (8, 8), 'expand', 'bicubic', (2, 2))
  np.testing.assert_array_equal(pixels[:, 1:6], noise(8, 5))
  assert (pixels[:, [0, 6, 7]] == (122, 116, 104)).all()


def test_fuyu_equals_the_reference():
  # A canvas of 20 x 35 pixels and cells of 5 x 5: pictures smaller, larger in
  # one and in both directions, and 77 rows that shrink to 19 by rounding.
  for i in range(len(golden()['fuyu/sizes'])):
    pixels, valid = image.fit_pixels(
        golden()[f'fuyu/picture/{i}'], (20, 35), 'fuyu', 'bilinear', (4, 7))
    expected = golden()[f'fuyu/crop/{i}']
    assert valid == (0, 0, *expected.shape[:2])
    np.testing.assert_array_equal(pixels[:valid[2], :valid[3]], expected)
    assert (pixels[valid[2]:] == 1).all() and (pixels[:, valid[3]:] == 1).all()


def test_fuyu_of_the_published_size_equals_the_reference():
  for i, size in enumerate(golden()['fuyu/true']):
    pixels, valid = image.fit_pixels(
        drawn(200 + i, size), (1080, 1920), 'fuyu', 'bilinear', (36, 64))
    assert valid == (0, 0, *golden()['fuyu/true_crops'][i])
    crop = pixels[:valid[2], :valid[3]]
    assert sha256(crop) == golden()['fuyu/true_hashes'][i]


def test_fuyu_keeps_a_pixel_of_what_the_reference_refuses():
  pixels, valid = image.fit_pixels(noise(1, 90), (20, 35), 'fuyu', 'bilinear',
                                   (4, 7))
  assert valid == (0, 0, 5, 35)
  assert (pixels[1:] == 1).all() and (pixels[0] > 1).any()


def test_fit_document_touches_pictures_only():
  d = document.Document(
      (document.text('a'), document.image(noise(4, 2))), 'd', {'k': 1})
  fitted = image.fit_document(d, size=(8, 12), fit='pad', kernel='bicubic',
                              grid=(2, 3))
  assert fitted.spans[0] is d.spans[0]
  assert fitted.spans[1].data.shape == (8, 12, 3)
  assert fitted.spans[1].valid == (0, 4, 8, 4)
  assert (fitted.id, fitted.meta) == ('d', {'k': 1})


@pytest.mark.parametrize('size, hashes', [
    ((300, 517), ('9ee9f20487c17475', '0351881c511440df')),
    ((97, 40), ('8eda9d6ab0a76609', '4df43a1874af4f4e'))])
def test_emu_stretches(size, hashes):
  # Emu's `process_img` and Emu2's transform, before they scale the pixels.
  for edge, wanted in zip((224, 448), hashes):
    pixels, valid = image.fit_pixels(
        noise(*size), (edge, edge), 'square', 'bicubic', None)
    assert sha256(pixels).startswith(wanted)
    assert valid is None


def test_errors_name_the_field():
  with pytest.raises(errors.UserError, match=r"image.fit is 'crop'.*square"):
    image.check((8, 8), 'crop', 'bicubic', (2, 2))
  with pytest.raises(errors.UserError, match=r"image.kernel is 'cubic'"):
    image.check((8, 8), 'pad', 'cubic', (2, 2))
  with pytest.raises(errors.UserError, match=r'image.size \(8, 9\).*2 x 2'):
    image.check((8, 9), 'pad', 'bicubic', (2, 2))
  with pytest.raises(errors.UserError, match="'expand' both sides must be eq"):
    image.check((8, 12), 'expand', 'bicubic', (2, 2))
  for fit in image.CELLS:
    with pytest.raises(errors.UserError, match='Allowed: square, clip, open_c'):
      image.check((8, 8), fit, 'bicubic', None)
  image.check((8, 9), 'square', 'bicubic', None)
  with pytest.raises(errors.UserError, match='3 x 2 cells; both must be even'):
    image.check((12, 8), 'pad_pairs', 'bicubic', (3, 2))
  # CLIP's convolution leaves out what does not fill a patch.
  image.check((9, 9), 'clip', 'bicubic', (2, 2))
  for wrong in (noise(4, 4).astype(float), noise(4, 4)[..., :1],
                noise(4, 4)[:0]):
    with pytest.raises(ValueError, match='uint8'):
      image.fit_pixels(wrong, (8, 8), 'square', 'bicubic', (2, 2))

"""Resized positions against the references.

tests/golden/eva_positions.npz holds tables and what became of them in the code
of EVA-CLIP ('plain'), in open_clip 3.3.0, with which timm 1.0.31 agrees
('antialias'), and, to grids that are not square, in
torch.nn.functional.interpolate of torch 2.13.0.
"""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from mmgen.models import positions

FILE = pathlib.Path(__file__).parents[1] / 'golden' / 'eva_positions.npz'
METHODS = ('plain', 'antialias')


@pytest.mark.parametrize('method', METHODS)
def test_equal_to_the_references(method):
  with np.load(FILE) as file:
    golden = dict(file)
  cases = sorted({name.split('/')[0] for name in golden})
  assert len(cases) == 7
  for case in cases:
    table, old, new = (golden[f'{case}/{k}'] for k in ('table', 'old', 'new'))
    theirs = golden[f'{case}/{method}']
    found = positions.resize_positions(table, old, new, method)
    assert found.dtype == np.float32 and found.shape == theirs.shape
    np.testing.assert_allclose(found, theirs, rtol=1e-5, atol=2e-6)
    np.testing.assert_array_equal(found[0], table[0])
    # The same without a class token.
    np.testing.assert_array_equal(
        positions.resize_positions(table[1:], old, new, method), found[1:])


@pytest.mark.parametrize('method', METHODS)
def test_the_same_grid_is_the_same_table(method):
  table = np.random.default_rng(0).normal(size=(13, 2)).astype(np.float32)
  found = positions.resize_positions(table, (3, 4), (3, 4), method)
  np.testing.assert_allclose(found, table, atol=1e-6)


def test_dtype_is_kept():
  table = jnp.ones((4, 2), jnp.bfloat16)
  found = positions.resize_positions(table, (2, 2), (3, 1))
  assert found.dtype == jnp.bfloat16 and (found == 1).all()


def test_refusals():
  table = np.zeros((10, 2), np.float32)
  with pytest.raises(ValueError, match='10 positions are not a grid of 2 x 4'):
    positions.resize_positions(table, (2, 4), (3, 3))
  with pytest.raises(ValueError, match="'nearest'; allowed: plain, antialias"):
    positions.resize_positions(table, (3, 3), (4, 4), 'nearest')

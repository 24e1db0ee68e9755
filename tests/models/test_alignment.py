"""The patch aligning layer against the released one, which is on no index.

The arrays in tests/golden/patch_aligner*.npz come from EVE's own layer with
random weights and hidden states (torch 2.13.0, fp32, CPU).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from mmgen.models import alignment


@pytest.mark.parametrize('heads', [8, 2])
def test_prediction_equals_the_reference(heads):
  with np.load(reference.GOLDEN / 'patch_aligner.npz') as file:
    golden = dict(file)
  layers, width = int(golden['layers']), golden['teacher'].shape[-1]
  hidden_BTLD = golden['hidden']
  config = alignment.PatchAlignerConfig(
      layers, hidden_BTLD.shape[-1], width, heads=heads)
  assert config.taps == (8, 4, 0)
  aligner = alignment.PatchAligner(config)
  apply = jax.jit(lambda hidden: aligner.apply(
      {'params': reference.patch_aligner(golden, 'param/')}, hidden)[0])
  worst = 0.0
  for i, (start, box) in enumerate(zip(golden['starts'], golden['boxes'])):
    rows, cols = box[2:]
    # Behind the class token; each row ends in a split token.
    span = hidden_BTLD[i, start + 1:start + 1 + rows * (cols + 1)]
    cells = span.reshape(rows, cols + 1, *span.shape[1:])[:, :-1]
    cells = cells.reshape(rows * cols, *span.shape[1:])
    found = apply({l: cells[:, l] for l in config.taps})
    expected = golden[f'prediction/{i}']
    worst = max(worst, np.abs(found - expected).max() / np.abs(expected).max())
  # Two heads instead of the reference's eight must be seen to differ.
  assert (worst < 1e-5) == (heads == 8), worst


def test_parameter_count_of_eve_7b():
  config = alignment.SIZES['eve-7b']
  assert config.taps == (32, 28, 24, 20, 16, 12, 8, 4, 0)
  hidden = {l: jnp.zeros((1, 4096)) for l in config.taps}
  shapes = jax.eval_shape(lambda: alignment.PatchAligner(config).init(
      jax.random.key(0), hidden))['params']
  assert sum(p.size for p in jax.tree.leaves(shapes)) == 43_067_392


def test_flops_by_hand():
  config = alignment.PatchAlignerConfig(8, 24, 16)
  # 3 taps and the direct path, the output, and 2 keys read twice.
  assert alignment.flops(config) == 2 * (4 * 24 * 16 + 16 * 16 + 2 * 2 * 16)


@pytest.mark.parametrize('fields, said', [
    (dict(layers=3),
     'aligner.interval is 4; allowed: 1 to the number of layers'),
    (dict(layers=8, heads=3), 'aligner.heads: 3 does not divide'),
])
def test_impossible_configs(fields, said):
  with pytest.raises(ValueError, match=said):
    alignment.PatchAlignerConfig(
        **{**dict(decoder_width=8, width=16), **fields})

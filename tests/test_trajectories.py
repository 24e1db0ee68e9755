"""200 steps of training against the reference trainers.

The arrays in tests/golden/trajectories/*.npz hold initial weights (float16),
images, captions and the rows of each batch, and what the reference made of
them in float64 on a CPU with torch 2.13.0: loss and gradient norm of each
step, and the final weights under our names.

  open_clip        mlfoundations/open_clip 89fb801: its CLIP, `ClipLoss`,
                   `create_optimizer` (AdamW), `cosine_lr`, and its clamp of
                   the logit scale, here at 2.7, which the run reaches
  eva02_lamb       baaivision/EVA, EVA-CLIP-18B/shinji: its EVA-02 tower,
                   `create_optimizer` with layer-wise rates and its `Lamb`, two
                   towers at different rates, `warmup_cosine_lr`. Its gradient
                   is clipped to 5, and by `Lamb` to 1. (`Lamb` fails on
                   parameters of no axes; the sum of squares it begins with was
                   given none.)
  eva18_deepspeed  the same trainer with the tower of EVA-CLIP-18B, no weight
                   decay, a constant temperature, and the arithmetic of
                   DeepSpeed's fused LAMB (csrc/lamb/fused_lamb_cuda_kernel.cu),
                   one tensor at a time; both bounds of the trust ratio are met

Every trained tensor is compared but `ZERO_GRADIENT`. We compute in float32.
"""

import ml_collections
import numpy as np
import pytest
import trajectories

VOCAB = 24
# A bias of all keys changes no softmax: its gradient is zero but for rounding,
# which Adam makes steps of.
ZERO_GRADIENT = ('vision/stack/blocks/attention/key/bias',
                 'text/stack/blocks/attention/key/bias')

VISION = dict(image_size=(12, 12), patch=4, layers=3, width=18, heads=3,
              hidden=36)
TEXT = dict(length=7, layers=2, width=16, heads=4, hidden=32)
COMMON = dict(schedule='cosine', warmup=20, warmup_from='one', min_ratio=0.0,
              no_decay='position_embedding', groups={}, accumulate=1)


def _towers(vision_decay, text_decay, **fields):
  """Groups of EVA-CLIP: rates 4/5 and 4/50 of the temperature's."""
  return dict(
      vision=dict(pattern='^vision', lr_scale=0.8, layer_decay=vision_decay,
                  **fields),
      text=dict(pattern='^text', lr_scale=0.08, layer_decay=text_decay,
                fused='query|key|value'))


RECIPES = {
    'open_clip': dict(
        model=dict(size='clip-b32', logit_scale_max=2.7, vision=VISION,
                   text=TEXT),
        optimizer=dict(name='adamw', peak_lr=2e-3, b1=0.9, b2=0.98, eps=1e-6,
                       weight_decay=0.2, clip=None)),
    'eva02_lamb': dict(
        model=dict(size='eva02-l14',
                   vision=VISION | dict(width=24, rope_grid=(4, 4)),
                   text=TEXT | dict(hidden=64)),
        optimizer=dict(name='lamb', peak_lr=5e-3, b1=0.9, b2=0.999, eps=1e-8,
                       weight_decay=0.05, clip=1.0,
                       groups=_towers(0.85, 0.75))),
    'eva18_deepspeed': dict(
        model=dict(size='eva-18b', vision=VISION, text=TEXT | dict(hidden=64)),
        optimizer=dict(
            name='lamb', peak_lr=1e-3, b1=0.9, b2=0.95, eps=1e-6,
            weight_decay=0.0, clip=5.0, always_adapt=True,
            bias_correction='rate', trust_clip=(0.01, 10.0),
            groups=_towers(0.9, 0.75, fused='query|key|value') | dict(
                temperature=dict(pattern='^logit_scale$', freeze=True)))),
}


def _config(name):
  recipe = RECIPES[name]
  return ml_collections.ConfigDict(dict(
      name=name, seed=0, steps=200, dtype='float32',
      layout=dict(name='pair', length=TEXT['length']),
      image=dict(size=VISION['image_size']),
      objective=dict(name='contrastive', loss='softmax'),
      model=dict(name='clip', embed=12, **recipe['model']),
      optimizer=COMMON | recipe['optimizer'])).lock()


def _pool(arrays):
  tokens = arrays['tokens'].astype(np.int32)
  ends = np.argmax(tokens, axis=1)  # of the text; padding is 0
  return {'pairs': dict(
      images=arrays['images'], tokens=tokens,
      valid=np.arange(tokens.shape[1]) <= ends[:, None],
      example_valid=np.ones(len(tokens), bool))}


@pytest.mark.parametrize('name', RECIPES)
def test_two_hundred_steps_equal_the_reference(name):
  arrays = trajectories.load(name)
  found, history = trajectories.train(
      _config(name), VOCAB, arrays, _pool(arrays))
  if 'logit_scale' not in found:  # frozen
    del arrays['final/logit_scale']
  assert len(found) > 30
  trajectories.check(found, history, arrays, ZERO_GRADIENT)

"""A first table: two ways of seeing without an encoder, one decoder.

  bash launch/quickstart.sh
  python -m mmgen.table --experiment=quickstart

The rows train the same three-layer decoder on drawn scenes, captions and
questions mixed. `patches` projects each 8 x 8 pixel patch linearly and ends
every row of patches with a newline token, as Fuyu-8B does. `eve` cuts finer
patches and pools them by attention, as EVE's patch embedding layer does
(arXiv:2406.11832, section 3.1). One seed: the table shows figures, controls
and pictures, and says that one seed is no verdict.

Two CPU cores, about two minutes of training a row; with --tune, which looks for
a learning rate on another split, ten times as much.
"""

import ml_collections

from mmgen import errors

_LINEAR_PATCHES = dict(name='linear_patches', patch=8, width=128)
_EVE = dict(name='eve', patch=4, pool=2, width=64, heads=2)


def base(scale):
  """Returns the config that both rows share."""
  if scale != 'mini':
    raise errors.UserError(
        "the quickstart exists at --scale=mini only: it repeats no paper's "
        'table. The experiments under experiments/eve/ have both scales.')
  c = ml_collections.ConfigDict()
  c.seed = 0
  c.steps = 800
  c.log_every = 10
  c.eval_every = 0
  c.checkpoint_every = 250
  c.dtype = 'float32'

  c.mix = dict(
      captions=dict(corpus='emoji/tiny', split='train', view='caption',
                    column='fused', language='en', image_place='before',
                    shuffle_pairs=False, quota=2),
      questions=dict(corpus='emoji/tiny', split='train', view='vqa',
                     column='fused', language='en', image_place='before',
                     shuffle_pairs=False, quota=1))
  c.layout = dict(name='sequence', length=136, rows=4, documents=16, images=5)
  c.image = dict(size=(32, 32), fit='square', kernel='bicubic')

  c.model = dict(
      name='multimodal',
      vision=_LINEAR_PATCHES,
      connector=dict(name='identity'),
      decoder=dict(layers=3, width=128, heads=2, kv_heads=2, hidden=384,
                   unroll=True))
  c.objective = dict(name='next_token')
  c.init = {}
  c.optimizer = dict(name='adamw', peak_lr=2e-3, schedule='cosine', warmup=50,
                     min_ratio=0.0, b1=0.9, b2=0.95, eps=1e-8,
                     weight_decay=0.05, clip=1.0, groups={}, accumulate=1)
  c.mesh = dict(data=-1, fsdp=1, tensor=1, sequence=1)

  c.evaluators = dict(
      loss=dict(name='loss', corpus='emoji/tiny', split='compositions',
                view='caption', column='fused', examples=512),
      vqa=dict(name='vqa', corpus='emoji/tiny', split='compositions',
               examples=512),
      caption=dict(name='caption', corpus='emoji/tiny', split='compositions',
                   column='fused', examples=512),
      styles=dict(name='caption', corpus='emoji/tiny', split='styles',
                  column='fused', examples=512))
  return c


ROWS = {
    'patches': {},
    'eve': {'model.vision': _EVE,
            'model.connector': dict(name='mlp', hidden=128)},
}

TABLE = dict(
    title='Quickstart: linear patches and EVE\'s patch layer on drawn scenes',
    metrics={'object named': 'vqa/what', 'counted': 'vqa/count',
             'all questions': 'vqa/accuracy',
             'caption': 'caption/exact',
             'name in caption': 'caption/name_recall',
             'name, new style': 'styles/name_recall'},
    seeds=(0,),
    tuning=dict(grid=(5e-4, 1e-3, 2e-3, 4e-3, 8e-3), metric='name in caption'),
    tuning_seeds=(100, 101),
    account='samples',
    budget='800 steps of 48 documents, at most 150 s a row on two cores')

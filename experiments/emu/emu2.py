"""Emu2's first stage: captioning (arXiv:2312.13286, table 6 and appendix B).

  python -m mmgen.table --experiment=emu/emu2
  python -m mmgen.plan --config=emu/emu2:37b:caption_448 --scale=paper --forward

EVA-02-CLIP-E+ pooled to 8 x 8 cells, a linear map, and LLaMA-33B are trained
together to write captions, first at 224 pixels and then at 448. The head that
regresses features is in the model and not in the loss: it is trained in stage
2, which is not built yet, as the reader of videos, of which each step has 768.

At mini scale the same parts, small, start from a mini CLIP and a mini decoder
that has read: a check that the recipe learns.
"""

from experiments import warm_starts
from experiments.eve import base as eve

PARTS = dict(
    connector=dict(name='linear', bias=False, border=True),
    visual_head=dict(name='linear', target='vision'))
# Pixels, steps and cells of a picture; 6,144 pictures a step.
STEPS = {'caption_224': (224, 35200, 2), 'caption_448': (448, 4000, 4)}


def base(scale):
  """Returns the config of the first stage."""
  c = eve.base(scale)
  c.image.fit = 'square'
  c.model = dict(PARTS, name='multimodal', decoder=c.model.decoder,
                 vision=dict(warm_starts.VIT, name='vit', tap=-1, pool=2))
  c.init['vision'] = 'run:warm_starts:clip'
  if scale == 'paper':
    c.model.vision = dict(name='vit', size='eva02-e14-plus', tap=-1,
                          final_norm=False, remat=True)
    c.model.decoder = dict(size='llama-33b', vocab=32272, remat=True)
    c.init = dict(vision='file:weights/eva02-clip-e14-plus',
                  decoder='file:weights/llama-33b#decoder')
    # Of the projection; vision and decoder have shares of it.
    c.optimizer = warm_starts.optimizer(
        peak_lr=1e-4, b2=0.95, eps=1e-6, weight_decay=0.0, clip=5.0,
        groups=dict(vision=dict(pattern='^vision', lr_scale=0.5),
                    decoder=dict(pattern='^decoder', lr_scale=0.3)))
    # A picture takes 66 slots, a caption about 60.
    c.layout = dict(name='sequence', length=2048, rows=8, documents=96,
                    images=16)
    c.mesh = dict(data=1, fsdp=-1, tensor=1, sequence=1, slice='v5p:4x4x4')
  return c


def _stage(pixels, steps, pool):
  return {
      'mini': eve.STAGES['sft']['mini'],
      'paper': {
          'steps': steps, 'evaluators': {},
          'optimizer.warmup': round(0.02 * steps),
          'image.size': (pixels, pixels),
          'model.vision.image_size': (pixels, pixels),
          'model.vision.pool': pool,
          'mix': dict(captions=dict(
              corpus='web/laion-coco', split='train', view='caption',
              column='raw', language='en', image_place='before',
              shuffle_pairs=False, quota=64, style='emu'))}}


STAGES = {name: _stage(*sizes) for name, sizes in STEPS.items()}
ROWS = {'37b': {}}

TABLE = dict(
    title="Emu2's first stage",
    source='arXiv:2312.13286, Table 6',
    metrics=eve.METRICS,
    seeds=(0,),
    account='samples',
    budget='240 + 240 steps, rates not tuned')

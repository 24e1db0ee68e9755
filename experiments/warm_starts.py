"""Trained parts that other experiments start from, at mini scale.

Nearly every ablation of this line starts from a trained language model and
many from a trained CLIP; a row from random weights would test something else.
So the mini rows start from

  text   a decoder that has only read: captions, and questions with their
         answers, without a picture
  clip   a CLIP on captioned pictures

Both see the first half of the training scenes; the experiments that build on
them use the second half. Their samples, tokens and FLOPs are charged to every
row that starts from them. Their seed is the row's.

  python -m mmgen.train --config=warm_starts:clip

Published sizes start from published weights, `init.decoder='file:...'`.
"""

import ml_collections

from mmgen import errors

CORPUS = 'emoji/tiny'
OURS = 'train[:50%]'
THEIRS = 'train[50%:]'  # what is left for the experiments that build on these

IMAGE = dict(size=(32, 32), fit='square', kernel='bicubic')
DECODER = dict(layers=3, width=128, heads=2, kv_heads=2, hidden=384,
               unroll=True)
# The tower of the mini CLIP; as `model.vision` or as a teacher it must agree.
VIT = dict(image_size=(32, 32), patch=8, layers=3, width=128, heads=2,
           hidden=512, mlp='gelu', unroll=True)


def source(view, split=OURS, **fields):
  """Returns one source of a mixture on drawn scenes."""
  return dict(corpus=CORPUS, split=split, view=view, column='fused',
              language='en', image_place='before', shuffle_pairs=False,
              quota=1) | fields


def optimizer(**fields):
  """Returns the optimizer that all mini runs share."""
  return dict(name='adamw', peak_lr=1e-3, schedule='cosine', warmup=20,
              min_ratio=0.0, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.05,
              clip=1.0, groups={}, accumulate=1) | fields


def base(scale):
  """Returns the config of the text-trained decoder."""
  if scale != 'mini':
    raise errors.UserError(
        'warm_starts exists at --scale=mini only: published sizes start from '
        "published weights, init.<part>='file:<path>'.")
  c = ml_collections.ConfigDict()
  c.seed = 0
  c.steps = 400
  c.log_every = 20
  c.eval_every = 0
  c.checkpoint_every = 200
  c.dtype = 'float32'
  c.mix = dict(captions=source('text'),
               questions=source('text_conversation'))
  c.layout = dict(name='sequence', length=128, rows=8, documents=24, images=0)
  c.image = IMAGE
  c.model = dict(name='multimodal', decoder=DECODER)
  c.objective = dict(name='next_token')
  c.init = {}
  c.optimizer = optimizer(peak_lr=2e-3)
  c.mesh = dict(data=-1, fsdp=1, tensor=1, sequence=1)
  c.evaluators = dict(
      captions=dict(name='loss', corpus=CORPUS, split='validation',
                    view='text', column='fused', examples=1024),
      questions=dict(name='loss', corpus=CORPUS, split='validation',
                     view='text_conversation', column='fused', examples=1024))
  return c


_TEMPLATES = ('a {}', 'a {} on a ground', 'one {}')

ROWS = {
    'text': {},
    'clip': {
        'steps': 400,
        'mix': dict(pairs=source('pair')),
        'layout': dict(name='pair', length=16, rows=1, documents=128,
                       images=1),
        'model': dict(name='clip', size='mini', vision=VIT),
        'objective': dict(name='contrastive', loss='softmax'),
        'evaluators': dict(
            zero_shot=dict(name='zero_shot', corpus=CORPUS, split='validation',
                           templates=_TEMPLATES, examples=2048),
            retrieval=dict(name='retrieval', corpus=CORPUS,
                           split='validation', column='fused',
                           examples=1024))},
}

TABLE = dict(
    title='Warm starts: a decoder that has read, a CLIP that has seen',
    metrics={
        'captions, nats': dict(score='captions/loss', unit='raw',
                               better='lower'),
        'questions, nats': dict(score='questions/loss', unit='raw',
                                better='lower'),
        'zero-shot': 'zero_shot/accuracy',
        'image to text, R@1': 'retrieval/image_to_text@1',
        'text to image, R@1': 'retrieval/text_to_image@1'},
    seeds=(0, 1, 2),
    account='parameters',
    budget='400 steps of text, 400 steps of 128 pairs')

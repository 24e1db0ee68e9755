"""LLaVA-1.5's released recipe (arXiv:2310.03744).

  python -m mmgen.table --experiment=llava/recipes
  python -m mmgen.plan --config=llava/recipes:13b:finetune --scale=paper

Two stages, as runs: `pretrain` trains the connector alone on 558K captioned
pictures, `finetune` the connector and the decoder on 665K conversations; the
CLIP tower, read before its last block, is frozen in both. Rates, batches and
warm-up are those of the paper's table 9 and the released scripts. `7b_linear`
has a linear connector, as LLaVA before (table 2). In `7b_lora` and `13b_lora`,
after the same first stage, the decoder is frozen too, beside low-rank adapters
of all matrices in its blocks, and the connector trains at a tenth of their rate
(released finetune_lora.sh).

Deviations: documents are packed into rows of 2,048 slots, where the release
pads each one; a batch is then 256 and 128 documents less what did not fit, and
averaged whole, where each of 8 processes averaged its own. The corpora are
public, but no reader of them is here yet.

At mini scale each row starts from a mini CLIP and a mini decoder that has read,
and is trained on drawn scenes: a check that the recipe learns.
"""

from experiments.eve import base as eve

FREEZE = {'optimizer.groups.vision': eve.FREEZE_VISION}
# Short side to 336, then the middle; later padded to a square first.
FIT = {stage: dict(size=(336, 336), fit=fit, kernel='bicubic')
       for stage, fit in (('pretrain', 'clip'), ('finetune', 'expand'))}


def base(scale):
  """Returns the config of the 7B model's first stage."""
  c = eve.base(scale)
  c.model = dict(name='multimodal', vision=eve.VISION[scale]['clip'],
                 connector=eve.MLP, decoder=c.model.decoder)
  c.init['vision'] = 'run:warm_starts:clip'
  if scale == 'paper':
    c.model.vision.remat = True
    c.init['vision'] = 'file:weights/clip-vit-large-patch14-336'
    c.optimizer.warmup = 66
  return c


def _source(corpus, view, style, quota):
  return dict(
      corpus=corpus, split='train', view=view, column='raw', language='en',
      image_place='before', shuffle_pairs=False, quota=quota, style=style)


STAGES = {
    'pretrain': FREEZE | {
        'optimizer.groups.decoder': eve.FREEZE_DECODER,
        'mini': eve.STAGES['prealign']['mini'],
        'paper': {
            'steps': 2181, 'image': FIT['pretrain'], 'evaluators': {},
            'optimizer.peak_lr': 1e-3,
            'mix': dict(captions=_source('web/llava-pretrain-558k', 'caption',
                                         'plain', 16))}},
    'finetune': FREEZE | {
        'mini': eve.STAGES['sft']['mini'],
        'paper': {
            'steps': 5198, 'image': FIT['finetune'], 'evaluators': {},
            'optimizer.peak_lr': 2e-5, 'optimizer.warmup': 156,
            'mix': dict(turns=_source('web/llava-mix-665k', 'conversation',
                                      'vicuna_v1', 8))}},
}

# The dropout is the default of the released code.
LORA = {'finetune': {
    'optimizer.groups.decoder': eve.FREEZE_DECODER,
    'optimizer.groups.connector': dict(pattern='^connector/', lr_scale=0.1),
    'mini': {'model.lora': dict(rank=16, alpha=32, dropout=0.05)},
    'paper': {'model.lora': dict(rank=128, alpha=256, dropout=0.05),
              'optimizer.peak_lr': 2e-4}}}
_13B = {'paper': {'model.decoder': dict(size='vicuna-13b', remat=True),
                  'init.decoder': 'file:weights/vicuna-13b-v1.5#decoder'}}

ROWS = {
    '7b': {},
    '7b_linear': {'model.connector': dict(name='linear')},
    '7b_lora': LORA,
    '13b': _13B,
    '13b_lora': LORA | _13B,
}

TABLE = dict(
    title="LLaVA-1.5's recipe",
    source='arXiv:2310.03744, Table 3 (VQAv2), Table 2 (GQA); of LoRA the '
    'list of models beside the released code',
    metrics=eve.METRICS | {'GQA': 'vqa/accuracy'},
    published={'7b': {'all questions': 78.5, 'GQA': 62.0},
               '7b_lora': {'all questions': 79.1, 'GQA': 63.0},
               '13b': {'all questions': 80.0, 'GQA': 63.3},
               '13b_lora': {'all questions': 80.0, 'GQA': 63.3}},
    seeds=(0,),
    account='samples',
    budget='120 + 240 steps, rates not tuned')

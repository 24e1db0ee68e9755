"""EVE (arXiv:2406.11832): what all its tables share, at both scales.

Three stages, as runs: `prealign` (LLM-guided pre-alignment: the decoder is
frozen), `pretrain` (generative pre-training) and `sft` (supervised
fine-tuning). The recipe at paper scale is that of the paper's table 8 and the
released scripts; where the two differ, the scripts: alignment is one minus the
cosine, and stage 1 runs at 4e-4.

Each of their 32 processes had 16 pictures, in stage 3 four, and averaged its
own loss. Here a microbatch is averaged: on the slice that is named, the whole
batch. On 8 chips, with --config.optimizer.accumulate=32, it is 16 pictures in
stages 1 and 2, as theirs.
"""

from experiments import warm_starts

# A frozen teacher never trains; its parameters come from `init.teacher`.
FREEZE_TEACHER = dict(pattern='^teacher/', freeze=True)
FREEZE_DECODER = dict(pattern='^decoder/', freeze=True)
FREEZE_VISION = dict(pattern='^vision/', freeze=True)

PLAIN = dict(name='next_token')

# What the trainer of EVE, EVEv2 and LLaVA does, beside what their scripts name
# (transformers 4.37, accelerate 0.21): a warm-up from 0; the mean of each
# microbatch; no bound of the gradient, for under DeepSpeed the trainer leaves
# that to its settings, and in theirs, which name none, 0 stands for none.
TRAINER = dict(warmup_from='zero', denominators='microbatch', clip=None)

VISION = {
    'mini': {
        'eve': dict(name='eve', patch=4, pool=2, width=64, heads=2),
        'patches': dict(name='linear_patches', patch=8, width=128),
        'clip': dict(warm_starts.VIT, name='vit')},
    'paper': {
        'eve': dict(name='eve'),
        'patches': dict(name='linear_patches', patch=28, width=4096),
        'clip': dict(name='vit', image_size=(336, 336), patch=14, layers=24,
                     width=1024, heads=16, hidden=4096)},
}
MLP = dict(name='mlp')
ALIGNED = {
    'mini': dict(name='alignment', teacher=dict(warm_starts.VIT, size='mini'),
                 aligner=dict(interval=1, heads=2)),
    'paper': dict(name='alignment', teacher=dict(size='clip-l14-336')),
}
TEACHER = {
    'mini': 'run:warm_starts:clip#vision',
    'paper': 'file:weights/clip-vit-large-patch14-336#vision',
}


def base(scale):
  """Returns the config of EVE's first stage without alignment."""
  return _mini() if scale == 'mini' else _paper()


def _mini():
  c = warm_starts.base('mini')
  c.log_every = 20
  c.layout = dict(name='sequence', length=136, rows=8, documents=32, images=5)
  c.model = dict(name='multimodal', vision=VISION['mini']['eve'],
                 connector=MLP, decoder=warm_starts.DECODER)
  c.objective = PLAIN
  c.init = dict(decoder='run:warm_starts:text')
  c.optimizer = warm_starts.optimizer()
  return c


def _paper():
  c = _mini()
  c.dtype = 'bfloat16'
  c.log_every = 10
  c.checkpoint_every = 1000
  # A picture takes up to 601 slots, a caption about 150.
  c.layout = dict(name='sequence', length=2048, rows=8, documents=16, images=3)
  c.image = dict(size=(672, 672), fit='pad', kernel='bicubic')
  c.model = dict(name='multimodal', vision=VISION['paper']['eve'],
                 connector=MLP, decoder=dict(size='vicuna-7b', remat=True))
  c.init = dict(decoder='file:weights/vicuna-7b-v1.5#decoder')
  c.optimizer = warm_starts.optimizer(
      b2=0.999, weight_decay=0.0, warmup=938, peak_lr=4e-4, **TRAINER)
  c.mesh = dict(data=1, fsdp=-1, tensor=1, sequence=1, slice='v5p:4x4x4')
  return c


def web(corpus, view, quota, styles=('plain', 'vicuna_v1')):
  """Returns a mixture of one public corpus.

  Args:
    corpus: its name.
    view: 'caption' or 'conversation'.
    quota: groups a step.
    styles: of captions and of conversations.
  """
  return dict(captions=warm_starts.source(
      view, 'train', corpus=corpus, column='synthetic', quota=quota,
      style=styles[view == 'conversation']))


def _scores(split='compositions', examples=2048):
  of = dict(corpus=warm_starts.CORPUS, split=split, examples=examples)
  return dict(vqa=dict(name='vqa', **of),
              caption=dict(name='caption', column='fused', **of))


_CAPTIONS = dict(captions=warm_starts.source('caption', warm_starts.THEIRS))
_LOSS = dict(loss=dict(name='loss', corpus=warm_starts.CORPUS,
                       split='validation', view='caption', column='fused',
                       examples=512))

STAGES = {
    'prealign': {
        'optimizer.groups': dict(decoder=FREEZE_DECODER),
        'mini': {'steps': 120, 'mix': _CAPTIONS, 'evaluators': _LOSS},
        # 16M of the 33M captioned pictures, 512 a step.
        'paper': {'steps': 31250, 'mix': web('web/eve-cap-16m', 'caption', 32),
                  'evaluators': {}}},
    'pretrain': {
        'mini': {'steps': 320, 'mix': _CAPTIONS, 'evaluators': _LOSS},
        'paper': {'steps': 64453, 'mix': web('web/eve-cap-33m', 'caption', 32),
                  'optimizer.peak_lr': 4e-5, 'optimizer.warmup': 645,
                  'evaluators': {}}},
    'sft': {
        'mini': {
            'steps': 240,
            'mix': dict(
                captions=warm_starts.source('caption', warm_starts.THEIRS),
                questions=warm_starts.source('vqa', warm_starts.THEIRS)),
            'evaluators': _scores()},
        # 665,298 conversations, 128 a step.
        'paper': {'steps': 5198,
                  'mix': web('web/llava-mix-665k', 'conversation', 8),
                  'optimizer.peak_lr': 2e-5, 'optimizer.warmup': 52,
                  'evaluators': {}}},
}


_CONDITIONS = ('mini', 'paper', *STAGES)


def merged(*layers):
  """Joins the fields of rows or stages; of two values the later one counts."""
  found = {}
  for fields in layers:
    for name, value in fields.items():
      found[name] = (merged(found.get(name, {}), value)
                     if name in _CONDITIONS else value)
  return found


def aligned(stages=tuple(STAGES), trained=True, **options):
  """Returns the fields of a row that is aligned to a teacher.

  Args:
    stages: of the row; the teacher of the first one serves all.
    trained: False leaves the teacher as it is initialised.
    **options: further fields of the objective.
  """
  row = {}
  for stage in stages:
    row[stage] = {'optimizer.groups.teacher': FREEZE_TEACHER} | {
        scale: {'objective': ALIGNED[scale] | options} for scale in ALIGNED}
  if trained:
    for scale, origin in TEACHER.items():
      row[stages[0]][scale]['init.teacher'] = origin
  return row


# Stages of table 4's 0.5M rows: LLaVA's 558K captioned pictures in the first
# two, 512 a step, and the warm-up ratios of the full recipe.
HALF_MILLION = merged(STAGES, {
    stage: {'paper': {
        'steps': 1091, 'mix': web('web/llava-pretrain-558k', 'caption', 32),
        'optimizer.warmup': warmup}}
    for stage, warmup in (('prealign', 33), ('pretrain', 11))})

# Linear patches in place of EVE's layer, as Fuyu-8B.
PATCHES = {
    'model.vision': VISION['mini']['patches'],
    'model.connector': dict(name='identity'),
    'paper': {'model.vision': VISION['paper']['patches']},
}

# A control: every text with another scene's picture.
SHUFFLED = {
    'mini': {'mix.captions.shuffle_pairs': True},
    'sft': {'mini': {'mix.questions.shuffle_pairs': True}},
    'paper': {'mix.captions.shuffle_pairs': True},
}

# Of the last stage, the same for every row; see `mmgen.tables.tuning`.
TUNING = dict(
    tuning=dict(grid=(2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3),
                metric='name in caption'),
    tuning_seeds=(100, 101))

METRICS = {'name in caption': 'caption/name_recall',
           'object named': 'vqa/what',
           'all questions': 'vqa/accuracy',
           'caption': 'caption/exact'}

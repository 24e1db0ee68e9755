"""A run folder with an untrained model, and the corpus it goes with."""

import json
import pathlib

import jax
import ml_collections

from mmgen import config as config_lib
from mmgen.data import corpora
from mmgen.models import clip
from mmgen.models import multimodal
from mmgen.training import checkpoint

CORPUS = 'shapes/tiny'
STEP = 7
MODULES = {'multimodal': multimodal, 'clip': clip}


def config(vision=True):
  """The config of the run, as a ConfigDict."""
  found = ml_collections.ConfigDict(dict(
      name='tiny:row:train', seed=0, dtype='float32', init={},
      layout=dict(name='sequence', length=64, rows=2, documents=4, images=2),
      image=dict(size=(16, 16), fit='square', kernel='bicubic'),
      model=dict(
          name='multimodal',
          decoder=dict(layers=1, width=16, heads=2, hidden=32, unroll=True),
          vision=dict(
              name='linear_patches', width=16, patch=8, newline='none'),
          connector=dict(name='identity')),
      evaluators=dict(
          vqa=dict(name='vqa', corpus=CORPUS, examples=6, batch_size=4),
          caption=dict(name='caption', corpus=CORPUS, split='compositions',
                       examples=3, batch_size=4),
          loss=dict(name='loss', corpus=CORPUS, examples=5, batch_size=4))))
  if not vision:
    found.model.vision = found.model.connector = {}
    found.evaluators = {}
  return found


def prepare(data_dir):
  """Prepares the corpus; returns `data_dir`."""
  corpora.prepare(data_dir, CORPUS, train=16, evaluation=8, vocab=400)
  return data_dir


def untrained(model, module, chosen):
  """Parameters that are not indifferent: logits differ between words."""
  params = model.init(
      jax.random.key(3),
      module.example_batch(model.config, chosen.image.size))['params']
  return jax.tree.map(lambda leaf: leaf * 20 if leaf.ndim > 1 else leaf,
                      params)


def make(folder, data_dir, **options):
  """Writes a run folder as training does; returns its path."""
  folder, chosen = pathlib.Path(folder), config(**options)
  tokenizer = corpora.load_tokenizer(data_dir, CORPUS)
  model = config_lib.build_model(chosen, tokenizer.vocab_size)
  params = untrained(model, multimodal, chosen)
  folder.mkdir(parents=True)
  flat = config_lib.flatten(chosen)
  (folder / 'config.json').write_text(json.dumps(flat))
  checkpointer = checkpoint.Checkpointer(folder)
  checkpointer.save(
      STEP, dict(params=params), dict(config=flat), tokenizer.bytes)
  checkpointer.close()
  return folder

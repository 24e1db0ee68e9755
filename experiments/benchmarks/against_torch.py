"""Time against PyTorch's reference implementations, side by side.

  pip install -e '.[parity]'
  python -m experiments.benchmarks.against_torch

One LLaVA-1.5 of a size that a laptop holds, made by transformers with random
weights, loaded here from the files that it saves. In turn, PyTorch (eager, as
transformers runs) and mmgen (compiled) take

  see       the image tower on a batch of pictures, read after its last block
            (the released LLaVA reads one before it, and transformers computes
            the last one all the same: mmgen does not)
  read      the forward pass of pictures and text to logits
  generate  32 tokens, greedily, from cached prompts
  loss      the next-token loss of that batch
  grads     the loss and its gradients; the tower is frozen
  train     loss, gradients, clipping and AdamW

and the ratio of their times is printed, median and range over the rounds: above
1, mmgen is faster. Both use float32 and all cores. Outputs are compared too: a
ratio of two different results would be worth nothing. Nothing else should run.
"""

import argparse
import dataclasses
import pathlib
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from rich import console
from rich import table

from mmgen import weights
from mmgen.models import multimodal
from mmgen.models import sampling
from mmgen.models import vision_encoder
from mmgen.objectives import next_token
from mmgen.training import optimizer as optimizer_lib
from mmgen.training import step as step_lib

VISION = dict(hidden_size=512, intermediate_size=2048, num_hidden_layers=8,
              num_attention_heads=8, image_size=224, patch_size=16)
TEXT = dict(hidden_size=512, intermediate_size=1376, num_hidden_layers=8,
            num_attention_heads=8, num_key_value_heads=8, vocab_size=8192,
            rms_norm_eps=1e-5, max_position_embeddings=2048)
CELLS, ROWS, PICTURE, WORDS, TOKENS = 196, 4, 8191, 60, 32
RATE = 1e-4


def reference(folder):
  """A random LLaVA of transformers, saved to a folder."""
  import torch
  import transformers

  torch.manual_seed(0)
  config = transformers.LlavaConfig(
      vision_config=transformers.CLIPVisionConfig(**VISION),
      text_config=transformers.LlamaConfig(**TEXT),
      image_token_index=PICTURE, image_seq_length=CELLS,
      vision_feature_layer=-1, projector_hidden_act='gelu')
  model = transformers.LlavaForConditionalGeneration(config).eval()
  model.save_pretrained(folder)
  return model


class Torch:
  """What PyTorch does to the batch."""

  def __init__(self, model, batch):
    import torch

    self.torch, self.model = torch, model
    mean, std = (np.asarray(x, np.float32) for x in (
        vision_encoder.CLIP_MEAN, vision_encoder.CLIP_STD))
    pixels = (batch['images'][:, 0] / np.float32(255) - mean) / std
    self.inputs = dict(
        input_ids=torch.tensor(batch['tokens'].astype(np.int64)),
        attention_mask=torch.ones(batch['tokens'].shape, dtype=torch.int64),
        pixel_values=torch.tensor(pixels.astype(np.float32).transpose(
            0, 3, 1, 2)))
    labels = self.inputs['input_ids'].clone()
    labels[labels == PICTURE] = -100
    self.labels = labels
    trained = [p for name, p in model.named_parameters()
               if 'vision_tower' not in name]
    for name, parameter in model.named_parameters():
      parameter.requires_grad_('vision_tower' not in name)
    self.optimizer = torch.optim.AdamW(trained, RATE, (0.9, 0.95), 1e-8, 0.0)
    self.trained = trained
    tower = getattr(model, 'model', model)
    self.tower = getattr(tower, 'vision_tower', None) or model.vision_tower

  def see(self):
    with self.torch.no_grad():
      return self.tower(self.inputs['pixel_values'],
                        output_hidden_states=True).hidden_states[-1].numpy()

  def read(self):
    with self.torch.no_grad():
      return self.model(**self.inputs).logits.numpy()

  def loss(self):
    with self.torch.no_grad():
      return self.model(**self.inputs, labels=self.labels).loss.numpy()

  def grads(self):
    loss = self.model(**self.inputs, labels=self.labels).loss
    loss.backward()
    norm = self.torch.nn.utils.get_total_norm(p.grad for p in self.trained)
    self.optimizer.zero_grad()
    return np.asarray([loss.item(), norm.item()])

  def train(self):
    self.model.train()
    loss = self.model(**self.inputs, labels=self.labels).loss
    loss.backward()
    self.torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
    self.optimizer.step()
    self.optimizer.zero_grad()
    self.model.eval()
    return np.asarray(loss.item())

  def generate(self):
    with self.torch.no_grad():
      found = self.model.generate(
          **self.inputs, max_new_tokens=TOKENS, min_new_tokens=TOKENS,
          do_sample=False, pad_token_id=0)
    return found[:, -TOKENS:].numpy()


class Mmgen:
  """What mmgen does to it."""

  def __init__(self, folder, batch):
    loaded = weights.load(folder)
    config = loaded.model.config
    unrolled = lambda part: dataclasses.replace(part, unroll=True)
    self.model = multimodal.MultimodalDecoder(dataclasses.replace(
        config, decoder=unrolled(config.decoder),
        vision=unrolled(config.vision)))
    self.params, self.batch = loaded.params, jax.tree.map(jnp.asarray, batch)
    settings = ml_collections.ConfigDict(dict(
        seed=0, dtype='float32', optimizer=dict(
            name='adamw', peak_lr=RATE, schedule='constant', warmup=0,
            min_ratio=0.0, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.0,
            clip=1.0, accumulate=1, groups=dict(vision=dict(
                pattern='^vision/', freeze=True)))))
    # The step donates its state: these stay behind for the other tasks.
    trained, self.frozen = optimizer_lib.split(
        jax.tree.map(jnp.copy, loaded.params), settings.optimizer.groups)
    tx = optimizer_lib.make_optimizer(settings.optimizer, 1000, trained)
    self.state = step_lib.init_state(trained, tx)
    objective = next_token.NextToken(self.model)
    self.step = step_lib.make_train_step(objective, tx, settings)

    def loss(trained, batch):
      sums, _ = objective(trained, self.frozen, {}, {'turns': batch},
                          jax.random.key(0), 0)
      total, weight = sums['next_token']
      return total / weight

    def grads(trained, batch):
      value, found = jax.value_and_grad(loss)(trained, batch)
      return jnp.stack([value, optax.global_norm(found)]), found

    self._loss, self._grads = jax.jit(loss), jax.jit(grads)
    self.trained = jax.tree.map(jnp.copy, trained)
    self._see = jax.jit(lambda params, batch: self.model.apply(
        {'params': params}, batch['images'], batch['image_box'],
        method=lambda m, *args: m.vision(*args)[0]))
    self._read = jax.jit(lambda params, batch: self.model.apply(
        {'params': params}, batch)[0])

  def see(self):
    return np.asarray(self._see(self.params, self.batch))[:, 0]

  def read(self):
    return np.asarray(self._read(self.params, self.batch))

  def loss(self):
    return np.asarray(self._loss(self.trained, self.batch))

  def grads(self):
    return np.asarray(self._grads(self.trained, self.batch)[0])

  def train(self):
    self.state, metrics = self.step(
        self.state, self.frozen, {'turns': self.batch})
    return np.asarray(metrics['loss'])

  def generate(self):
    return np.asarray(sampling.generate(
        self.model, self.params, self.batch,
        np.full(ROWS, self.batch['tokens'].shape[1]), TOKENS, eos=-1))


def example():
  """Pictures, each before random words, as both sides need them."""
  rng = np.random.default_rng(0)
  T = CELLS + WORDS
  tokens = rng.integers(10, PICTURE, (ROWS, T)).astype(np.int32)
  tokens[:, 1:1 + CELLS] = PICTURE
  visual = np.full((ROWS, T), -1, np.int32)
  visual[:, 1:1 + CELLS] = np.arange(CELLS)
  targets = np.roll(tokens, -1, axis=1)
  learnt = targets != PICTURE
  learnt[:, -1] = False
  return dict(
      tokens=tokens, targets=targets, weights=learnt.astype(np.float32),
      segments=np.ones((ROWS, T), np.int32), visual=visual,
      image_index=np.where(visual < 0, -1, 0).astype(np.int32),
      positions=np.tile(np.arange(T, dtype=np.int32), (ROWS, 1)),
      images=rng.integers(0, 256, (ROWS, 1, 224, 224, 3)).astype(np.uint8),
      image_box=np.zeros((ROWS, 1, 4), np.int32))


def differ(theirs, ours):
  """The largest difference as a share of the largest number."""
  if theirs.ndim == 3 and theirs.shape[1] == ours.shape[1] + 1:
    theirs = theirs[:, 1:]  # the class embedding
  return np.abs(theirs - ours).max() / np.abs(theirs).max()


def main(argv=None):
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--rounds', type=int, default=7)
  args = parser.parse_args(argv)
  batch = example()
  with tempfile.TemporaryDirectory() as folder:
    theirs = Torch(reference(folder), batch)
    ours = Mmgen(pathlib.Path(folder), batch)
  out = table.Table('task', 'PyTorch', 'mmgen', 'ratio', 'range', 'difference')
  for task in ('see', 'read', 'generate', 'loss', 'grads', 'train'):
    sides = getattr(theirs, task), getattr(ours, task)
    apart = max(differ(*(side() for side in sides)) for _ in range(2))
    seconds = []
    for _ in range(args.rounds):
      seconds.append([])
      for side in sides:
        start = time.perf_counter()
        side()
        seconds[-1].append(time.perf_counter() - start)
    ratios = sorted(a / b for a, b in seconds)
    medians = [statistics.median(column) for column in zip(*seconds)]
    out.add_row(task, *(f'{1000 * x:.0f} ms' for x in medians),
                f'{statistics.median(ratios):.2f}',
                f'{ratios[0]:.2f} to {ratios[-1]:.2f}', f'{apart:.1e}')
  console.Console().print(out)


if __name__ == '__main__':
  main()

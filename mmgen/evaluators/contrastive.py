"""Embeddings of pictures and texts by a contrastive model, batch by batch."""

import functools

import jax
import numpy as np

from mmgen.data import image as image_lib
from mmgen.data import layout
from mmgen.data import prompts
from mmgen.evaluators import answering
from mmgen.evaluators import common


@functools.partial(jax.jit, static_argnames=('model', 'method'))
def _encode(model, params, method, *inputs):
  return model.apply({'params': params}, *inputs, method=method)[0]


def encode_texts(context, params, texts, batch_size):
  """Normalised embeddings f32[N, E] of N texts."""
  found = []
  for indices, valid in answering.chunks(len(texts), batch_size):
    # The layout takes pairs; the pictures of these are not looked at.
    arrays = layout.pair(
        [
            prompts.caption_document(np.zeros((1, 1, 3), np.uint8), texts[i])
            for i in indices
        ],
        context.tokenizer, context.config.layout.length,
    )
    z_BE = _encode(
        context.model, params, 'encode_text', arrays['tokens'],
        arrays['valid'],
    )
    found.append(np.asarray(z_BE)[valid])
  return np.concatenate(found)


def encode_pictures(context, params, records, batch_size):
  """Normalised embeddings f32[N, E] of the pictures of N records."""
  fit = common.image_settings(context)
  found = []
  for indices, valid in answering.chunks(len(records), batch_size):
    images_BYXC = np.stack([
        image_lib.fit_pixels(records[i]['image'], **fit)[0] for i in indices
    ])
    z_BE = _encode(context.model, params, 'encode_image', images_BYXC)
    found.append(np.asarray(z_BE)[valid])
  return np.concatenate(found)

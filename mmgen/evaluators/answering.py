"""What a generative model says to a list of documents, batch by batch."""

import numpy as np

from mmgen.data import image as image_lib
from mmgen.data import layout
from mmgen.evaluators import common
from mmgen.models import sampling

ROUND = 8  # slots; prompts of like length share one compilation


def chunks(count, size):
  """Yields (indices, valid) for batches of one size; nothing is dropped.

  Args:
    count: number of examples.
    size: rows of a batch, at most `count` of which are used.

  Yields:
    indices i64[B] and valid bool[B]; rows that are not valid fill up the last
    batch with example 0.
  """
  size = min(size, count)
  for start in range(0, count, size):
    indices = np.arange(start, start + size)
    valid = indices < count
    yield np.where(valid, indices, 0), valid


def lay_out(lay, documents, context):
  """Runs `layout.prompt` or `layout.unpacked` with the settings of a run."""
  config = context.config
  images = max(
      sum(span.kind == 'image' for span in d.spans) for d in documents
  )
  fit = common.image_settings(context)
  return lay(
      [image_lib.fit_document(d, **fit) for d in documents],
      context.tokenizer, context.image_layout, config.layout.length, images,
      fit['size'],
  )


def trim(arrays, length):
  """Cuts what runs along a row (tokens, positions ...) to `length`.

  Rows as long as the longest document of a batch, not as a packed row: the
  cost of attention and of MLPs follows.
  """
  length = -(-int(length) // ROUND) * ROUND
  return {
      name: array if name in ('images', 'image_box') else array[:, :length]
      for name, array in arrays.items()
  }


def longest(texts, tokenizer):
  """Tokens of the longest of some texts, and one for <eos>."""
  return 1 + max(len(tokenizer.encode(text)) for text in texts)


def answer(
    context, params, documents, max_tokens, batch_size, *,
    temperature=0.0, top_p=1.0, seed=0, names=None,
):
  """Continues every document from where its answer begins.

  Args:
    context: has `config`, `model`, `tokenizer` and `image_layout`.
    params: parameters of the model.
    documents: prompts; an answer they hold is cut away.
    max_tokens: the longest answer, <eos> included.
    batch_size: rows of a batch.
    temperature: as in `sampling.generate`.
    top_p: as in `sampling.generate`.
    seed: of the random draws, if the temperature is not 0.
    names: what a document's draws are keyed by; default: its id.

  Returns:
    A list of texts, one per document.
  """
  names = names or [d.id for d in documents]
  texts = []
  for indices, valid in chunks(len(documents), batch_size):
    arrays, lengths_B = lay_out(
        layout.prompt, [documents[i] for i in indices], context
    )
    tokens_BT = sampling.generate(
        context.model, params, trim(arrays, lengths_B.max()), lengths_B,
        max_tokens, eos=context.tokenizer.id('<eos>'),
        temperature=temperature, top_p=top_p,
        keys_B=sampling.example_keys(seed, [names[i] for i in indices]),
    )
    texts += [
        context.tokenizer.decode(row.tolist())
        for row in np.asarray(tokens_BT)[valid]
    ]
  return texts

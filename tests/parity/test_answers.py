"""Greedy answers of LLaVA, token for token those of transformers."""

import jax
import numpy as np
import pytest
import tiny
import torch
import transformers

from mmgen import stages
from mmgen.models import sampling

COUNT = 32
# {name: (decoder, its words, image tower)}
CASES = {
    'square': dict(
        picture=33, text=dict(
            vocab_size=61, hidden_size=28, intermediate_size=44,
            num_hidden_layers=2, num_attention_heads=7),
        vision=dict(
            num_hidden_layers=3, hidden_size=18, num_attention_heads=3,
            intermediate_size=31, image_size=17, patch_size=5)),
    'shared_keys': dict(
        picture=70, text=dict(
            vocab_size=71, hidden_size=36, intermediate_size=30,
            num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2),
        vision=dict(
            num_hidden_layers=2, hidden_size=20, num_attention_heads=5,
            intermediate_size=26, image_size=8, patch_size=4)),
}


def their_answers(folder, batch, lengths, pixels):
  """(tokens, distance of the two best logits): prompts padded on the left."""
  model = transformers.LlavaForConditionalGeneration.from_pretrained(
      folder, attn_implementation='eager').eval()
  width = max(lengths)
  tokens, mask = np.zeros((2, len(lengths), width), np.int64)
  for row, (ids, n) in enumerate(zip(batch['tokens'], lengths)):
    tokens[row, width - n:], mask[row, width - n:] = ids[:n], 1
  out = model.generate(
      input_ids=torch.tensor(tokens), attention_mask=torch.tensor(mask),
      pixel_values=torch.tensor(pixels).movedim(-1, 1), do_sample=False,
      max_new_tokens=COUNT, eos_token_id=None, pad_token_id=0,
      return_dict_in_generate=True, output_logits=True)
  best = torch.stack(out.logits, 1).topk(2).values
  return out.sequences[:, width:].numpy(), (best[..., 0] - best[..., 1]).numpy()


@pytest.mark.parametrize('name', CASES)
def test_greedy_answers(name, tmp_path):
  tiny.llava(tmp_path / name, 5, **CASES[name])
  loaded = stages.load(tmp_path / name, None)
  inputs = stages.inputs(loaded)
  batch = {key: x for key, x in inputs.items() if 'picture' not in key}
  lengths = (batch['segments'] > 0).sum(1)
  assert len(set(lengths)) == 3 and batch['images'].shape[:2] == (3, 2)
  with jax.default_matmul_precision('highest'):
    ours = sampling.generate(loaded.model, loaded.params, batch, lengths, COUNT,
                             eos=-1)
  pixels = np.asarray(stages.compute(loaded, inputs)['vision/pixels'])
  theirs, gap = their_answers(tmp_path / name, batch, lengths.tolist(), pixels)
  # No two best tokens are so close that rounding could swap them.
  assert gap.min() > 1e-4
  np.testing.assert_array_equal(ours, theirs)
  assert len(np.unique(theirs)) > 5

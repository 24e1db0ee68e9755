"""A converted SigLIP reads captions as its reference does.

tests/golden/siglip_captions.npz holds a tiny random SigLIP (weights,
config.json) for the vocabulary of golden/tokenizers/siglip.model, captions, and
of transformers 5.23.0 what `SiglipTokenizer` makes of them, cut and filled up
to the length of the model, and the normalised embeddings `text` in float64.
"""

import json
import shutil

import numpy as np
import published_files
import pytest
import reference

from mmgen import convert
from mmgen import run_folder
from mmgen.data import document
from mmgen.data import layout
from mmgen.data import published_text
from mmgen.evaluators import contrastive

TOKENIZER = reference.GOLDEN / 'tokenizers' / 'siglip.model'


@pytest.fixture(scope='module')
def golden():
  return reference.load('siglip_captions')


def test_pairs_hold_the_references_ids(golden):
  arrays, _ = golden
  captions, wanted = arrays['captions'].tolist(), arrays['tokens']
  tokenizer = published_text.load(TOKENIZER)
  picture = document.image(np.ones((1, 1, 3), np.uint8))
  documents = [document.Document((picture, document.text(words)))
               for words in captions] + [document.bad('x', '')]
  found = layout.pair(documents, tokenizer, wanted.shape[1])
  np.testing.assert_array_equal(found['tokens'][:-1], wanted)
  assert (found['tokens'][-1] == 1).all() and not found['valid'][-1].any()
  lengths = found['valid'].sum(1)
  full = max(len(tokenizer.encode(words)) for words in captions) + 1
  assert lengths.tolist() == [5, 11, 1, 2, 6, 0] and full > 11
  stats = layout.pair_stats(documents, tokenizer, found)
  assert (stats['tokens'], stats['dropped_tokens']) == (25, full - 11)


def test_texts_are_embedded_as_by_the_reference(golden, tmp_path):
  arrays, weights = golden
  source = published_files.save(tmp_path / 'in', weights,
                                json.loads(str(arrays['config'])))
  shutil.copy(TOKENIZER, source / 'spiece.model')
  convert.main([f'--from={source}', f'--to={tmp_path / "run"}'])
  run = run_folder.open_run(tmp_path / 'run')
  found = contrastive.encode_texts(
      run, run.params, arrays['captions'].tolist(), 3)
  reference.close(found, arrays['text'])

"""Notebooks run as a new user runs them, and are stored without outputs."""

import json
import pathlib

# Builds the cache of fonts here, which matplotlib would announce in a cell.
import matplotlib.font_manager  # noqa: F401
import nbclient
import nbformat
import pytest

NOTEBOOKS = pathlib.Path(__file__).parents[1] / 'notebooks'

TOUR = '''
import json

print(json.dumps(dict(
    first=losses[:5].tolist(), last=losses[-5:].tolist(), counts=counts,
    eve_7b=eve_7b, questions=len(turns), answers=answers,
    seen=seen_TT.sum(1).tolist(),
    positions=arrays['positions'][0].tolist(),
    segments=arrays['segments'][0].tolist(),
    frozen=len(frozen), step=int(run.step), heavy=sorted(heavy))))
'''


# What the variables of `published` hold.
PUBLISHED = '''
import json

print(json.dumps(dict(
    similar={name: x.tolist() for name, x in similar.items()},
    answers=answers, slots=slots, sizes=sizes,
    report=len(loaded.report), leaves=len(jax.tree.leaves(loaded.params)))))
'''


def read(name):
  return nbformat.read(NOTEBOOKS / f'{name}.ipynb', as_version=4)


def code_cells(notebook):
  return [cell for cell in notebook.cells if cell.cell_type == 'code']


def execute(name, last, folder):
  """Runs a notebook and a last cell; returns (notebook, what that printed)."""
  notebook = read(name)
  notebook.cells.append(nbformat.v4.new_code_cell(last))
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('TMPDIR', str(folder))
    patch.setenv('IPYTHONDIR', str(folder / 'ipython'))
    patch.setenv('JAX_PLATFORMS', 'cpu')
    nbclient.NotebookClient(
        notebook, timeout=600, kernel_name='python3',
        resources={'metadata': {'path': str(folder)}}).execute()
  said = code_cells(notebook)[-1].outputs
  return notebook, json.loads(''.join(output.text for output in said))


@pytest.fixture(scope='module')
def executed(tmp_path_factory):
  """The executed tour and what its variables hold."""
  return execute('tour', TOUR, tmp_path_factory.mktemp('tour'))


@pytest.fixture(scope='module')
def published(tmp_path_factory):
  """The notebook of published models, likewise."""
  return execute('published', PUBLISHED, tmp_path_factory.mktemp('published'))


@pytest.mark.parametrize('name', ['tour', 'published'])
def test_is_stored_without_outputs(name):
  notebook = read(name)
  nbformat.validate(notebook)
  for cell in code_cells(notebook):
    assert cell.outputs == [], cell.source
    assert cell.execution_count is None, cell.source


def test_shows_no_warning_and_every_picture(executed):
  notebook, _ = executed
  outputs = [o for cell in code_cells(notebook) for o in cell.outputs]
  loud = [o.text for o in outputs if o.get('name') == 'stderr']
  assert not loud
  pictures = [o for o in outputs if 'image/png' in o.get('data', {})]
  assert len(pictures) == 4


COUNTED = {
    'llava-1.5-7b': 7_062_902_784, 'llava-1.5-13b': 13_350_839_296,
    'fuyu-8b': 9_408_238_592, 'eve-7b': 6_768_398_336,
    'eve-7b-hd': 6_768_398_336, 'eve-7b-hd-v2.0': 14_156_712_960,
    'emu2': 36_906_513_152}


def test_published_models_embed_and_answer(published):
  notebook, found = published
  assert not [o for cell in code_cells(notebook) for o in cell.outputs
              if o.get('name') == 'stderr']
  assert found['similar'].keys() == {'hf_clip', 'hf_siglip', 'eva_clip'}
  for a, b in found['similar'].values():
    assert a != b and abs(a) <= 1 and abs(b) <= 1
  # 4 x 4 patches; a row of a Fuyu ends in an id; 32 queries; 2 x 2 cells.
  assert found['slots'] == dict(
      hf_llava=16, hf_fuyu=48, eve=55, eve_v2=25, emu=32, emu2=4)
  assert all(len(ids) == 8 for ids in found['answers'].values())
  assert {name: found['sizes'][name] for name in COUNTED} == COUNTED
  assert found['report'] == found['leaves']


def test_a_model_alone_imports_no_reader_of_data(executed):
  assert executed[1]['heavy'] == []


def test_counts_parameters(executed):
  found = executed[1]
  # Fuyu's projection: kernel of 8 * 8 * 3 inputs, and a bias.
  assert found['counts']['linear patches'] == 8 * 8 * 3 * 64 + 64
  assert 6.7e9 < found['eve_7b'] < 6.8e9


def test_the_mask_sees_the_past_of_a_document(executed):
  found = executed[1]
  used = [t for t, segment in enumerate(found['segments']) if segment]
  assert len(set(found['segments'])) > 2
  for t in used:
    assert found['seen'][t] == found['positions'][t] + 1


def test_the_loss_falls(executed):
  found = executed[1]
  assert found['frozen'] == 0
  assert max(found['last']) < min(found['first']) / 2


def test_every_question_gets_an_answer(executed):
  found = executed[1]
  assert len(found['answers']) == found['questions'] > 1
  assert any(found['answers'])


def test_opens_the_run(executed):
  assert executed[1]['step'] == 10

"""The tour runs as a new user runs it, and is stored without its outputs."""

import json
import pathlib

# Builds the cache of fonts here, which matplotlib would announce in a cell.
import matplotlib.font_manager  # noqa: F401
import nbclient
import nbformat
import pytest

TOUR = pathlib.Path(__file__).parents[1] / 'notebooks' / 'tour.ipynb'

RESULTS = '''
import json

print(json.dumps(dict(
    first=losses[:5].tolist(), last=losses[-5:].tolist(), counts=counts,
    eve_7b=eve_7b, questions=len(turns), answers=answers,
    seen=seen_TT.sum(1).tolist(),
    positions=arrays['positions'][0].tolist(),
    segments=arrays['segments'][0].tolist(),
    frozen=len(frozen), step=int(run.step), heavy=sorted(heavy))))
'''


def read():
  return nbformat.read(TOUR, as_version=4)


def code_cells(notebook):
  return [cell for cell in notebook.cells if cell.cell_type == 'code']


@pytest.fixture(scope='module')
def executed(tmp_path_factory):
  """The executed tour and what its variables hold."""
  folder = tmp_path_factory.mktemp('tour')
  notebook = read()
  notebook.cells.append(nbformat.v4.new_code_cell(RESULTS))
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('TMPDIR', str(folder))
    patch.setenv('IPYTHONDIR', str(folder / 'ipython'))
    patch.setenv('JAX_PLATFORMS', 'cpu')
    nbclient.NotebookClient(
        notebook, timeout=600, kernel_name='python3',
        resources={'metadata': {'path': str(folder)}}).execute()
  said = code_cells(notebook)[-1].outputs
  return notebook, json.loads(''.join(output.text for output in said))


def test_is_stored_without_outputs():
  notebook = read()
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

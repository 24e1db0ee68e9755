"""The command that evaluates a run again from its folder."""

import json
import shutil

import pytest
import tiny_run

from mmgen import errors
from mmgen import evaluate


@pytest.fixture(scope='module')
def places(tmp_path_factory):
  data_dir = tiny_run.prepare(tmp_path_factory.mktemp('data'))
  run = tiny_run.make(tmp_path_factory.mktemp('runs') / 'run', data_dir)
  return run, data_dir


def test_scores_predictions_and_table_come_from_the_folder(places, capsys):
  run, data_dir = places
  evaluate.main([f'--run={run}', f'--data_dir={data_dir}'])
  found = json.loads((run / 'evaluation.json').read_text())
  assert found['step'] == tiny_run.STEP
  assert set(found['fingerprints']) == {'vqa', 'caption', 'loss'}
  siblings = ('', '/blind', '/grey', '/shuffled')
  for name in ('vqa/accuracy', 'caption/exact', 'caption/name_recall',
               'loss/loss'):
    assert all(f'{name}{s}' in found['scores'] for s in siblings)
  lines = [json.loads(line) for line in (
      run / 'predictions' / 'vqa.jsonl').read_text().splitlines()]
  assert len(lines) == 6 * 4
  asked = [p for p in lines if p['condition'] == 'picture']
  assert found['scores']['vqa/accuracy'] == pytest.approx(
      sum(p['correct'] for p in asked) / 6)
  for p in lines:
    assert set(p) == {'id', 'split', 'condition', 'type', 'question',
                      'answer', 'prediction', 'correct'}
  printed = capsys.readouterr().out
  assert 'vqa/accuracy' in printed and 'shuffled' in printed


def test_the_same_scores_again_and_only_what_is_asked_for(places):
  run, data_dir = places
  argv = [f'--run={run}', f'--data_dir={data_dir}', '--evaluator=loss']
  found = []
  for _ in range(2):
    evaluate.main(argv)
    found.append((run / 'evaluation.json').read_text())
  assert found[0] == found[1]
  assert set(json.loads(found[0])['fingerprints']) == {'loss'}


def test_what_is_wrong_is_named_in_one_line(places, tmp_path):
  run, data_dir = places
  def fails(match, *argv):
    with pytest.raises(errors.UserError, match=match) as caught:
      evaluate.main([f'--data_dir={data_dir}', *argv])
    assert '\n' not in str(caught.value)
  fails('is no run folder', f'--run={tmp_path}')
  fails("Did you mean 'loss'", f'--run={run}', '--evaluator=los')
  (tmp_path / 'config.json').write_text((run / 'config.json').read_text())
  fails('it has no checkpoints', f'--run={tmp_path}')
  (tmp_path / 'config.json').write_text('{"name": ')
  fails('config.json is broken', f'--run={tmp_path}')
  other = shutil.copytree(run, tmp_path / 'other')
  text = (other / 'config.json').read_text()
  assert '"model.decoder.hidden": 32' in text
  (other / 'config.json').write_text(
      text.replace('"model.decoder.hidden": 32', '"model.decoder.hidden": 48'))
  fails('checkpoint in .*other is of another model: decoder/.* 32. float32 '
        'there, .* 48', f'--run={other}')
  fails('mmgen.prepare', f'--run={run}', f'--data_dir={tmp_path}')

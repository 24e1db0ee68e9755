"""Tests of the command mmgen.prepare."""

import errno
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from mmgen import errors
from mmgen import prepare
from mmgen.data import corpora

COMMAND = [sys.executable, '-m', 'mmgen.prepare', '--corpus=shapes/tiny']
ROOT = pathlib.Path(__file__).parents[1]
SMALL = ['--corpus=shapes/tiny', '--train_examples=60', '--eval_examples=8',
         '--vocab=400']


def files(folder):
  return {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}


def test_second_call_leaves_everything_alone(tmp_path, capsys):
  arguments = [*SMALL, f'--data_dir={tmp_path}']
  prepare.main(arguments)
  assert 'prepared (train 60' in capsys.readouterr().out
  before = files(tmp_path / 'shapes/tiny')
  prepare.main(arguments)
  assert 'already there and whole' in capsys.readouterr().out
  assert files(tmp_path / 'shapes/tiny') == before
  assert not list(tmp_path.glob('**/*partial*'))


def test_damaged_corpus_is_made_again(tmp_path, capsys):
  arguments = [*SMALL, f'--data_dir={tmp_path}']
  prepare.main(arguments)
  (tmp_path / 'shapes/tiny/tokenizer.model').unlink()
  prepare.main(arguments)
  (tmp_path / 'shapes/tiny/manifest.json').write_text('{"settings": {"tr')
  prepare.main(arguments)
  assert capsys.readouterr().out.count('prepared (train') == 3
  assert corpora.load_tokenizer(tmp_path, 'shapes/tiny').vocab_size == 400


def test_flipped_bytes_are_made_again(tmp_path, capsys):
  arguments = [*SMALL, f'--data_dir={tmp_path}']
  prepare.main(arguments)
  path, = (tmp_path / 'shapes/tiny').glob('*train*')
  path.write_bytes(bytes(b ^ 255 for b in path.read_bytes()))
  prepare.main(arguments)
  assert capsys.readouterr().out.count('prepared (train') == 2
  split = corpora.open_split(tmp_path, 'shapes/tiny', 'train')
  assert split[59]['id'] == 'train-0000059'


def test_killed_in_the_middle_then_run_again(tmp_path):
  command = [*COMMAND, f'--data_dir={tmp_path}', '--eval_examples=8',
             '--vocab=400']
  process = subprocess.Popen(
      [*command, '--train_examples=100000'], cwd=ROOT,
      stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
  try:
    begun = 'shapes/.tiny.partial/drawn_scenes/incomplete*'
    while not list(tmp_path.glob(begun)):
      time.sleep(0.02)
      assert process.poll() is None
    time.sleep(0.5)  # somewhere in 100,000 scenes
    assert process.poll() is None
  finally:
    process.send_signal(signal.SIGKILL)
    process.wait()
  assert (tmp_path / 'shapes/.tiny.partial').exists()
  assert not (tmp_path / 'shapes/tiny').exists()
  with pytest.raises(errors.UserError, match='mmgen.prepare'):
    corpora.manifest(tmp_path, 'shapes/tiny')
  again = subprocess.run(
      [*command, '--train_examples=60'], cwd=ROOT, capture_output=True,
      text=True)
  assert again.returncode == 0, again.stderr
  assert len(corpora.open_split(tmp_path, 'shapes/tiny', 'train')) == 60
  assert not (tmp_path / 'shapes/.tiny.partial').exists()


def test_other_settings_never_overwrite(tmp_path):
  prepare.main([*SMALL, f'--data_dir={tmp_path}'])
  before = files(tmp_path / 'shapes/tiny')
  with pytest.raises(errors.UserError, match=r'train=60 \(asked: 61\)'):
    prepare.main([*SMALL, f'--data_dir={tmp_path}', '--train_examples=61'])
  assert files(tmp_path / 'shapes/tiny') == before


@pytest.mark.parametrize('arguments,message', [
    (['--corpus=shapes/huge'], 'there are: emoji/tiny'),
    (['--corpus=shapes'], 'no address such as'),
    ([*SMALL, '--vocab=9'], 'vocab=9 is too small, at least 272'),
    ([*SMALL, '--vocab=50000'], 'vocab_size=50000: these texts allow at most'),
    ([*SMALL, '--seed=-1'], 'seed=-1 is too small, at least 0'),
    ([*SMALL, '--train_examples=0'], 'train=0 is too small')])
def test_mistakes_say_what_is_allowed(tmp_path, arguments, message):
  with pytest.raises(errors.UserError, match=message) as caught:
    prepare.main([*arguments, f'--data_dir={tmp_path}'])
  assert '\n' not in str(caught.value)
  assert not list(tmp_path.glob('*/tiny'))
  assert not list(tmp_path.glob('**/*partial*'))


def test_error_is_one_line_and_exit_code_2(tmp_path):
  (tmp_path / 'file').write_text('')
  result = subprocess.run(
      [*COMMAND, f'--data_dir={tmp_path}/file/data'], cwd=ROOT,
      capture_output=True, text=True)
  assert result.returncode == 2 and not result.stdout
  assert result.stderr == (
      f'error: --data_dir={tmp_path}/file/data cannot be written '
      '(Not a directory); choose another with --data_dir=<folder>\n')


@pytest.mark.parametrize('error', [
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    RuntimeError('Failed to finalize writing: No space left on device')])
def test_full_disk_is_one_line_and_leaves_nothing(
    tmp_path, monkeypatch, error):
  def write(self, *args, **kwargs):
    raise error
  monkeypatch.setattr(
      corpora.drawn_scenes.DrawnScenes, 'download_and_prepare', write)
  with pytest.raises(errors.UserError, match='is full') as caught:
    prepare.main([*SMALL, f'--data_dir={tmp_path}'])
  assert '\n' not in str(caught.value)
  assert not list(tmp_path.glob('**/*partial*'))


def test_too_little_space_is_noticed_before_drawing(tmp_path, monkeypatch):
  usage = corpora.shutil.disk_usage(tmp_path)
  monkeypatch.setattr(
      corpora.shutil, 'disk_usage', lambda path: usage._replace(free=1 << 20))
  with pytest.raises(errors.UserError, match='MB are needed, 1 MB are free'):
    prepare.main(['--corpus=shapes/tiny', f'--data_dir={tmp_path}'])


def test_an_error_that_is_no_users_keeps_its_traceback(tmp_path, monkeypatch):
  def write(self, *args, **kwargs):
    raise RuntimeError('a bug')
  monkeypatch.setattr(
      corpora.drawn_scenes.DrawnScenes, 'download_and_prepare', write)
  with pytest.raises(RuntimeError, match='a bug'):
    prepare.main([*SMALL, f'--data_dir={tmp_path}'])


def test_run_turns_user_errors_into_one_line(capsys):
  def main():
    raise errors.UserError('field x: found 1, allowed 2')
  with pytest.raises(SystemExit) as caught:
    errors.run(main)
  assert caught.value.code == 2
  assert capsys.readouterr().err == 'error: field x: found 1, allowed 2\n'
  with pytest.raises(SystemExit) as caught:
    errors.run(lambda: None)
  assert not caught.value.code
  with pytest.raises(ZeroDivisionError):
    errors.run(lambda: 1 // 0)


def test_a_reader_that_has_read_enough_is_no_error():
  code = ('from mmgen import errors; '
          r"errors.run(lambda: print('line\n' * 100_000))")
  found = subprocess.run(
      f'{sys.executable} -c "{code}" | head -n 1', shell=True, cwd=ROOT,
      capture_output=True, text=True, timeout=60)
  assert (found.stdout, found.stderr) == ('line\n', '')


def test_help(capsys):
  with pytest.raises(SystemExit):
    prepare.main(['--help'])
  text = capsys.readouterr().out
  for option in ('--corpus', '--data_dir', '--vocab', '--train_examples',
                 '--eval_examples', '--seed', 'emoji/tiny', 'shapes/tiny'):
    assert option in text

"""The command that asks a run about pictures."""

import json
import shutil

import numpy as np
from PIL import Image
import pytest
import tiny_run

from mmgen import errors
from mmgen import generate


@pytest.fixture(scope='module')
def places(tmp_path_factory):
  data_dir = tiny_run.prepare(tmp_path_factory.mktemp('data'))
  folder = tmp_path_factory.mktemp('runs')
  generator = np.random.default_rng(0)
  for name, shape in (('a.png', (20, 30, 3)), ('b.png', (16, 16, 3))):
    pixels = generator.integers(0, 256, shape).astype(np.uint8)
    Image.fromarray(pixels).save(folder / name)
  run = tiny_run.make(folder / 'run', data_dir)
  text = tiny_run.make(folder / 'text', data_dir, vision=False)
  return run, text, folder


def ask(capsys, run, *argv):
  generate.main([f'--run={run}', '--max_tokens=5', '--json', *argv])
  return json.loads(capsys.readouterr().out)


def test_pictures_and_prompts_in_a_batch_equal_one_by_one(places, capsys):
  run, _, folder = places
  images = [f'--image={folder / name}' for name in ('a.png', 'b.png')]
  words = ['--prompt=what is this?', '--prompt=where']
  together = ask(capsys, run, *images, *words)
  assert len(together) == 4
  alone = [e for i in images for w in words for e in ask(capsys, run, i, w)]
  assert together == alone
  assert together[1]['image'].endswith('a.png')
  assert together[1]['prompt'] == 'where'
  answers = [e['answers'][0] for e in together]
  assert all(answers) and len(set(answers)) > 1


def test_samples_depend_on_seed_picture_and_prompt_alone(places, capsys):
  run, _, folder = places
  a, b = (f'--image={folder / name}' for name in ('a.png', 'b.png'))
  how = ['--temperature=1.5', '--top_p=0.9', '--num=3', '--prompt=what?']
  first = ask(capsys, run, a, *how)
  assert len(set(first[0]['answers'])) > 1
  assert ask(capsys, run, b, a, *how)[1] == first[0]
  assert ask(capsys, run, a, *how, '--seed=1') != first


def test_every_answer_is_drawn_by_itself(places, monkeypatch):
  run, _, folder = places
  names = []
  monkeypatch.setattr(
      generate.answering, 'answer',
      lambda *_, **settings: names.extend(settings['names']) or names)
  asked = generate.requests(
      [folder / 'a.png', folder / 'b.png'], ['what?', 'where?'], sees=True)
  generate.generate(generate.run_folder.open_run(run), asked, num=3)
  assert len(names) == len(set(names)) == 12


def test_without_a_prompt_the_picture_is_captioned(places, capsys):
  run, _, folder = places
  found = ask(capsys, run, f'--image={folder / "a.png"}')
  assert found[0]['prompt'] is None and found[0]['answers'][0]


def test_prompts_have_the_style_that_was_trained(places, tmp_path, capsys):
  run, _, folder = places
  image = f'--image={folder / "a.png"}'
  shutil.copytree(run, tmp_path / 'run')
  config = json.loads((run / 'config.json').read_text())
  (tmp_path / 'run' / 'config.json').write_text(json.dumps(
      config | {'mix.first.style': 'fuyu'}))
  own = ask(capsys, run, image, '--prompt=what?')
  styled = ask(capsys, tmp_path / 'run', image, '--prompt=what?')
  assert own != styled == ask(
      capsys, run, image, '--prompt=what?', '--style=fuyu')
  with pytest.raises(SystemExit):
    ask(capsys, run, image, '--style=latin')
  assert 'vicuna_v1' in capsys.readouterr().err


def test_a_run_trained_on_text_continues_the_prompt(places, capsys):
  _, text, _ = places
  found = ask(capsys, text, '--prompt=a red', '--prompt=a blue square')
  assert [e['image'] for e in found] == [None, None]
  assert all(e['answers'][0] for e in found)


def test_answers_are_printed_as_they_are(places, capsys):
  run, _, folder = places
  generate.main([f'--run={run}', f'--image={folder / "a.png"}',
                 '--prompt=[red]what[/red]?', '--max_tokens=2'])
  printed = capsys.readouterr().out
  assert '[red]what[/red]?' in printed and 'a.png' in printed


def test_what_is_transparent_becomes_white(tmp_path):
  pixels = np.zeros((2, 2, 4), np.uint8)
  pixels[0, 0] = 10, 20, 30, 255
  Image.fromarray(pixels).save(tmp_path / 'x.png')
  found = generate.read_picture(tmp_path / 'x.png')
  assert found[0, 0].tolist() == [10, 20, 30]
  assert (found.reshape(4, 3)[1:] == 255).all()


def test_what_is_wrong_is_named_in_one_line(places, tmp_path):
  run, text, folder = places
  good = f'--image={folder / "a.png"}'
  whole = (folder / 'a.png').read_bytes()
  (tmp_path / 'cut.png').write_bytes(whole[:len(whole) // 2])
  (tmp_path / 'words.png').write_text('no picture')
  def fails(match, *argv, run=run):
    with pytest.raises(errors.UserError, match=match) as caught:
      generate.main([f'--run={run}', *argv])
    assert '\n' not in str(caught.value)
  fails('cut.png cannot be read', good, f'--image={tmp_path / "cut.png"}')
  fails('words.png .*its bytes are of no known format',
        f'--image={tmp_path / "words.png"}')
  fails('no such file', f'--image={tmp_path / "none.png"}')
  fails('a folder', f'--image={tmp_path}')
  fails('--image is missing', '--prompt=what?')
  fails('trained on text alone', good, run=text)
  fails('is no run folder', good, run=tmp_path)
  fails('slots; a row of this run has 64', good, f'--prompt={"what? " * 200}')
  fails('--temperature=-1.0; allowed', good, '--temperature=-1')
  fails('--top_p=0.0; allowed', good, '--top_p=0')
  fails('--max_tokens=0; allowed', good, '--max_tokens=0')
  fails('3 equal answers', good, '--num=3')

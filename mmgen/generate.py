"""Asks a trained run about pictures.

  python -m mmgen.generate --run=<folder> --image=fox.png \\
    --prompt="what is this?"
  python -m mmgen.generate --run=<folder> --image=a.png --image=b.png

Every picture is asked every prompt, all in one batch; without a prompt the
pictures are captioned. Answers are greedy unless a temperature is given. A run
that was trained on text alone continues the prompts.
"""

import argparse
import hashlib
import io
import json
import sys
from typing import NamedTuple

from etils import epath
import numpy as np
from PIL import Image
from PIL import ImageOps
from PIL import UnidentifiedImageError
from rich import console as rich_console

from mmgen import errors
from mmgen import run_folder
from mmgen.data import document as document_lib
from mmgen.data import prompts
from mmgen.evaluators import answering

BATCH_SIZE = 64


class Request(NamedTuple):
  """One question about one picture; either may be missing (None)."""

  image: str | None
  prompt: str | None
  document: document_lib.Document
  key: str  # what its random draws are keyed by


def read_picture(path):
  """A picture as uint8 [Y, X, 3]; what is transparent becomes white.

  Raises:
    UserError: no such file, or it cannot be read as a picture.
  """
  try:
    with Image.open(io.BytesIO(epath.Path(path).read_bytes())) as image:
      image = ImageOps.exif_transpose(image).convert('RGBA')
  # What Pillow raises for broken files differs from format to format.
  except Exception as error:
    known = {
        FileNotFoundError: 'no such file', IsADirectoryError: 'a folder',
        UnidentifiedImageError: 'its bytes are of no known format',
    }
    why = known.get(
        type(error), f'{type(error).__name__}: {" ".join(str(error).split())}'
    )
    raise errors.UserError(
        f'--image={path} cannot be read as a picture ({why}); give a PNG, '
        'JPEG or other file that Pillow opens'
    ) from error
  white = Image.new('RGBA', image.size, 'white')
  return np.asarray(Image.alpha_composite(white, image).convert('RGB'))


def requests(images, questions, sees, style='own'):
  """Every picture with every prompt.

  Args:
    images: paths of pictures.
    questions: texts; none asks for captions.
    sees: whether the model reads pictures.
    style: a name of `prompts.STYLES`.

  Returns:
    A list of `Request`.

  Raises:
    UserError: a picture that cannot be read, or arguments that do not suit
      the model.
  """
  if not sees:
    if images or not questions:
      raise errors.UserError(
          'this run was trained on text alone: give it --prompt and no --image'
      )
    return [
        Request(None, words, document_lib.Document(
            (document_lib.text(words, 'input'),), words
        ), words)
        for words in questions
    ]
  if not images:
    raise errors.UserError('--image is missing: this run looks at pictures')
  found = []
  for path in images:
    pixels = read_picture(path)
    digest = hashlib.sha256(pixels.tobytes()).hexdigest()
    for words in questions or [None]:
      document = (
          prompts.caption_document(
              pixels, '', record_id=str(path), style=style
          )
          if words is None else
          prompts.question_document(pixels, [(words, '')], str(path), style)
      )
      found.append(Request(path, words, document, f'{digest} {words}'))
  return found


def generate(run, asked, *, max_tokens=32, temperature=0.0, top_p=1.0, seed=0,
             num=1):
  """Answers requests in batches.

  Args:
    run: a `run_folder.Run` of a next-token model.
    asked: a list of `Request`.
    max_tokens: the longest answer.
    temperature: 0 is greedy.
    top_p: probability mass of the nucleus that tokens are drawn from.
    seed: of the draws, which depend on seed, picture and prompt alone.
    num: answers to each request.

  Returns:
    A list of `num` texts for each request.
  """
  documents = [r.document for r in asked for _ in range(num)]
  names = [f'{r.key} {i}' for r in asked for i in range(num)]
  said = answering.answer(
      run, run.params, documents, max_tokens, BATCH_SIZE,
      temperature=temperature, top_p=top_p, seed=seed, names=names,
  )
  return [said[i * num:(i + 1) * num] for i in range(len(asked))]


def check(args):
  """Raises UserError if a setting is out of range."""
  for field, fine, allowed in (
      ('temperature', 0 <= args.temperature < float('inf'), '0 or more'),
      ('top_p', 0 < args.top_p <= 1, 'above 0 and at most 1'),
      ('max_tokens', args.max_tokens >= 1, '1 or more'),
      ('num', args.num >= 1, '1 or more'),
  ):
    if not fine:
      raise errors.UserError(
          f'--{field}={getattr(args, field)}; allowed: {allowed}'
      )
  if args.num > 1 and args.temperature == 0:
    raise errors.UserError(
        f'--num={args.num} would give {args.num} equal answers: greedy '
        'decoding draws nothing. Set --temperature, for instance to 0.7.'
    )


def _parser():
  parser = argparse.ArgumentParser(
      prog='python -m mmgen.generate', description=__doc__,
      formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
  )
  add = parser.add_argument
  add('--run', required=True, metavar='FOLDER', help='folder of a trained run')
  add('--image', action='append', default=[], metavar='FILE',
      help='a picture; may be repeated')
  add('--prompt', action='append', default=[], metavar='TEXT',
      help='a question; may be repeated (default: caption the pictures)')
  add('--style', choices=prompts.STYLES, metavar='NAME',
      help=f'templates of the prompt: {", ".join(prompts.STYLES)} (default: '
      'that of the first source the run was trained on)')
  add('--temperature', type=float, default=0.0,
      help='0 takes the most probable token (default: %(default)s)')
  add('--top_p', type=float, default=1.0,
      help='draw from this much probability only (default: %(default)s)')
  add('--max_tokens', type=int, default=32,
      help='longest answer (default: %(default)s)')
  add('--seed', type=int, default=0, help='of the draws (default: %(default)s)')
  add('--num', type=int, default=1,
      help='answers to each question (default: %(default)s)')
  add('--json', action='store_true',
      help='print a JSON list of {image, prompt, answers}')
  return parser


def show(found, console):
  """Prints answers, one heading a picture; nothing is read as markup."""
  image = None
  for entry in found:
    if entry['image'] != image:
      image = entry['image']
      console.print(image, style='bold', markup=False, highlight=False)
    if entry['prompt'] is not None:
      console.print(
          f'  {entry["prompt"]}', style='dim', markup=False, highlight=False
      )
    for answer in entry['answers']:
      console.print(
          f'  {answer or "(nothing)"}', style='green', markup=False,
          highlight=False,
      )


def main(argv=None):
  """Reads the command line, asks, prints the answers."""
  args = _parser().parse_args(argv)
  check(args)
  config = run_folder.read_config(args.run)
  if config.model.name != 'multimodal':
    raise errors.UserError(
        f'--run={args.run} is a model of the kind {config.model.name!r}, '
        "which says nothing; 'multimodal' ones do"
    )
  styles = [s.get('style', 'own') for s in config.get('mix', {}).values()]
  asked = requests(
      args.image, args.prompt, bool(config.model.get('vision')),
      args.style or [*styles, 'own'][0],
  )
  said = generate(
      run_folder.open_run(args.run), asked, max_tokens=args.max_tokens,
      temperature=args.temperature, top_p=args.top_p, seed=args.seed,
      num=args.num,
  )
  found = [
      dict(image=r.image, prompt=r.prompt, answers=answers)
      for r, answers in zip(asked, said)
  ]
  if args.json:
    print(json.dumps(found, ensure_ascii=False, indent=1))
  else:
    show(found, rich_console.Console())


if __name__ == '__main__':
  errors.run(lambda: main(sys.argv[1:]))

"""Imports go down the floors of the project only."""

import ast
import pathlib

ROOT = pathlib.Path(__file__).parents[1] / 'mmgen'
# From low to high; what is not named is a command, or config, above them all.
FLOORS = (('errors', 'fields', 'partition'), ('data',), ('models',),
          ('weights',), ('objectives',), ('evaluators',), ('training',),
          ('addresses', 'config', 'run_folder'))


def _floor(part):
  return next((i for i, parts in enumerate(FLOORS) if part in parts),
              len(FLOORS))


def _imports(path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and (node.module or '') == 'mmgen':
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module:
      yield from [node.module.removeprefix('mmgen.').split('.')[0]] * (
          node.module.startswith('mmgen.'))


def test_imports_go_down():
  wrong = []
  for path in sorted(ROOT.rglob('*.py')):
    part = path.relative_to(ROOT).parts[0].removesuffix('.py')
    wrong += [f'{path.relative_to(ROOT)} imports {name}'
              for name in _imports(path)
              if name != part and _floor(name) > _floor(part)]
  assert not wrong
  assert _floor('data') < _floor('models') < _floor('train')

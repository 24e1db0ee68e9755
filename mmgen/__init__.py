"""mmgen: generative multimodal models in JAX, each system a configuration."""

__version__ = '0.1.0'

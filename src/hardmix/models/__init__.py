"""Reference backbones that train on a CPU, and timm's models under the same call."""

from hardmix.models.build import MODELS, build_model, model_options

__all__ = ["MODELS", "build_model", "model_options"]

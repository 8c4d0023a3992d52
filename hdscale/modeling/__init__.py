"""The modeling room: what the paper defines.

Shapes: B batch, S source, T target, D d_model, A adapter size, K hypernetwork bottleneck, N layers, V vocabulary.
"""

from hdscale.modeling.config import HyperdecoderConfig
from hdscale.modeling.export import from_pretrained
from hdscale.modeling.model import AdaptedModel, ModelOutput, build_model

__all__ = ["AdaptedModel", "HyperdecoderConfig", "ModelOutput", "build_model", "from_pretrained"]

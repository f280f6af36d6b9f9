"""How many bytes of weights a token reads.

Bytes read for one token at batch 1 bound its speed on any device whose memory is the limit (arXiv:2312.03863, 2.2), so
that they stand for its cost where no times were measured.
"""

import math
from collections.abc import Mapping

from halve.formats import Format
from halve.models.config import ModelConfig
from halve.models.names import EMBEDDING, layer_of, modules, vectors


def bytes_per_token(config: ModelConfig, formats: Mapping[str, Format]) -> int:
    """Bytes of weights that one decoded token reads at batch 1: every product once, one row of an untied table, and of
    a sparse layer's experts as many as a token runs through. formats: of every module, by its name.

    The cache is left out: it grows with the context and is the same for every uniform plan.
    """
    total: float = sum(math.prod(shape) * 4 for name, shape in vectors(config) if ".experts." not in name)
    for module in modules(config):
        looked_up = module.name == EMBEDDING and not config.tied
        shape = (1, module.shape[1]) if looked_up else module.shape
        size = formats[module.name].size_bytes(shape)
        if module.expert is not None:
            experts = config.layers[layer_of(module.name)].experts
            assert experts is not None
            bias = 4 * module.shape[0] if module.bias else 0
            total += (size + bias) * experts.top_k / experts.num_experts
        else:
            total += size
    return round(total)

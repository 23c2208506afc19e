"""Features of a frozen encoder and a linear head, of which the head alone travels (the HSL paper's CLIP features).

Assumed: the paper says only that image features of CLIP feed the distributed learning; here they are unit features, one
linear layer, the task's loss and the weighted mean of the heads, and that is exact. Any encoder that the plan names by
its weight file will do: OpenAI's CLIP as `timm:vit_base_patch32_clip_quickgelu_224` (its pooled features, before the
projection into the space that text shares), or efficientnet_lite0. Adapted: images are squeezed or padded as the plan
says, not cropped in the middle; float32, where the release has half precision.
"""

from __future__ import annotations

from dataclasses import replace

from hsl_node.train.method import all_but, beginning
from hsl_node.train.methods.fedavg import FEDAVG
from hsl_node.train.networks.frozen import FROZEN as NETWORK

FROZEN = replace(FEDAVG, name="frozen", network=NETWORK, travels=all_but(beginning("trunk.")))

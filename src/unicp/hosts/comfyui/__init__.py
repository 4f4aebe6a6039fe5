"""ComfyUI: a node that makes sampling faster, through the program's own wrappers.

The nodes are :mod:`~unicp.hosts.comfyui.nodes`; `integrations/comfyui` is what people put into `custom_nodes`. Nothing
here imports ComfyUI before a node is used.

"""

from __future__ import annotations

from .nodes import NODE_CLASS_MAPPINGS as NODE_CLASS_MAPPINGS
from .nodes import NODE_DISPLAY_NAME_MAPPINGS as NODE_DISPLAY_NAME_MAPPINGS

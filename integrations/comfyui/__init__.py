"""unicp for ComfyUI: put this folder into `custom_nodes`, and install unicp into ComfyUI's own Python."""

from unicp.hosts.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]

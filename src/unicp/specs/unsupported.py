"""Video transformers of diffusers that no spec describes yet, and why."""

UNSUPPORTED: dict[str, str] = {
    "AnyFlowFARTransformer3DModel": "goes frame by frame with a cache of keys: its calls are no denoising steps",
    "Cosmos3OmniTransformer": "takes lists of packed tokens without a batch; not covered yet",
    "JoyImageEditTransformer3DModel": "edits images",
    "JoyImageEditPlusTransformer3DModel": "edits images",
    "Kandinsky6SRTransformer3DModel": "its sparse attention is made for GPUs, the tests run on a CPU; not covered yet",
    "MiniMaxH3Transformer3DModel": "video, sound and text in one packed sequence; not covered yet",
    "SanaWMLTX2RefinerTransformer3DModel": "goes frame by frame with a cache of keys: its calls are no denoising steps",
    "WanAnimate2Transformer3DModel": "takes lists of latents, and the first call of a run fills a cache of keys",
}
"""Reasons by class name. Methods that keep the whole output need no spec, and others may find the structure."""

KEEPS_KEYS = ("AnyFlowFARTransformer3DModel", "SanaWMLTX2RefinerTransformer3DModel", "WanAnimate2Transformer3DModel")
"""Classes of which no method may skip a call: each call fills the cache that the next ones need."""

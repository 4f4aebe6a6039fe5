"""``compare``: every method over its main knob, against the unaccelerated pipeline, measured alike."""

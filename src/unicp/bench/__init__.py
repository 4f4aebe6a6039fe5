"""``compare`` measures every method over its main knob against the unaccelerated pipeline, all in the same way."""

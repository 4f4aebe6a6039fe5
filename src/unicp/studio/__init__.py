"""``unicp studio`` is a page on which a video is made accelerated and unaccelerated. It needs the extra ``studio``."""

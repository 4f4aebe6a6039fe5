"""``unicp studio``: a page on which a video is made both ways and looked at. Needs the extra ``studio``."""

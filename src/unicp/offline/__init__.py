"""Work that is done before a video is made: calibrating, tuning, rehearsing, and looking into profiles."""

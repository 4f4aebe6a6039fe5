"""What runs before a video is made: calibrating, tuning, looking into profiles."""

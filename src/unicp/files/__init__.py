"""Files: written whole or not at all, known by their digest, gone on with where they end."""

"""What each key has used, a day: written with what ends a request, so that a kill loses nothing of it."""

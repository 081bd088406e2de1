"""Process of a run: signals, watchdog, peers, sessions, prefetch."""
